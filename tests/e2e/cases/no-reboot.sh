# SPDX-License-Identifier: Apache-2.0
# With --no-reboot a guest's reboot and a kernel's panic end clone with status 3.
# seconds: 12
options=(--kernel "$KERNEL_CLOUD" --initrd "$FIXTURES/busybox-initrd.cpio" --no-reboot)
ends_with 3 run_clone "${options[@]}" --cmdline "quiet $(encode_run 'echo rebooting; reboot -f')"
contains "$WORK/console.log" rebooting
ends_with 3 run_clone "${options[@]}" --vcpus 2 --cmdline "quiet $(encode_run 'echo c >/proc/sysrq-trigger')"
contains "$WORK/console.log" 'Kernel panic - not syncing: sysrq triggered crash'
