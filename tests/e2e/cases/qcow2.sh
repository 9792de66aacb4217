# SPDX-License-Identifier: Apache-2.0
# qcow2 images of QEMU's tools in real guests. The first boots from one and reads and writes ten others, beside a raw twin; the
# second is killed amid writes and flushes; the third reads what was left, and has two overlays on file systems that run full.
# seconds: 100
new() { qemu-img create -q -f qcow2 "$@"; }
sum() { sha256sum <"$1" | cut -d' ' -f1; }
clean() { # IMAGE…: no corruption and, as the machine was powered off, nothing leaked
  local image
  for image in "$@"; do qemu-img check -q "$image" || fail "qemu-img check $image: status $?"; done
}

# The same 1 MiB in every way that qemu-img has: random, compressible, empty, random.
{ head -c 256K /dev/urandom; seq -f %015g 16384; head -c 256K /dev/zero; head -c 256K /dev/urandom; } >data.raw
head -c 1M /dev/urandom >other.raw
cp data.raw twin.img
convert() { qemu-img convert -O qcow2 "$@"; }
convert data.raw plain.qcow2
convert -c data.raw zlib.qcow2
convert -c -o compression_type=zstd,cluster_size=16k data.raw zstd.qcow2
convert -o compat=0.10,cluster_size=4k data.raw version2.qcow2
convert -o extended_l2=on,lazy_refcounts=on,refcount_bits=64 data.raw extended.qcow2
new over-raw.qcow2 -F raw -b "$PWD/data.raw"
mkdir chain && convert -c data.raw chain/compressed.qcow2
(cd chain && new middle.qcow2 -F qcow2 -b compressed.qcow2) # names start from the file that holds them
new -o cluster_size=512 chain.qcow2 -F qcow2 -b chain/middle.qcow2
convert other.raw other.qcow2
new rebased.qcow2 -F raw -b data.raw
qemu-img rebase -F qcow2 -b other.qcow2 rebased.qcow2
cp other.qcow2 committed.qcow2
new to-commit.qcow2 -F qcow2 -b committed.qcow2
convert -n data.raw to-commit.qcow2
qemu-img commit -q to-commit.qcow2
new snapshot.qcow2 1M
qemu-img snapshot -c before snapshot.qcow2
convert -n data.raw snapshot.qcow2
new empty.qcow2 12M
written=(plain zlib zstd version2 extended over-raw chain rebased committed)
unchanged=(data.raw other.raw chain/compressed.qcow2 chain/middle.qcow2 other.qcow2 snapshot.qcow2)
before=$(sha256sum "${unchanged[@]}")

