# SPDX-License-Identifier: Apache-2.0
# Bad input: one line on standard error that names the thing, status 1 or 2, within a second, nothing left behind.
# seconds: 25
# host: no
mkdir inputs scratch
cd inputs
: >empty
head -c 4096 /dev/urandom >random
head -c 1M "$KERNEL_CLOUD" >truncated
ln -s "$KERNEL_CLOUD" kernel
truncate -s 1M disk
echo 'kernel: [' >broken.yaml
printf 'kernel: kernel\nmemory: 1G\n' >unknown.yaml
printf 'kernel: kernel\nmem:\n  - 1G\n' >type.yaml
printf 'kernel: kernel\nvcpus: many\n' >value.yaml
printf 'kernel: kernel\ndevice:\n  - virtio-blk: {path: disk, size: 3}\n' >option.yaml
echo '- kernel' >list.yaml
mkfifo fifo
new_qcow2() { qemu-img create -q -f qcow2 "$@"; }
new_qcow2 good.qcow2 1M
damaged() { # FILE OFFSET BYTES: good.qcow2 with other bytes at an offset; its refcount table is at 64 KiB, the L1 table at 192 KiB
  cp good.qcow2 "$1"
  printf '%b' "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
cp good.qcow2 masked.img
cp disk raw.qcow2
head -c 50 good.qcow2 >short.qcow2
head -c 70000 good.qcow2 >truncated.qcow2
new_qcow2 over.qcow2 -F raw -b disk
cp disk removed && new_qcow2 orphan.qcow2 -F raw -b removed && rm removed
for file in loop-1 loop-2 vmdk remote formless; do new_qcow2 $file.qcow2 1M; done
rebased() { qemu-img rebase -u -F "$2" -b "$3" "$1"; }
rebased loop-1.qcow2 qcow2 loop-2.qcow2
rebased loop-2.qcow2 qcow2 loop-1.qcow2
rebased vmdk.qcow2 vmdk disk
rebased remote.qcow2 raw nbd://host/disk
damaged formless.qcow2 8 '\0\0\0\0\0\0\20\0\0\0\0\4' # a backing file's name and no more
printf disk | dd of=formless.qcow2 bs=1 seek=4096 conv=notrunc status=none
new_qcow2 snapshot.qcow2 1M && qemu-img snapshot -c one snapshot.qcow2
new_qcow2 external.qcow2 -o data_file=external.raw 1M
damaged encrypted.qcow2 32 '\0\0\0\2'
damaged version.qcow2 4 '\0\0\0\4'
damaged clusters.qcow2 20 '\0\0\0\77'
damaged huge.qcow2 24 '\0177\0377\0377\0377\0377\0377\0\0'
damaged unmapped.qcow2 24 '\0\1\0\0\0\0\0\0'
damaged l1-long.qcow2 36 '\0377\0377\0377\0377'
damaged l1-beyond.qcow2 40 '\0100\0\0\0\0\0\0\0'
damaged l1-over.qcow2 40 '\0\0\0\0\0\1\0\0'
damaged l2-over.qcow2 196608 '\0200\0\0\0\0\2\0\0'
damaged counts-beyond.qcow2 48 '\0100\0\0\0\0\0\0\0'
damaged counts-self.qcow2 65536 '\0\0\0\0\0\1\0\0'
damaged corrupt.qcow2 72 '\0\0\0\0\0\0\0\2'
damaged unknown.qcow2 72 '\0100\0\0\0\0\0\0\0'
before=$(ls -A; sha256sum ./*.qcow2 disk masked.img)
cd ../scratch

failures=0
refused() { # STATUS TEXT ARG…: what `clone ARG…` has to end with and to say
  local status=$1 text=$2 actual attempt begin took problem=''
  shift 2
  for attempt in 1 2 3 4 5; do # the machine may be busy with other work
    actual=0 begin=$(date +%s%3N)
    timeout 20 "$CLONE" "$@" </dev/null >"$WORK/out" 2>"$WORK/error" || actual=$?
    took=$(($(date +%s%3N) - begin))
    ((took > 1000 && attempt < 5)) || break
    sleep 1
  done
  ((actual == status)) || problem="status $actual, not $status"
  (($(wc -l <"$WORK/error") == 1)) || problem+="; not one line"
  grep -q "^clone: error: .*$text" "$WORK/error" || problem+="; lacks '$text'"
  [[ ! -s $WORK/out ]] || problem+="; standard output: $(head -n 1 "$WORK/out")"
  ((took <= 1000)) || problem+="; took $took ms"
  [[ ! $(ls -A) ]] || { problem+="; left behind: $(ls -A)"; rm -rf -- ./*; }
  [[ ! $problem ]] || { failures=$((failures + 1)); echo "clone $*: ${problem#; }"; sed 's/^/    /' "$WORK/error"; }
}
run() { # the same for `clone run`, with a kernel that is good
  refused "$1" "$2" run --kernel ../inputs/kernel "${@:3}"
}

refused 2 "unknown command 'walk'; there are: run" walk
refused 2 '--kernel is missing' run
for file in missing empty truncated random; do refused 1 "kernel ../inputs/$file: " run --kernel ../inputs/$file; done
refused 1 'kernel ../inputs: .*directory' run --kernel ../inputs
run 1 'initrd.*../inputs/missing' --initrd ../inputs/missing
run 1 'initrd.*../inputs/empty' --initrd ../inputs/empty
run 1 'initrd.*../inputs: .*directory' --initrd ../inputs
run 1 'path=../inputs/missing: No such file' --block ../inputs/missing
run 1 'path=../inputs/empty: ' --block ../inputs/empty
run 1 'path=../inputs: .*directory' --block ../inputs
run 1 'path=../inputs/missing: No such file' --rootfs ../inputs/missing
run 1 "two devices hold the root file system" --rootfs ../inputs/disk --rootfs ../inputs/random
run 1 '--modules.*../inputs/missing' --rootfs ../inputs/disk --modules ../inputs/missing

for size in 0 1M 100T 1.5G big -1 16777217K 99999999999999999999; do run 2 "--mem: '$size' given; allowed is a size from 16M to 1T" --mem="$size"; done
run 1 'memory' --mem 16M
run 1 'initrd.* do not fit' --mem 80M --initrd /boot/initrd.img-"${KERNEL_GENERIC#*/vmlinuz-}"
for count in 0 1000 33 -1 many 1.5; do run 2 "--vcpus: '$count' given; allowed is a number from 1 to 32" --vcpus="$count"; done
run 2 "--grace: 'x' given; allowed is a number from 0 to 3600" --grace x
run 2 "--ksm: 'maybe' given; allowed are on, off" --ksm maybe
run 2 "--boot-protocol: 'efi' given; allowed are auto, linux64, pvh" --boot-protocol efi

run 2 '--frobnicate' --frobnicate
run 2 'surplus' surplus
run 2 '--vcpus: 1 required N missing' --vcpus
run 2 '--mem: 1 required SIZE missing' --mem=
run 2 "unknown device 'teleporter'; there are: .*virtio-blk" --device teleporter
run 2 "unknown transport 'teleporter'; there are: mmio" --transport teleporter
run 2 'teleporter: no plugin' --without teleporter
run 2 'virtio-blk.*path' --device virtio-blk
run 2 "virtio-blk: unknown option 'size'; there are: path" --block ../inputs/disk,size=3
run 2 "virtio-blk: queues=many: allowed is a number, 1 to 32" --block ../inputs/disk,queues=many
run 2 "virtio-blk: queues=33: allowed is a number, 1 to 32" --block ../inputs/disk,queues=33
run 2 "virtio-blk: readonly=perhaps: allowed are on and off" --block ../inputs/disk,readonly=perhaps
run 2 "virtio-blk: cache=never: allowed are writeback, none and unsafe" --block ../inputs/disk,cache=never
for size in 0 1 2000T fast; do run 2 "virtio-blk: bps=$size: allowed is a size .*, 4K to 1024T" --block ../inputs/disk,bps=$size; done
for number in 0 -1 1000000001 many; do run 2 "virtio-blk: iops=$number: allowed is a number, 1 to 1000000000" --block ../inputs/disk,iops=$number; done
run 1 'virtio-blk.*iops-burst=5: needs iops' --block ../inputs/disk,iops-burst=5
run 2 "virtio-blk: format=vmdk: allowed are auto, raw and qcow2" --rootfs ../inputs/disk,format=vmdk
run 2 "virtio-blk: backing=perhaps: allowed are on and off" --rootfs ../inputs/disk,backing=perhaps
run 2 "teleporter" --device teleporter,help

image() { # TEXT FILE[,OPTIONS] [ARG…]: as the root file system, which the message has to name
  run 1 "path=../inputs/${2%%,*}: $1" --rootfs "../inputs/$2" "${@:3}"
}
image 'is neither a regular file nor a block device' fifo
image "is not a qcow2 file: it does not begin with 'QFI'" raw.qcow2
image "is not a qcow2 file: it does not begin with 'QFI'" disk,format=qcow2
image 'begins like a qcow2 file, .*: say format=qcow2 or format=raw' masked.img
image 'begins like a qcow2 file, ' masked.img --overlay auto
image 'is too short for a qcow2 header' short.qcow2
image 'has an L1 table beyond the end of the file' truncated.qcow2
image "has the backing file 'disk'; backing=on lets it be opened" over.qcow2
image 'backing file ../inputs/removed: No such file or directory' orphan.qcow2,backing=on
image 'backing file ../inputs/loop-1.qcow2: the chain of backing files contains itself' loop-1.qcow2,backing=on
image 'backing file ../inputs/loop-1.qcow2: the chain of backing files contains itself' loop-1.qcow2,backing=on,readonly=on
image "has a backing file of the format 'vmdk'; supported are raw and qcow2" vmdk.qcow2,backing=on
image "has the backing file 'nbd://host/disk', which is no path" remote.qcow2,backing=on
image "does not say of which format its backing file 'disk' is" formless.qcow2,backing=on
image 'holds 1 internal snapshots, .*; allowed is readonly=on' snapshot.qcow2
image 'keeps its data in another file, which is not supported' external.qcow2
image 'is encrypted, which is not supported' encrypted.qcow2
image 'is of qcow2 version 4; supported are 2 and 3' version.qcow2
image 'has clusters of 2^63 bytes; supported are 2^9 to 2^21' clusters.qcow2
image 'has a disk of 9223372036854710272 bytes; at most 2^62 are possible' huge.qcow2
image 'has a disk of 281474976710656 bytes, more than its L1 table can map' unmapped.qcow2
image 'has an L1 table of more than 32 MiB' l1-long.qcow2
image 'has an L1 table beyond the end of the file' l1-beyond.qcow2
image 'has an L1 table that overlaps its refcount table' l1-over.qcow2
image 'has an L2 table that overlaps another table' l2-over.qcow2
image 'has a refcount table beyond the end of the file' counts-beyond.qcow2
image 'has a refcount block that overlaps another table' counts-self.qcow2
image 'is marked as damaged; `qemu-img check -r all` mends it' corrupt.qcow2
image 'uses a feature that is not known (incompatible feature bit 62)' unknown.qcow2
run 1 'path=/sys/devices/system/cpu/online: Permission denied (opened for writing; readonly=on' --block /sys/devices/system/cpu/online

run 2 '--overlay: needs --rootfs FILE' --overlay
overlay() { run 1 "$1" --rootfs "../inputs/$2" --overlay "${@:3}"; } # TEXT BASE [WHERE]
overlay 'overlay=tmpfs: allowed without readonly=on only' disk,readonly=on
overlay 'overlay=../inputs/new.qcow2: allowed without readonly=on only' disk,readonly=on ../inputs/new.qcow2
overlay 'overlay=../inputs/disk: is the base itself' disk ../inputs/disk
overlay 'overlay=../inputs: Is a directory' disk ../inputs
overlay 'overlay=../inputs/fifo: is neither a regular file nor a block device' disk ../inputs/fifo
overlay 'overlay=../inputs/missing/new.qcow2: its folder ../inputs/missing: No such file' disk ../inputs/missing/new.qcow2
overlay 'overlay=../inputs/truncated.qcow2: has an L1 table beyond the end of the file' disk ../inputs/truncated.qcow2
overlay 'overlay=../inputs/good.qcow2: has no base' disk ../inputs/good.qcow2
overlay 'overlay=../inputs/over.qcow2: is an overlay of ../inputs/disk, not of ../inputs/good.qcow2' good.qcow2 ../inputs/over.qcow2
equal "the images after all this" "$(cd ../inputs && ls -A && sha256sum ./*.qcow2 disk masked.img)" "$before"

profile() { refused "$1" "../inputs/$2" run --profile "../inputs/${2%%:*}"; }
profile 1 'missing.yaml: No such file'
profile 1 'broken.yaml:[12]:[0-9]*: '
profile 1 "unknown.yaml:2:1: unknown key 'memory'; allowed are "
profile 1 'type.yaml:3:3: mem: a single value is expected here'
profile 2 "value.yaml:2:8: vcpus: 'many' given; allowed is a number from 1 to 32"
profile 2 "option.yaml:3:5: device virtio-blk: unknown option 'size'; there are: path"
profile 1 'list.yaml:1:1: '
refused 1 'profile.*../inputs: .*directory' run --profile ../inputs

refused 1 "teleporter" plugin inspect teleporter
refused 2 'not expected: walk' plugin walk
refused 2 'list, inspect or check is required' plugin
refused 2 '--walk' doctor --walk
((failures == 0)) || fail "$failures of the rows above"
