# SPDX-License-Identifier: Apache-2.0
# A root file system on the generic kernel, where ext4 and virtio are modules, with 5 GiB; the image is left read-only.
# seconds: 15
root_image <<END
$describe_machine
tell root grep ' / ' /proc/mounts
tell disk-readonly cat /sys/block/vda/ro
tell modules lsmod
END
sum=$(sha256sum "$WORK/root.ext4")
ends_with 0 run_clone --kernel "$KERNEL_GENERIC" --rootfs "$WORK/root.ext4,readonly=on" --mem 5G --no-reboot --cmdline quiet
check_machine "$KERNEL_GENERIC" 5120 1
[[ $(told root) =~ ^/dev/vda\ /\ ext4\ ro, ]] || fail "root: $(told root)"
equal "read-only disk" "$(told disk-readonly)" 1
for module in ext4 virtio_blk virtio_mmio virtio_rng; do
  [[ " $(told modules)" == *" $module "* ]] || fail "module $module is not loaded: $(told modules)"
done
equal "image" "$(sha256sum "$WORK/root.ext4")" "$sum"
