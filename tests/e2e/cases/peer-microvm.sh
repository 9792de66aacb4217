# SPDX-License-Identifier: Apache-2.0
# Debian's cloud kernel boots in QEMU's microvm on the test host's KVM: the host and the fixtures are sound, apart from clone.
# seconds: 8
script='echo "guest $(uname -r) $((6 * 7))"'
timeout --foreground "$TIME_LIMIT" qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 256M -nodefaults -no-user-config -no-reboot \
  -display none -serial stdio -kernel "$KERNEL_CLOUD" -initrd "$FIXTURES/busybox-initrd.cpio" \
  -append "console=ttyS0 quiet panic=-1 $(encode_run "$script")" </dev/null >"$WORK/console.log" 2>&1
contains "$WORK/console.log" "guest ${KERNEL_CLOUD#*/vmlinuz-} 42"
contains "$WORK/console.log" "run: exit status 0"
