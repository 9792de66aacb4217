# SPDX-License-Identifier: Apache-2.0
# `make run` as a user types it: a command's output and status, then a shell on a terminal, left with `exit`.
# seconds: 70
# host: no
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../../..")
unset MAKEFLAGS MAKELEVEL MFLAGS
ends_with 2 make -C "$root" --no-print-directory run CMD="uname -r; printf 'it'\\''s %s' \$((6 * 7)); exit 3" </dev/null >output 2>errors
cat output errors
equal "output" "$(tail -n 2 output)" "${KERNEL_CLOUD#*/vmlinuz-}"$'\n'"it's 42"
contains errors 'Error 3'

ROOT=$root python3 - <<'END'
import os
from terminal import Terminal

terminal = Terminal([os.environ["ROOT"] + "/scripts/run-debian"])
terminal.expect("root@clone:~# ", 200)
terminal.type("echo $((6 * 7))y; stty size; tty\r")
terminal.expect("42y")
terminal.expect("37 123")
terminal.expect("# ")
terminal.type("echo rea''dy; cat\r")
terminal.expect("ready\r\n")  # the shell's own mode is off
terminal.type("back\r")
terminal.expect("back\r\nback\r\n")  # typed, and from cat, which runs then
terminal.type("\x03")
terminal.expect("# ")
terminal.type("exit\r")
terminal.ends(0, 60)
END
