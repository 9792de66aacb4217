# SPDX-License-Identifier: Apache-2.0
# A running guest is entered, asked, paused and stopped from outside: exec of every kind, copies, a terminal program, the
# console by two at once, the agent killed and back; machines that die are gone from the list.
# seconds: 120
export CLONE_RUNTIME_DIR=$WORK/run
agent=$(dirname "$CLONE")/../libexec/clone/clone-agent
root_image <<'END'
echo "root is up"
while read -r line; do echo "typed: $line"; done
END
debugfs -w -R "write $agent usr/sbin/clone-agent" root.ext4 2>/dev/null
debugfs -w -R "set_inode_field usr/sbin/clone-agent mode 0100755" root.ext4 2>/dev/null
mkfifo input
exec {input}<>input
"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --name web --no-reboot --cmdline quiet --vcpus 2 <&"$input" >console.log 2>&1 &
web=$!
within 60 contains console.log "root is up"
guest() { "$CLONE" exec --vm-id web --timeout 30 "$@"; }
within 60 guest -- true
echo "the agent answers after $SECONDS s"

# Arguments, environment, directory, user, streams, exit status.
equal "output" "$(guest -- echo 'a  b' c)" 'a  b c'
equal "environment" "$(guest -e 'NAME=x y' -e HOME=/h -- sh -c 'echo "$NAME $HOME"')" 'x y /h'
equal "directory" "$(guest -w /usr/sbin -- pwd)" /usr/sbin
equal "user" "$(guest -- id -u)" 0
guest -- sh -c 'echo out; echo err >&2; exit 7' >out 2>err || equal "exit status" $? 7
equal "standard output" "$(<out)" out
equal "standard error" "$(<err)" err
ends_with 143 guest -- sh -c 'kill -TERM $$'
ends_with 127 guest -- /no/such/program 2>err
contains err /no/such/program
ends_with 126 guest -- /etc/passwd 2>err
equal "no input" "$(guest -- cat)" ''
equal "input" "$(echo hello | guest -i -- cat)" hello
head -c 20971520 /dev/urandom >large
equal "20 MiB out and back" "$(guest -i -- cat <large | sha256sum)" "$(sha256sum <large)"
equal "20 MiB of output" "$(guest -- head -c 20971520 /dev/zero | sha256sum)" "$(head -c 20971520 /dev/zero | sha256sum)"
started=$SECONDS
# What runs in the background is the program itself, so that signals reach it.
background=("$CLONE" exec --vm-id web --timeout 60)
for ((i = 0; i < 100; ++i)); do "${background[@]}" -- sh -c "echo $i; exit $i" >"many-$i" & jobs[i]=$!; done
for ((i = 0; i < 100; ++i)); do
  ends_with $i wait "${jobs[i]}"
  equal "exec $i" "$(<"many-$i")" $i
done
echo "100 at once took $((SECONDS - started)) s"

# A client that goes away takes its command with it; signals pass.
"${background[@]}" -- sh -c 'sleep 1000 & exec sleep 1001' &
client=$!
within 20 guest -- sh -c 'ps | grep -q "[s]leep 1001"'
kill -KILL $client
within 20 guest -- sh -c '! ps | grep -q "[s]leep 100"'
"${background[@]}" -- sh -c 'trap "echo got it; exit 9" TERM; echo ready; while :; do sleep 0.1; done' >signalled &
client=$!
within 20 contains signalled ready
kill -TERM $client
ends_with 9 wait $client
contains signalled 'got it'

# A terminal program, driven by tmux.
tmux -L e2e -f /dev/null new-session -d -x 90 -y 30 "$CLONE exec --vm-id web -t -i -- vi /tmp/note"
screen() { tmux -L e2e capture-pane -p | grep -qF -e "$1"; }
within 20 screen '/tmp/note'
equal "size in the guest" "$(guest -- sh -c 'stty size < $(readlink /proc/$(pidof vi)/fd/0)')" '30 90'
tmux -L e2e send-keys i 'written in vi' Escape
within 20 screen 'written in vi'
tmux -L e2e resize-window -x 70 -y 20
within 20 bash -c '[[ $("$CLONE" exec --vm-id web -- sh -c "stty size < \$(readlink /proc/\$(pidof vi)/fd/0)") == "20 70" ]]'
tmux -L e2e send-keys ':wq' Enter
within 20 bash -c '! tmux -L e2e has-session'
equal "the note" "$(guest -- cat /tmp/note)" 'written in vi'

