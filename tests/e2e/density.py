#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""density.py CLONE: what tests/e2e/cases/density.sh asks of ten idle machines that run; prints what it measures."""

import json
import os
import socket
import subprocess
import sys
import time

CLONE = sys.argv[1]
KSM = "/sys/kernel/mm/ksm/"
PAGE = 4096
MIB = 1 << 20
started = time.monotonic()


def say(text):
    print(f"{time.monotonic() - started:5.1f} s  {text}", flush=True)


def status():
    return json.loads(subprocess.run([CLONE, "status", "--json"], check=True, capture_output=True).stdout)


def until(seconds, what, function):
    end = time.monotonic() + seconds
    while not (answer := function()):
        if time.monotonic() > end:
            for vm in status()["vms"]:
                print(json.dumps({key: vm[key] for key in ("name", "guest", "balloon")}), stands_still(vm), flush=True)
            raise SystemExit(f"not in {seconds} s: {what}")
        time.sleep(0.3)
    return answer


def vcpu_ticks(pid):
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/stat") as file:
            name, _, fields = file.read().partition("(")[2].rpartition(")")
        if name == "vcpu0":
            return sum(int(field) for field in fields.split()[11:13])


def stands_still(vm):
    """Whether its processor runs at all, what its console ends with, and whether its agent answers after all."""
    before = vcpu_ticks(vm["pid"])
    time.sleep(2)
    with open(f"console-{vm['name'][2:]}.log", errors="replace") as file:
        end = file.read()[-200:]
    answer = subprocess.run([CLONE, "exec", "--vm-id", vm["id"], "--timeout", "5", "--", "cat", "/proc/loadavg"], capture_output=True, text=True)
    return f"{vcpu_ticks(vm['pid']) - before} ticks in 2 s; {answer.stdout + answer.stderr!r}; its console: {end!r}"


def ksm(name):
    with open(KSM + name) as file:
        return int(file.read())


def set_ksm(**values):
    for name, value in values.items():
        with open(KSM + name, "w") as file:
            file.write(str(value))


def host_used_mib():
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) / 1024


def figures(title):
    now = status()
    sums = {key: sum(vm["process"][key] or 0 for vm in now["vms"]) / MIB
            for key in ("resident_bytes", "private_bytes", "shared_bytes", "merged_bytes")}
    balloons = sorted(vm["balloon"]["balloon_bytes"] // MIB for vm in now["vms"])
    say(f"{title}: " + ", ".join(f"{key[:-6]} {value:.0f}" for key, value in sums.items())
        + f" MiB, balloons of {balloons[0]} to {balloons[-1]} MiB, KSM saves {now['host']['ksm_saved_bytes'] / MIB:.0f} MiB, "
        f"host memory used {host_used_mib():.0f} MiB")
    return now, sums


def control(vm):
    """A caller of the VM's control socket, which is quicker than a process for each call."""
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(os.path.join(os.environ["CLONE_RUNTIME_DIR"], vm["id"], "control.sock"))
    lines = stream.makefile("r")

    def call(method):
        stream.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": {}}).encode() + b"\n")
        return json.loads(lines.readline())["result"]
    return call


def smaps_private(pid):
    with open(f"/proc/{pid}/smaps") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))


figures("as they came up")
until(240, "every guest idle and its balloon filled",
      lambda: all(vm["guest"]["activity"] == "idle" and vm["balloon"]["balloon_bytes"] >= 16 * MIB for vm in status()["vms"]))
_, idle = figures("idle")
used_before = host_used_mib()

set_ksm(pages_to_scan=20000, sleep_millisecs=20, run=1)
first_scan, shared = ksm("full_scans"), 0
while ksm("full_scans") < first_scan + 2 or ksm("pages_sharing") > shared * 1.02:
    shared = ksm("pages_sharing")
    if time.monotonic() - started > 600:
        raise SystemExit(f"KSM does not settle: {shared} pages")
    time.sleep(1)
set_ksm(pages_to_scan=100)
now, merged = figures("merged")
saved = now["host"]["ksm_saved_bytes"] / MIB
assert now["host"]["ksm_runs"] and saved > 20, saved
assert all(vm["process"]["merged_bytes"] >= 2 * MIB for vm in now["vms"])
assert merged["private_bytes"] < idle["private_bytes"] - saved / 2, "what was merged is private no longer"
assert merged["private_bytes"] < 10 * 48, "each has less than 48 MiB of its own"
assert host_used_mib() < used_before - saved / 2, "the host has back what was merged"

# What status says of each is what the kernel's list of mappings says. They run: once of a few times it is the same moment.
for vm in now["vms"]:
    differences = []
    for _ in range(10):
        told = next(other for other in status()["vms"] if other["pid"] == vm["pid"])["process"]["private_bytes"]
        differences.append((smaps_private(vm["pid"]) - told) // PAGE)
        if abs(differences[-1]) <= 4:
            break
    else:
        raise SystemExit(f"{vm['name']}: private bytes of smaps and of status differ by so many pages: {differences}")
say("status and smaps agree")

# One gets busy, and uses more than it has left.
vm = now["vms"][4]
call = control(vm)
before = call("vm.balloon")["balloon_bytes"]
others = {other["pid"]: other["balloon"]["balloon_bytes"] for other in now["vms"] if other is not vm}
asked = time.monotonic()
execute = [CLONE, "exec", "--vm-id", vm["id"], "--"]
work = "dd if=/dev/zero of=/dev/fill bs=64k count=640 && exec dd if=/dev/urandom of=/dev/null bs=64k"
load = subprocess.Popen([*execute, "sh", "-c", work], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
moments = {}
while "has all of its memory" not in moments:
    guest, balloon, moment = call("vm.guest"), call("vm.balloon"), time.monotonic() - asked
    for what, happened in (("is told to be active", guest["activity"] == "active"), ("is given back", balloon["target_bytes"] == 0),
                           ("has all of its memory", balloon["balloon_bytes"] == 0)):
        if happened:
            moments.setdefault(what, moment)
    assert moment < 120, (guest, balloon)
    time.sleep(0.01)
say(f"balloon of {before // MIB} MiB, seconds after the command: " + ", ".join(f"{what} {at:.2f}" for what, at in moments.items()))
assert before >= 16 * MIB
assert moments["is given back"] - moments["is told to be active"] < 0.5
assert moments["has all of its memory"] - moments["is told to be active"] < 10  # eleven share one emulated processor
assert load.poll() is None
whole = f"while [ $(stat -c %s /dev/fill) -lt {40 * MIB} ]; do sleep 0.1; done"
subprocess.run([*execute, "sh", "-c", whole], check=True, timeout=240)
say("it has written 40 MiB")
load.terminate()
load.wait()
