# SPDX-License-Identifier: Apache-2.0
# A Debian guest of four processors that compiles, computes, reads its disk, writes to memory and watches its clocks is kept, whole
# and by what changed, and forked, while it does: all of it goes on without an error there and in each fork, also when the templates
# are gone.
# seconds: 150
export CLONE_RUNTIME_DIR=$WORK/run
numbers=$(busybox seq 1 1000 | busybox sort -r | busybox sha256sum)
{ echo 'int f0(int x) { return x; }'; for i in {1..200}; do echo "int f$i(int x) { return f$((i - 1))(x) * $i + x % $i; }"; done; } >source.c
tcc -c source.c -o object
object=$(busybox sha256sum <object)
root_image <<END
dd if=/dev/urandom of=/run/untouched bs=64k count=32 2>/dev/null
md5sum </run/untouched >/run/untouched.sum
/load 4 16 /run/load &
busybox=\$(md5sum </bin/busybox)
( cd /run
  cp /source.c .
  right=0 wrong=0
  while :; do
    [ "\$(seq 1 1000 | sort -r | gzip | gunzip | sha256sum)" = "$numbers" ] && right=\$((right + 1)) || wrong=\$((wrong + 1))
    rm -f object; tcc -c source.c -o object
    [ "\$(sha256sum <object)" = "$object" ] && right=\$((right + 1)) || wrong=\$((wrong + 1))
    echo 1 >/proc/sys/vm/drop_caches
    [ "\$(md5sum </bin/busybox)" = "\$busybox" ] && right=\$((right + 1)) || wrong=\$((wrong + 1))
    echo "right \$right wrong \$wrong" >/run/sums.new
    mv /run/sums.new /run/sums
    sleep 0.5
  done ) &
echo "root is up"
while read -r line; do :; done
END
add_agent root.ext4
add_program root.ext4 "$FIXTURES/load" load
add_with_libraries root.ext4 "$(command -v tcc)" usr/bin/tcc
debugfs -w -R "write source.c source.c" root.ext4 2>/dev/null
store=(--store "$WORK/store")
progress() { # VM: into passes, right and set_back, without an error
  local errors backwards wrong _
  read -r _ passes _ errors _ backwards _ set_back _ right _ wrong <<<"$(guest "$1" cat /run/load /run/sums | tr '\n' ' ')"
  equal "$1: errors in memory, clocks that went backwards, wrong sums" "$errors $backwards $wrong" "0 0 0"
}
tell_tasks() { # VM: what they wait for
  guest "$1" sh -c 'ps -o pid,ppid,stat,time,args; for task in /proc/[0-9]*; do echo "$task: $(cat $task/wchan)"; cat $task/stack; done
    cat /proc/interrupts /proc/diskstats; dmesg | tail' >&2
}
works() { # VM
  local passes right wanted_passes wanted_right end=$((SECONDS + 120))
  progress "$1"
  wanted_passes=$((passes + 3)) wanted_right=$((right + 3))
  until progress "$1"; ((passes >= wanted_passes && right >= wanted_right)); do
    ((SECONDS < end)) || { tell_tasks "$1"; fail "$1: $passes passes, $right sums are not $wanted_passes and $wanted_right"; }
    sleep 0.3
  done
  echo "$1: $passes passes, $right sums after $SECONDS s"
}
is_sound() { # VM PROCESS: and ends
  works $1
  guest $1 sh -c 'md5sum </run/untouched | cmp - /run/untouched.sum'
  equal "$1: complaints of its kernel" "$(guest $1 dmesg | grep -E 'BUG|Oops|corrupt|EXT4-fs error|I/O error|soft lockup|clocksource.*unstable' || true)" ""
  "$CLONE" stop --force $1
  ends_with 6 wait $2
}

"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --overlay tmpfs --mem 128M --mem-backing memfd --vcpus 4 --name source --no-reboot \
  --cmdline quiet </dev/null >console-source.log 2>&1 &
source=$!
within 120 contains console-source.log "root is up"
echo "up after $SECONDS s"
within 30 guest source test -e /run/sums
works source
"$CLONE" snapshot --name whole "${store[@]}" source
works source
"$CLONE" snapshot --name changed --incremental "${store[@]}" source
works source
# One at a time beside the source: the test host has one processor for all of theirs.
for name in changed whole; do
  "$CLONE" fork --template $name "${store[@]}" --name $name </dev/null >console-$name.log 2>&1 &
  fork=$!
  within 60 guest $name true
  "$CLONE" template rm $name "${store[@]}"
  is_sound $name $fork
done
"$CLONE" fork --from source --name live </dev/null >console-live.log 2>&1 &
fork=$!
within 60 guest live true
is_sound live $fork
is_sound source $source
equal "times that the source's wall clock went back" $set_back 0