# Files in and out.
mkdir -p 'tree/a b'
head -c 3000000 /dev/urandom >tree/random
ln -s ../random 'tree/a b/link'
chmod 750 'tree/a b'; touch -d '2001-02-03 UTC' tree/random
"$CLONE" cp tree web:/root/tree
equal "checksum in the guest" "$(guest -- sha256sum /root/tree/random | cut -d' ' -f1)" "$(sha256sum <tree/random | cut -d' ' -f1)"
"$CLONE" cp web:/root/tree back
diff -r --no-dereference tree back
equal "mode" "$(stat -c %a 'back/a b')" 750
equal "time" "$(stat -c %Y back/random)" "$(stat -c %Y tree/random)"
! "$CLONE" cp web:/no/such back2 2>err
contains err /no/such

# The console by two, of whom one types.
{ sleep 2; echo first; sleep 6; } | "$CLONE" attach web >first.log 2>&1 &
one=$!
sleep 1
{ sleep 2; echo second; sleep 3; } | "$CLONE" attach web >second.log 2>&1 &
two=$!
within 20 contains first.log 'typed: first'
within 20 contains second.log 'typed: first'
contains first.log 'root is up'
contains second.log "process $one types there already"
! grep -q 'typed: second' first.log
kill $one $two 2>/dev/null || true
"$CLONE" logs web >logs
contains logs 'typed: first'
python3 - <<'PY'
import os
from terminal import Terminal
terminal = Terminal([os.environ["CLONE"], "attach", "web"])
terminal.expect("Ctrl-Q leaves")
terminal.type("by hand\r")
terminal.expect("typed: by hand")
terminal.type("\x11")
terminal.ends(0)
PY

python3 - <<'PY'
import os
from terminal import Terminal
terminal = Terminal([os.environ["CLONE"], "attach", "--read-only", "web"])
terminal.expect("typed: by hand")
terminal.type("unheard\r")
terminal.type("\x11")
terminal.expect("left; the VM runs on")
terminal.ends(0)
PY
! "$CLONE" logs web | grep -q unheard

# Paused and resumed: nothing answers, then everything does, and the clock is right.
"$CLONE" pause web
contains <("$CLONE" list) paused
ends_with 125 "$CLONE" exec --vm-id web --timeout 2 -- true 2>err
contains err 2
"$CLONE" resume web
within 20 guest -- true
difference=$(($(guest -- date +%s) - $(date +%s)))
((difference >= -2 && difference <= 2)) || fail "the guest's clock is off by $difference s"

# The agent is killed and back (the image's own init does not restart it; the one of the generated initrd does).
guest -- sh -c 'kill -9 $(pidof clone-agent)' || true
within 30 guest -- true

# What is told of it.
"$CLONE" metrics web >metrics
for name in clone_uptime_seconds clone_memory_bytes clone_guest; do grep -q "^$name" metrics || fail "no metric $name"; done
within 20 bash -c '"$CLONE" status --json >status && python3 -c "
import json
vm = json.load(open(\"status\"))[\"vms\"][0]
assert vm[\"name\"] == \"web\" and vm[\"guest\"][\"connected\"] and vm[\"guest\"][\"available_bytes\"] > 50 << 20, vm
assert vm[\"process\"][\"private_bytes\"] <= vm[\"process\"][\"resident_bytes\"]
"'
"$CLONE" status | grep -q '^web  *running'

"$CLONE" stop web
ends_with 0 wait $web
equal "VMs left" "$("$CLONE" list --json)" '[]'
equal "what is left behind" "$(ls "$CLONE_RUNTIME_DIR")" ''