# Byte offsets: amid clusters, over their borders, a range of whole clusters of every size discarded.
root_image < <(sed "s/NAMES/twin ${written[*]} snapshot/" <<'END'
device() { grep -lx "$1" /sys/block/*/serial | cut -d/ -f4; }
head -c 200000 /dev/urandom >/run/noise
put() { dd if=/run/noise of=$disk bs=512 skip=$1 seek=$2 count=$3 conv=notrunc,fsync 2>/dev/null; }
for name in NAMES; do
  disk=/dev/$(device $name)
  tell sum-$name sh -c "sha256sum <$disk | cut -d' ' -f1"
  [ $name = snapshot ] && continue
  put 0 0 1; put 1 77 1; put 2 511 3; put 10 1000 300; put 5 1500 9; put 100 2047 1
  blkdiscard -o 0x20000 -l 0x20000 $disk || echo "cannot discard"
  blkdiscard -o 0xd0000 -l 0x10000 $disk
  put 33 275 8; put 40 1700 20
  blockdev --flushbufs $disk
  tell after-$name sh -c "sha256sum <$disk | cut -d' ' -f1"
done
disk=/dev/$(device empty)
tell zeroes sh -c "tr -d '\0' <$disk | wc -c"
mke2fs -F $disk >/dev/null 2>&1 && mount -t ext4 -o discard $disk /mnt && for n in 1 2 3 4 5; do
  head -c 1000000 /dev/urandom >/mnt/$n; sync; [ $n = 3 ] && rm /mnt/1 && sync
done
rm /mnt/2; fstrim /mnt; (cd /mnt && sha256sum [345]) >/mnt/sums; tell files sh -c 'cd /mnt && sha256sum -c sums | grep -c OK'
umount /mnt
echo done >/root/written
END
)
convert -c root.ext4 root.qcow2
disks=(--block twin.img,serial=twin --block snapshot.qcow2,readonly=on,serial=snapshot --block empty.qcow2,serial=empty)
for name in "${written[@]}"; do disks+=(--block "$name.qcow2,backing=on,serial=${name:0:20}"); done
echo "images made after $SECONDS s"
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs root.qcow2 --vcpus 2 --no-reboot --cmdline quiet "${disks[@]}"
for name in twin "${written[@]}" snapshot; do equal "content of $name" "$(told "sum-$name")" "$(sum data.raw)"; done
after=$(sum twin.img)
for name in twin "${written[@]}"; do equal "content of $name after writes" "$(told "after-$name")" "$after"; done
! cmp -s twin.img data.raw || fail "nothing was written"
equal "bytes in an empty disk that are not 0" "$(told zeroes)" 0
for name in "${written[@]}"; do
  clean "$name.qcow2"
  qemu-img compare -q -f raw -F qcow2 twin.img "$name.qcow2" || fail "qemu-img finds other content in $name.qcow2"
done
equal "backing files and the read-only image" "$(sha256sum "${unchanged[@]}")" "$before"
equal "files" "$(told files)" 3
clean empty.qcow2 root.qcow2
for name in empty root; do
  qemu-img convert -O raw $name.qcow2 back.img
  e2fsck -fn back.img
done
equal "written to the root" "$(debugfs -R 'cat root/written' back.img 2>/dev/null)" 'done'
qemu-img map --output=json empty.qcow2 >map
allocated=$(python3 -c 'import json; print(sum(e["length"] for e in json.load(open("map")) if e["data"]))')
((allocated < 4500000)) || fail "empty.qcow2 keeps $allocated bytes after fstrim of all but 3000000"

echo "all kinds checked after $SECONDS s"

# Killed amid writes. Each disk gets block after block, each with its number in it, wherever that falls; "flushed" comes after fsync.
new -o cluster_size=4k kill-fresh.qcow2 4M
head -c 4M /dev/urandom >kill-base.raw
new -o extended_l2=on kill-over.qcow2 -F raw -b kill-base.raw
convert -c kill-base.raw kill-zlib.qcow2
killed=(fresh over zlib)
root_image <<'END'
device() { grep -lx "$1" /sys/block/*/serial | cut -d/ -f4; }
dmesg -n 1
head -c 250000 /dev/urandom >/run/noise
work() { # the lower half gets the marks, the upper half what nobody flushes
  local n=0 disk=/dev/$(device $1)
  while :; do
    n=$((n + 1))
    [ $((n % 3)) = 0 ] && dd if=/run/noise of=$disk bs=4k seek=$((512 + n * 37 % 450)) count=$((n % 60)) conv=notrunc 2>/dev/null
    [ $((n % 5)) = 0 ] && blkdiscard -o $(((32 + n % 24) << 16)) -l 0x90000 $disk
    printf '%04096d' $n | dd of=$disk bs=4k seek=$((n * 509 % 512)) conv=notrunc,fsync 2>/dev/null && echo "flushed $1 $n"
  done
}
for name in fresh over zlib; do work $name & done
wait
END
disks=()
for name in "${killed[@]}"; do disks+=(--block "kill-$name.qcow2,backing=on,serial=$name"); done
start_clone --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --no-reboot --cmdline quiet "${disks[@]}"
marks() { (($(grep -c "^flushed $1 [0-9]*.\?$" console.log) >= 30)); }
for name in "${killed[@]}"; do within 120 marks "$name"; done
ends_with 1 qemu-img check kill-fresh.qcow2 2>refused.log
contains refused.log 'Failed to get'
ends_with 1 "$CLONE" run --kernel "$KERNEL_CLOUD" --block kill-over.qcow2,backing=on </dev/null 2>refused.log
contains refused.log 'path=kill-over.qcow2: in use by another process (opened for writing)'
kill -KILL "$clone_process"
ends_with 137 wait "$clone_process"
for name in "${killed[@]}"; do
  status=0
  qemu-img check "kill-$name.qcow2" >check.log || status=$?
  ((status == 0 || status == 3)) || { cat check.log; fail "qemu-img check of kill-$name.qcow2: status $status"; } # 3: leaks
  qemu-img convert -O raw "kill-$name.qcow2" "kill-$name.raw"
  sed -n "s/\r//g; s/^flushed $name \([0-9]*\)$/\1/p" console.log >marks
  python3 - "kill-$name.raw" <<'PY' || fail "kill-$name.qcow2 lacks what was flushed"
import sys
disk = open(sys.argv[1], "rb").read()
numbers = [int(line) for line in open("marks")]
lost = [n for n in numbers if disk[n * 509 % 512 * 4096:][:4096] != b"%04096d" % n]
print(f"{sys.argv[1]}: {len(numbers)} marks, lost: {lost}")
sys.exit(bool(lost))
PY
done

echo "killed and checked after $SECONDS s"

# Full file systems: the guest's writes fail, all else goes on, and so do the writes once there is space.
trap 'umount small small-root' EXIT
mkdir small small-root
mount -t tmpfs -o size=768K none small
mount -t tmpfs -o size=4M none small-root
new small/full.qcow2 -F raw -b "$PWD/data.raw"
root_image <<'END'
device() { grep -lx "$1" /sys/block/*/serial | cut -d/ -f4; }
dmesg -n 1
for name in fresh over zlib; do tell sum-$name sh -c "sha256sum </dev/$(device $name) | cut -d' ' -f1"; done
disk=/dev/$(device full)
head -c 786432 /dev/urandom >/run/noise
fill() { dd if=/run/noise of=$disk bs=64k conv=notrunc,fsync; }
tell full fill
tell errors sh -c "dmesg | grep -c 'I/O error, dev ${disk#/dev/},'"
tell behind sh -c "tail -c 262144 $disk | sha256sum | cut -d' ' -f1"
tell root-full dd if=/dev/urandom of=/root/large bs=64k count=320 conv=fsync
tell goes-on sh -c 'ls /bin/busybox; sha256sum </dev/vda | wc -l'
echo "waits for space"
for i in $(seq 100); do fill 2>/dev/null && break; sleep 0.3; done
blockdev --flushbufs $disk
tell filled cmp -n 786432 /run/noise $disk
END
root_sum=$(sum root.ext4)
start_clone --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --overlay small-root/overlay.qcow2 --no-reboot --cmdline quiet "${disks[@]}" \
  --block small/full.qcow2,backing=on,serial=full
within 150 contains console.log 'waits for space'
mount -o remount,size=4M small
ends_with 0 wait "$clone_process"
for name in "${killed[@]}"; do equal "content of kill-$name.qcow2" "$(told "sum-$name")" "$(sum "kill-$name.raw")"; done
[[ $(told full) == *"Input/output error"* ]] || fail "writing to a full file system: $(told full)"
(($(told errors) > 0)) || fail "the guest's kernel saw no error"
equal "what was not written" "$(told behind)" "$(tail -c 256K data.raw | sha256sum | cut -d' ' -f1)"
[[ $(told root-full) == *"error"* ]] || fail "writing to a full root: $(told root-full)"
equal "after the errors" "$(told goes-on)" "/bin/busybox 1"
equal "written once there is space" "$(told filled)" ""
clean small/full.qcow2
status=0
qemu-img check small-root/overlay.qcow2 || status=$?
((status == 0 || status == 3)) || fail "qemu-img check of the full overlay: status $status"
equal "base of the full overlay" "$(sum root.ext4)" "$root_sum"
equal "backing files after all this" "$(sha256sum "${unchanged[@]}")" "$before"
