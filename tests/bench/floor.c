// SPDX-License-Identifier: Apache-2.0
// floor [MIB]: the least that any VMM for a PC does: the KVM objects, one memory slot (two for more than 3 GiB), one
// vCPU, and its first exit, which it tells by the byte '@'.
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static long checked(long result) {
  if (result < 0) _exit(1);
  return result;
}

int main(int count, char** arguments) {
  const size_t memory_bytes = (count > 1 ? strtoul(arguments[1], NULL, 10) : 256) << 20;
  const int kvm = (int)checked(open("/dev/kvm", O_RDWR | O_CLOEXEC));
  const int vm = (int)checked(ioctl(kvm, KVM_CREATE_VM, 0));
  checked(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
  checked(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
  struct kvm_pit_config pit = {0};
  checked(ioctl(vm, KVM_CREATE_PIT2, &pit));

  unsigned char* memory =
      mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 1;
  static const unsigned char kCode[] = {0xba, 0xf8, 0x03, 0xb0,
                                        '@',  0xee, 0xf4};  // mov dx, 0x3f8; mov al, '@'; out; hlt
  memcpy(memory + 0x1000, kCode, sizeof kCode);
  const size_t hole = 3ul << 30, low_bytes = memory_bytes < hole ? memory_bytes : hole;
  struct kvm_userspace_memory_region slot = {.memory_size = low_bytes, .userspace_addr = (unsigned long)memory};
  checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
  if (low_bytes < memory_bytes) {
    slot = (struct kvm_userspace_memory_region){.slot = 1,
                                                .guest_phys_addr = 4ul << 30,
                                                .memory_size = memory_bytes - low_bytes,
                                                .userspace_addr = (unsigned long)memory + low_bytes};
    checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
  }

  const int vcpu = (int)checked(ioctl(vm, KVM_CREATE_VCPU, 0));
  const size_t run_bytes = (size_t)checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
  struct kvm_run* run = mmap(NULL, run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  if (run == MAP_FAILED) return 1;
  struct kvm_sregs sregs;
  checked(ioctl(vcpu, KVM_GET_SREGS, &sregs));
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  checked(ioctl(vcpu, KVM_SET_SREGS, &sregs));
  struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
  checked(ioctl(vcpu, KVM_SET_REGS, &regs));
  checked(ioctl(vcpu, KVM_RUN, 0));
  if (run->exit_reason != KVM_EXIT_IO || run->io.port != 0x3f8) return 1;
  checked(write(1, (char*)run + run->io.data_offset, 1));
  pause();
  return 0;
}
