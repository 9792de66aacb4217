# SPDX-License-Identifier: Apache-2.0
# A running guest is entered, asked, paused and stopped from outside: exec of every kind, copies, a terminal program, the
# console by two at once and by too many, disks frozen, the agent killed and back; machines that die are gone from the list.
# The same for streams that this process carries itself, with a client killed whose program takes no input.
# seconds: 180
export CLONE_RUNTIME_DIR=$WORK/run
root_image <<'END'
echo "root is up"
while read -r line; do echo "typed: $line"; done
END
add_agent root.ext4
mkfifo input
exec {input}<>input
"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --name web --no-reboot --cmdline quiet --vcpus 2 <&"$input" >console.log 2>&1 &
web=$!
within 60 contains console.log "root is up"
vm=web
guest() { "$CLONE" exec --vm-id $vm --timeout 30 "$@"; }
ask() { # METHOD [PARAMETERS]: what the VM answers
  python3 - $vm "$@" <<'PY'
import json, os, pathlib, socket, sys
name, method, *parameters = sys.argv[1:]
for file in pathlib.Path(os.environ["CLONE_RUNTIME_DIR"]).glob("*/vm.json"):
    if json.loads(file.read_text())["name"] == name:
        os.chdir(file.parent)
with socket.socket(socket.AF_UNIX) as control:
    control.connect("control.sock")
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": json.loads(*parameters) if parameters else {}}
    control.sendall(json.dumps(request).encode() + b"\n")
    print(json.loads(control.makefile().readline()))
PY
}
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

# Paused and resumed: who asks is told at once, then everything answers, and the clock is right.
"$CLONE" pause web
contains <("$CLONE" list) paused
started=$SECONDS
ends_with 125 "$CLONE" exec --vm-id web --timeout 60 -- true 2>err
contains err 'the machine is paused'
((SECONDS - started < 30)) || fail "it took $((SECONDS - started)) s to say that the machine is paused"
"$CLONE" resume web
within 20 guest -- true
difference=$(($(guest -- date +%s) - $(date +%s)))
((difference >= -2 && difference <= 2)) || fail "the guest's clock is off by $difference s"

# Disks are frozen for a time at most: then the agent thaws them by itself, and the host knows. Meanwhile: one too many at
# the console, and what goes on being told until it is interrupted.
contains <(ask guest-agent.freeze '{"limit_ms": 15000}') "'file_systems': 1"
contains <(ask guest-agent.status) "'frozen': True"
python3 - <<'PY'
import glob, os, socket, subprocess
os.chdir(os.path.dirname(glob.glob(os.environ["CLONE_RUNTIME_DIR"] + "/*/console.sock")[0]))
watchers = [socket.socket(socket.AF_UNIX) for _ in range(16)]
for watcher in watchers:
    watcher.connect("console.sock")
for command in ["attach"], ["logs", "-f"]:
    end = subprocess.run([os.environ["CLONE"], *command, "web"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert end.returncode == 1 and b"16 are attached" in end.stdout and b"closed the console" in end.stderr, end
PY
ends_with 124 timeout 4 "$CLONE" status --watch 0.2 >watched
(($(grep -c '^web  *running' watched) >= 2)) || fail "status --watch told $(grep -c running watched) times"
is_thawed() { contains <(ask guest-agent.status) "'frozen': False"; }
within 30 is_thawed
contains <(ask guest-agent.thaw) 'are not frozen'
guest -- touch /root/written
"$CLONE" logs --vmm web >vmm
contains vmm "the guest's file systems thaw"

# The agent is killed and back (the image's own init does not restart it; the one of the generated initrd does).
listener() { guest -- sh -c 'sed -n "s/^PPid:[^0-9]*//p" /proc/$PPID/status'; }
killed=$(listener)
((killed > 1)) || fail "the agent is process '$killed'"
guest -- sh -c 'kill -9 $(pidof clone-agent)' || true
within 30 guest -- true
next=$(listener)
[[ $next != "$killed" ]] && ((next > 1)) || fail "the agent is process '$next', and was $killed"

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

"$CLONE" logs -f web >followed &
follower=$!
echo 'to the followers' >&"$input"
within 20 contains followed 'typed: to the followers'
"$CLONE" stop web
ends_with 0 wait $web
ends_with 0 wait $follower

vm=user
"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --name user --no-reboot --cmdline quiet --device virtio-vsock,backend=user <&"$input" >console.log 2>&1 &
user=$!
within 60 guest -- true
contains <(ask virtio-vsock.status) "'backend': 'user'"
ends_with 7 guest -- sh -c 'exit 7'
head -c 4194304 large >part
equal "4 MiB out and back" "$(guest -i -- cat <part | sha256sum)" "$(sha256sum <part)"
"$CLONE" cp tree user:/root/again
"$CLONE" cp user:/root/again again
diff -r --no-dereference tree again
"$CLONE" exec --vm-id user --timeout 60 -i -- sleep 1000 </dev/zero &
client=$!
within 20 guest -- sh -c 'ps | grep -q "[s]leep 1000"'
sleep 3 # until nothing takes more of the input
kill -KILL $client
within 20 guest -- sh -c '! ps | grep -q "[s]leep 1000"'
"$CLONE" stop user
ends_with 0 wait $user
equal "VMs left" "$("$CLONE" list --json)" '[]'
equal "what is left behind" "$(ls "$CLONE_RUNTIME_DIR")" ''
