# SPDX-License-Identifier: Apache-2.0
# A root file system without the init, or a disk without a file system: the guest says so and powers off.
# seconds: 16
cp "$FIXTURES/busybox-root.ext4" root.ext4
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --init /sbin/missing --no-reboot --cmdline quiet
contains console.log 'clone-init: /sbin/missing: No such file or directory (ENOENT)'
truncate -s 4M empty.img
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs empty.img --no-reboot --cmdline quiet
contains console.log 'clone-init: cannot mount /dev/vda read-write as root: '
