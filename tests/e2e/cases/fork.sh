# SPDX-License-Identifier: Apache-2.0
# A running guest is kept as a template and forked: processes, files, timers and the clock go on in each fork, and what one
# writes no other sees. Asked through the agent, inside.
# seconds: 170
export CLONE_RUNTIME_DIR=$WORK/run
root_image <<'END'
( n=0; while :; do n=$((n + 1)); echo $n >/run/ticks; sleep 0.1; done ) &
exec 9>/run/open; echo begun >&9
( while :; do sleep 1; echo more >&9; done ) &
echo "root is up"
while read -r line; do echo "typed: $line"; done
END
add_agent root.ext4
add_program root.ext4 "$FIXTURES/load" load
sum=$(sha256sum root.ext4)
store=(--store "$WORK/store")
goes_on() { # VM: its process counts, its timers fire, its disk and its clock answer
  local earliest latest told before after now
  earliest=$(date +%s)
  told=$(guest "$1" sh -c 'ticks() { n=; while [ -z "$n" ]; do n=$(cat /run/ticks); done; echo $n; } # it is empty while it is written
    before=$(ticks); sleep 1; now=$(date +%s)
    md5sum /bin/busybox >/dev/null && dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null || exit 1
    echo "$before $(ticks) $now"') || fail "$1: its disk"
  latest=$(date +%s) # what lies between is the way there and back
  read -r before after now <<<"$told"
  ((after > before)) || fail "$1: $before ticks, a second later $after"
  ((now >= earliest - 1 && now <= latest + 1)) || fail "$1: its clock says $now, between $earliest and $latest"
}
complaints() { guest "$1" dmesg | grep -E 'soft lockup|rcu.*stall|hung task|BUG|WARNING|clocksource.*unstable' || true; }

"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --overlay tmpfs --mem 128M --vcpus 2 --name source --no-reboot --cmdline quiet \
  </dev/null >console-source.log 2>&1 &
source=$!
within 60 contains console-source.log "root is up"
guest source sh -c 'echo before >/root/file'
complained=$(complaints source)
uptime=$(guest source cut -d. -f1 /proc/uptime)
"$CLONE" snapshot --name base "${store[@]}" source
goes_on source
echo "snapshot after $SECONDS s"
trap '(($? == 0)) || tail -n 12 console-*.log' EXIT
forks=()
for name in one two three; do # the third out of a pool
  cid=()
  [[ $name != two ]] || cid=(--cid 77)
  [[ $name != three ]] || "$CLONE" fork --template base "${store[@]}" --prepare 1
  "$CLONE" fork --template base "${store[@]}" --name $name "${cid[@]}" --timing </dev/null >console-$name.log 2>&1 &
  forks+=($!)
  within 30 guest $name true
  equal "$name: its file" "$(guest $name cat /root/file)" before
  guest $name sh -c "echo $name >/root/file"
  (($(guest $name cut -d. -f1 /proc/uptime) >= uptime)) || fail "$name: its uptime went backwards"
  echo "$name answers after $SECONDS s"
done
equal "processes of the pool: one is three, one is ready" "$(ps -o comm= --ppid "$(pgrep -x clone-pool -o)" | grep -c clone-pool)" 2
"$CLONE" fork --template base "${store[@]}" --prepare 0
for name in source one two three; do goes_on $name; done
equal "the source's file" "$(guest source cat /root/file)" before
for name in one two three; do equal "$name: its file" "$(guest $name cat /root/file)" $name; done
equal "two: its CID" "$(guest two /load cid)" 77
cids=$(for name in source one two three; do guest $name /load cid; done)
equal "different CIDs of ${cids//$'\n'/ }" "$(sort -u <<<"$cids" | grep -c '^[1-9]')" 4
# A fork of a fork, whose template goes while it runs.
"$CLONE" snapshot --name again --stop "${store[@]}" one
ends_with 6 wait "${forks[0]}"
"$CLONE" fork --template again "${store[@]}" --name four </dev/null >console-four.log 2>&1 &
forks[0]=$!
within 30 guest four true
"$CLONE" template rm again "${store[@]}"
goes_on four
equal "four: its file" "$(guest four cat /root/file)" one
for name in two three four; do
  equal "$name: complaints of its kernel" "$(complaints $name)" "$complained"
  "$CLONE" status | grep "^$name "
done
for name in source two three four; do "$CLONE" stop --grace 20 $name; done
ends_with 0 wait $source
for fork in "${forks[@]}"; do ends_with 0 wait "$fork"; done
equal "base" "$(sha256sum root.ext4)" "$sum"
