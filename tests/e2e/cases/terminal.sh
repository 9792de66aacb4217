# SPDX-License-Identifier: Apache-2.0
# On a terminal: typed input reaches the guest's shell, Ctrl-A X leaves with status 6, as SIGTERM does when the guest does
# not listen to the power button; the terminal's mode is put back each time.
# seconds: 15
python3 - <<'END'
import os
from terminal import Terminal

command = [os.environ["CLONE"], "run", "--kernel", os.environ["KERNEL_CLOUD"], "--initrd",
           os.environ["FIXTURES"] + "/busybox-initrd.cpio", "--cmdline", "quiet", "--grace", "1"]
for leave in (lambda t: t.type("\x01x"), lambda t: t.kill()):
    terminal = Terminal(command)
    terminal.expect("# ")
    assert terminal.is_raw()
    terminal.type("echo $((6 * 7))y; tty\r")
    terminal.expect("42y")
    terminal.expect("/dev/ttyS0")
    terminal.expect("# ")
    terminal.type("echo rea''dy; cat\r")
    terminal.expect("ready\r\n")  # the shell's own mode is off
    terminal.type("back\r")
    terminal.expect("back\r\nback\r\n")  # typed, and from cat, which runs then
    terminal.type("\x03")  # interrupts the guest's program, not clone
    terminal.expect("# ")
    leave(terminal)
    terminal.ends(6, 10)
END
