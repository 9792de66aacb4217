# SPDX-License-Identifier: Apache-2.0
# Ten machines, listed while some of them die; each is found by name, id and process id; a name serves once.
# seconds: 5
# host: no
export CLONE_RUNTIME_DIR=$WORK/run
# A bare guest that waits for what is typed: it needs no more than KVM.
guest=$(realpath "$(dirname "$CLONE")/../guests/echo.elf")
trap 'for process in "${pids[@]}"; do kill -KILL "$process" 2>/dev/null || true; done' EXIT
pids=()
for number in {1..10}; do
  "$CLONE" run --kernel "$guest" --name "vm$number" --mem 96M </dev/null >"log-$number" 2>&1 &
  pids[number]=$!
done
listed() { (($("$CLONE" list --json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))') == $1)); }
within 60 listed 10
ends_with 1 "$CLONE" pause 2>err
contains err '10 VMs are running; say which by --vm-id: vm'
ends_with 1 "$CLONE" run --kernel "$guest" --name vm3 </dev/null 2>err
contains err "'vm3' is taken by the VM of process ${pids[3]}"
id=$("$CLONE" list --json | python3 -c 'import json, sys; print([v["id"] for v in json.load(sys.stdin) if v["name"] == "vm4"][0])')
"$CLONE" pause "$id"
equal "state" "$("$CLONE" list | awk '$3 == "vm4" { print $4 }')" paused
"$CLONE" resume "${pids[4]}"
equal "state" "$("$CLONE" list | awk '$3 == "vm4" { print $4 }')" running
# Listed while they die: never an error, never one that is dead for longer than a moment.
for number in 2 5 7 9; do
  kill -KILL "${pids[number]}"
  "$CLONE" list >listed
  "$CLONE" status >/dev/null
done
within 10 listed 6
! "$CLONE" list | grep -qE 'vm(2|5|7|9) ' || fail "a dead machine is listed"
# The next one clears what they left.
"$CLONE" run --kernel "$guest" --name vm2 --mem 96M </dev/null >log-2 2>&1 &
pids[2]=$!
within 20 listed 7
equal "directories" "$(ls "$CLONE_RUNTIME_DIR" | wc -l)" 7
# Asked by another user.
(setpriv --reuid 65534 --regid 65534 --clear-groups env CLONE_RUNTIME_DIR="$CLONE_RUNTIME_DIR" "$CLONE" list >other 2>&1) && fail "another user's list: $(<other)"
for number in 1 2 3 4 6 8 10; do "$CLONE" stop "vm$number" --force; done
equal "left" "$("$CLONE" list --json)" '[]'
