#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""In the test host: boots the images that rootfs-create.sh made, from /dev/vda on in this order, and asks each guest.

usage: rootfs-boots.py NAME[,OPTION=VALUE]…   (debian, alpine, container, folder: what each disk holds; options of the disk)"""
import json
import os
import re
import subprocess
import sys
import time

from terminal import Terminal

CLONE = os.environ["CLONE"]
KERNEL = os.environ["KERNEL_CLOUD"]


class Guest(Terminal):
    def __init__(self, number, name, options=""):
        self.begin, self.name = time.monotonic(), name
        super().__init__([CLONE, "run", "--kernel", KERNEL, "--mem", "512M", "--rootfs",
                          f"/dev/vd{'abcdefgh'[number]}{options}", "--cmdline", "quiet"])

    def log_in(self, hostname):
        self.expect(f"{hostname} login: ")
        print(f"\n{self.name}: login after {time.monotonic() - self.begin:.0f} s", flush=True)
        self.type("root\r")
        self.prompt()

    def prompt(self):
        self.expect("# ")

    def ask(self, command, expected, seconds=240):
        """What the command prints has to match the regular expression as a whole."""
        self.type(f"stty cols 500 -echo 2>/dev/null; echo; echo 'be''gin'; {command}; echo 'e''nd'; stty echo 2>/dev/null\r")
        self.expect("begin\r\n", seconds)
        end = time.monotonic() + seconds
        while b"end\r\n" not in self.seen and time.monotonic() < end:
            self._read(0.2)
        answer = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen.split(b"end\r\n")[0].decode(errors="replace")).replace("\r", "").strip()
        if not re.fullmatch(expected, answer, re.DOTALL):
            sys.exit(f"\nfailed: {self.name}: {command}: {answer!r} does not match {expected!r}")
        self.prompt()
        return answer

    def power_off(self, command="poweroff"):
        self.type(command + "\r")
        self.ends(0, 90)


def clone(expected, *arguments, status=0, text=None):
    """What a command prints has to match as a whole."""
    done = subprocess.run([CLONE, *arguments], input=text or "", capture_output=True, text=True, timeout=480)
    if done.returncode != status or not re.fullmatch(expected, done.stdout, re.DOTALL):
        sys.exit(f"\nfailed: clone {' '.join(arguments)}: status {done.returncode}, {done.stdout!r}, {done.stderr!r}; not {status}, {expected!r}")


def ask_agent():
    """The agent in a stock user space: users, streams, status, a terminal, files, what it tells."""
    clone("root /root\n", "exec", "--", "sh", "-c", "echo $(id -un) $PWD")
    clone("daemon\n", "exec", "--user", "daemon", "--", "id", "-un")
    clone("A B\n", "exec", "-i", "--", "tr", "a-z", "A-Z", text="a b\n")
    clone("", "exec", "--", "sh", "-c", "exit 7", status=7)
    clone("", "exec", "--", "sh", "-c", "kill -9 $$", status=137)
    terminal = Terminal([CLONE, "exec", "-t", "--", "tty"])
    terminal.expect("/dev/pts/")
    terminal.ends(0)
    clone(".*", "cp", "/usr/share/common-licenses/GPL-3", ":/tmp/licence")
    clone(".*", "cp", ":/tmp/licence", "licence")
    if open("licence").read() != open("/usr/share/common-licenses/GPL-3").read():
        sys.exit("\nfailed: the file that went into the guest and back differs")
    vm = json.loads(subprocess.run([CLONE, "status", "--json"], check=True, capture_output=True).stdout)["vms"][0]
    told = vm["guest"]
    if not (told["connected"] and 10 < told["process_count"] < 300 and 400 << 20 < told["total_bytes"] < 512 << 20
            and told["pressure_some_permille"] is not None):
        sys.exit(f"\nfailed: what the agent tells: {told}")


def debian(guest):
    guest.log_in("web")
    guest.ask("systemctl is-system-running --wait; systemctl --failed --no-legend", "running", 240)
    guest.ask("cat /proc/1/comm", "systemd")
    guest.ask("hostname; tty", "web\n/dev/ttyS0")
    guest.ask("ip -o addr show lo", ".*127.0.0.1/8.*")
    guest.ask("systemctl is-enabled systemd-networkd; systemctl is-active systemd-networkd", "enabled\nactive")
    guest.ask("systemctl is-active clone-agent", "active")
    guest.ask("systemctl is-active ssh; ls /etc/ssh/ssh_host_*_key | wc -l", "active\n3")
    guest.ask("stat -c '%a %U' /root/.ssh /root/.ssh/authorized_keys; cat /root/.ssh/authorized_keys",
              "700 root\n600 root\nssh-ed25519 AAAA.* test")
    guest.ask("wc -c </etc/machine-id; dpkg -l less | grep -c ^ii", "33\n1")
    guest.ask("dpkg --verify; dpkg --audit", "")
    ask_agent()
    stop = subprocess.Popen([CLONE, "stop", "--grace", "120"], stdin=subprocess.DEVNULL)
    guest.ends(0, 120)
    if stop.wait() != 0:
        sys.exit(f"\nfailed: clone stop: {stop.returncode}")


def alpine(guest):
    guest.log_in("alp")
    guest.ask("cat /proc/1/comm; hostname; tty", "init\nalp\n/dev/ttyS0")
    guest.ask("rc-status -s default 2>/dev/null; rc-service clone-agent status", ".*started")
    guest.ask("tail -n 1 /root/agent-mark", r"agent ran under \d+")
    guest.ask("cat /root/post-install /root/trigger", "1.36.1-r2\n/bin /sbin")
    guest.ask("ls /lib/apk/db/clone-first-boot /sbin/init.packaged 2>&1 | grep -c 'No such'; readlink /sbin/init", "2\n/bin/busybox")
    guest.ask("ip -o addr show lo", ".*127.0.0.1/8.*")
    guest.ask("cat /usr/share/hello/text; cat /etc/apk/world", "Hello of 2.10\nalpine-base\nhello")
    guest.ask("stat -c '%a %U' /etc/shadow", "640 root")
    guest.power_off()


def container(guest):
    guest.prompt()
    guest.ask("cat /proc/1/comm; hostname; tty; pwd", "init\nbox\n/dev/(console|ttyS0)\n/srv/app")
    guest.ask("echo $GREETING; cat lower upper", "hello from the image\nlower layer\nupper layer")
    guest.ask("ls /srv/gone /srv/opaque", "ls: /srv/gone: No such file or directory\n/srv/opaque:\nnew")
    guest.ask("stat -c '%a %u:%g' /srv/owned; ls /etc/passwd.wh 2>&1 | wc -l", "4755 1234:5678\n1")
    guest.ask("ip -o addr show lo", ".*127.0.0.1/8.*")
    guest.ask("grep -m 1 'under 1$' /root/agent-mark; mount | grep -c -E ' on /(proc|sys|dev|run|dev/pts|dev/shm) '", "agent ran under 1\n6")
    guest.type("sleep 100\r")  # a controlling terminal: Ctrl-C ends it
    time.sleep(1)
    guest.type("\x03")
    guest.prompt()
    guest.type("exit\r")  # and the shell comes again
    guest.prompt()
    guest.ask("ps | grep -c '[s]leep 100'", "0")
    guest.power_off()


def container_button(guest):
    guest.prompt()
    guest.kill()  # SIGTERM: clone presses the power button
    guest.ends(0, 30)


def folder(guest):
    guest.expect("tree-begin\r\n")
    end = time.monotonic() + 120
    while b"tree-end\r\n" not in guest.seen and time.monotonic() < end:
        guest._read(0.2)
    listed = guest.seen.split(b"tree-end\r\n")[0].replace(b"\r", b"")
    expected = open("folder.list", "rb").read()
    if listed != expected:
        open("/tmp/listed", "wb").write(listed)
        os.system("diff folder.list /tmp/listed")
        sys.exit("failed: folder: the guest's files differ")
    guest.ends(0, 30)


for number, argument in enumerate(sys.argv[1:]):
    name, comma, options = argument.partition(",")
    globals()[name](Guest(number, name, comma + options))
    if name == "container":
        container_button(Guest(number, name))
