# SPDX-License-Identifier: Apache-2.0
# Several disks: serial numbers, read-only, data written at random places and discarded, seen in the host's files; a limit.
# seconds: 21
truncate -s 32M data.img
head -c 1M /dev/urandom >readonly.img
cp readonly.img unchanged.img
mke2fs -q -t ext4 trim.img 64M
fallocate -l 64M trim.img # blocks for all of it, the file system as it was
truncate -s 1M limited.img
root_image <<'END'
tell disks sh -c 'cd /sys/block; for disk in vd?; do echo $disk $(cat $disk/serial) $(cat $disk/ro $disk/size); done'
for place in 0 17 1234 5678 8191; do dd if=/dev/urandom of=/dev/vdb bs=4k count=1 seek=$place conv=notrunc 2>/dev/null; done
sync
tell data sha256sum /dev/vdb
tell readonly sha256sum /dev/vdc
clock() { read -r now _ </proc/uptime; echo "${now%.*}${now#*.}"; } # hundredths of a second
start=$(clock); dd if=/dev/vde of=/dev/null bs=4k count=41 iflag=direct 2>/dev/null; tell limited echo $(($(clock) - start))
tell refused dd if=/dev/zero of=/dev/vdc bs=512 count=1
mount /dev/vdd /mnt && head -c 25165824 /dev/zero | tr '\0' x >/mnt/file && sync && rm /mnt/file && sync && tell trimmed fstrim -v /mnt && umount /mnt
END
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --block data.img,serial=data --block readonly.img,readonly=on \
  --block trim.img,aio=threads --block limited.img,iops=20,iops-burst=1 --vcpus 2 --no-reboot --cmdline quiet
equal "disks" "$(told disks)" "vda clone-root 0 131072 vdb data 0 65536 vdc disk-2 1 2048 vdd disk-3 0 131072 vde disk-4 0 2048"
equal "data" "$(told data)" "$(sha256sum <data.img | cut -d' ' -f1)  /dev/vdb"
equal "read-only data" "$(told readonly)" "$(sha256sum <readonly.img | cut -d' ' -f1)  /dev/vdc"
[[ $(told refused) == *[Pp]ermitted* || $(told refused) == *[Rr]ead-only* ]] || fail "a write to the read-only disk: $(told refused)"
(($(told limited) >= 200)) || fail "41 reads at 20 a second took $(told limited) hundredths of a second"
cmp readonly.img unchanged.img
[[ $(told trimmed) == *trimmed* ]] || fail "fstrim: $(told trimmed)"
used=$(($(stat -c %b trim.img) * 512))
((used < 16 << 20)) || fail "trim.img takes $used bytes after the guest's fstrim"
e2fsck -fn trim.img
