# SPDX-License-Identifier: Apache-2.0
# Bad input: one line on standard error that names the thing, status 1 or 2, within a second, nothing left behind.
# seconds: 8
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
run 2 "teleporter" --device teleporter,help

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
