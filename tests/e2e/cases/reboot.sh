# SPDX-License-Identifier: Apache-2.0
# What the guest writes lasts over its reboot, in the same process of clone; then it powers off and the image is in order.
# seconds: 12
root_image <<'END'
if [ -e /root/first ]; then
  tell second cat /root/first
else
  cat /proc/sys/kernel/random/boot_id >/root/first
  tell first cat /root/first
  sync
  reboot -f
fi
END
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs "$WORK/root.ext4" --vcpus 2 --cmdline quiet
[[ $(told first) =~ ^[0-9a-f-]{36}$ ]] || fail "first boot: $(told first)"
equal "file after the reboot" "$(told second)" "$(told first)"
e2fsck -fn "$WORK/root.ext4"
equal "file in the image" "$(debugfs -R 'cat root/first' "$WORK/root.ext4" 2>/dev/null)" "$(told first)"
