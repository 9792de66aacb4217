# SPDX-License-Identifier: Apache-2.0
# Ten idle machines on one base, with KSM on and a policy in a hurry: each gives memory back, equal pages are kept once, and
# what status says of them is what the kernel says. One of them gets busy and has its memory back at once. Nobody is killed.
# seconds: 90
export CLONE_RUNTIME_DIR=$WORK/run
agent=$(dirname "$CLONE")/../libexec/clone/clone-agent
root_image <<'END_OF_SCRIPT'
echo "root is up"
sleep 100000
END_OF_SCRIPT
debugfs -w -R "write $agent usr/sbin/clone-agent" root.ext4 2>/dev/null
debugfs -w -R "set_inode_field usr/sbin/clone-agent mode 0100755" root.ext4 2>/dev/null

policy=hysteresis,first-after=1,second-after=2,last-after=3,hold=2,flaps=100,check=5
for number in {1..10}; do
  "$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --overlay tmpfs --mem 128M --name "vm$number" --no-reboot --cmdline quiet \
    --balloon-policy "$policy" </dev/null >"console-$number.log" 2>&1 &
  within 60 contains "console-$number.log" "root is up"
  "$CLONE" pause "vm$number" # the test host has one processor, for the next one to boot
  echo "$number is up after $SECONDS s"
done
for number in {1..10}; do "$CLONE" resume "vm$number"; done
for number in {1..10}; do "$CLONE" exec --vm-id "vm$number" --timeout 30 -- true; done
echo "each has run a command after $SECONDS s"
python3 "$(dirname "${BASH_SOURCE[0]}")/../density.py" "$CLONE"
for number in {1..10}; do
  "$CLONE" exec --vm-id "vm$number" -- dmesg >messages
  ! grep -iE 'out of memory|killed process' messages || fail "vm$number: somebody was killed"
  contains messages 'Linux version' || contains messages 'Command line'
done
