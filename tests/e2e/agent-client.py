# SPDX-License-Identifier: Apache-2.0
"""agent-client.py CID: asks the agent of a guest for everything, over this host's own vsock."""
import random
import socket
import struct
import sys
import threading
import time

CID, PORT = int(sys.argv[1]), 1000
HELLO, ERROR, DONE, WATCH, REPORT = 0x01, 0x02, 0x03, 0x10, 0x11
EXEC, STARTED, INPUT, OUTPUT, ERRORS, EXITED = 0x20, 0x21, 0x22, 0x23, 0x24, 0x27
POWER, IDENTITY, FREEZE, COPY_IN, ENTRY, DATA, COPY_END = 0x30, 0x31, 0x32, 0x40, 0x42, 0x43, 0x44


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<I", len(value)) + value


class Connection:
    def __init__(self, privileged=True, limit=60):
        end = time.monotonic() + limit
        while True:
            self.socket = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            self.socket.settimeout(30)
            try:
                port = random.randrange(512, 1024) if privileged else random.randrange(2000, 9000)
                self.socket.bind((socket.VMADDR_CID_ANY, port))
                self.socket.connect((CID, PORT))
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        if privileged:
            self.send(HELLO, struct.pack("<IHH", 0x414E4C43, 1, 0) + text("test"))
            kind, payload = self.receive()
            assert kind == HELLO and payload[:6] == b"CLNA\x01\x00", (kind, payload)

    def send(self, kind, payload=b""):
        self.socket.sendall(struct.pack("<IHH", len(payload), kind, 0) + payload)

    def bytes(self, count):
        parts = bytearray()
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            assert part, "the agent closed the connection"
            parts += part
        return bytes(parts)

    def receive(self):
        size, kind, flags = struct.unpack("<IHH", self.bytes(8))
        assert flags == 0 and size <= 65536
        return kind, self.bytes(size)

    def answer(self):
        kind, payload = self.receive()
        assert kind == DONE, (kind, payload)
        return payload

    def feed(self, given):
        for at in range(0, len(given), 65536):
            self.send(INPUT, given[at:at + 65536])
        self.send(INPUT)

    def run(self, *arguments, directory="/", user="", given=None):
        words = [text(word) for word in arguments]
        self.send(EXEC, struct.pack("<IHH", 2 if given is not None else 0, 0, 0) + text(user) + text(directory)
                  + struct.pack("<I", len(words)) + b"".join(words) + struct.pack("<I", 0))
        if given is not None:
            threading.Thread(target=self.feed, args=(given,)).start()
        output = bytearray()
        while True:
            kind, payload = self.receive()
            if kind == OUTPUT:
                output += payload
            elif kind == EXITED:
                code, signal = struct.unpack("<II", payload)
                return bytes(output), code, signal
            else:
                assert kind in (STARTED, ERRORS), (kind, payload)

    def ask(self, script):
        output, code, signal = self.run("sh", "-c", script)
        assert (code, signal) == (0, 0), (script, output, code, signal)
        return output.decode().strip()


def least_ms(count, action):
    best = 1e9
    for _ in range(count):
        start = time.monotonic()
        action()
        best = min(best, (time.monotonic() - start) * 1000)
    return best


connection = Connection()
print("agent answers", connection.ask("echo yes"), flush=True)

stranger = Connection(privileged=False)
try:
    assert stranger.socket.recv(1) == b"", "an unprivileged port is served"
except ConnectionResetError:
    pass
print("unprivileged port closed")

output, code, _ = connection.run("sh", "-c", "head -c 20971520 /dev/zero; exit 7")
assert len(output) == 20971520 and not output.strip(b"\0") and code == 7
sent = random.randbytes(3000000)
assert connection.run("cat", given=sent)[0] == sent
print("20 MiB out, 3 MB in and out, whole")


def echo():
    connection.send(0x7777)
    kind, payload = connection.receive()
    assert kind == ERROR and payload[:4] == struct.pack("<I", 38)


def programs(count):
    connection.ask(f"i=0; while [ $i -lt {count} ]; do /bin/true; i=$((i+1)); done")


print(f"a program of the guest's shell: {(least_ms(5, lambda: programs(11)) - least_ms(5, lambda: programs(1))) / 10:.2f} ms")
print(f"least of 15: echo {least_ms(15, echo):.2f} ms, exec of true {least_ms(15, lambda: connection.run('true')):.2f} ms, "
      f"with a new connection {least_ms(15, lambda: Connection().run('true')):.2f} ms")

connection.send(IDENTITY, struct.pack("<I", 1 | 4 | 8 | 16) + text("renamed") + struct.pack("<Q", CID) + text(random.randbytes(64))
                + struct.pack("<Q", 4102444800 * 10**9))
connection.answer()
assert connection.ask("hostname; date -u +%Y") == "renamed\n2100"
print("identity and clock set")

connection.send(COPY_IN, struct.pack("<I", 0) + text("/copied"))
connection.send(ENTRY, struct.pack("<IIIqIQ", 0o100755, 0, 0, 1000000000, 0, len(sent)) + text("") + text(""))
for at in range(0, len(sent), 65536):
    connection.send(DATA, sent[at:at + 65536])
connection.send(COPY_END)
connection.answer()
assert connection.run("cat", "/copied")[0] == sent
assert connection.ask("stat -c '%a %Y' /copied") == "755 1000000000"
print("a file copied")

connection.send(FREEZE)
assert connection.answer() == struct.pack("<I", 0)  # there is no disk
watcher = Connection()
watcher.send(WATCH, struct.pack("<I", 60000))
watcher.receive()
# Idle may take a while after all this; then work makes it active within a second or so.
watcher.socket.settimeout(60)
kind, payload = watcher.receive()
idle = struct.unpack_from("<I", payload)[0]
if idle == 1:
    worker = Connection()
    start = time.monotonic()
    worker.send(EXEC, struct.pack("<IHH", 0, 0, 0) + text("") + text("/") + struct.pack("<I", 3) + text("sh") + text("-c")
                + text("while :; do :; done") + struct.pack("<I", 0))
    kind, payload = watcher.receive()
    assert kind == REPORT and struct.unpack_from("<I", payload)[0] == 2
    print(f"idle, and active {time.monotonic() - start:.1f} s after work began")
    worker.socket.close()

first = connection.ask("cat /agent.pid")
connection.ask(f"kill -9 {first}")
start = time.monotonic()
again = Connection()
print("the second agent answers:", again.ask("echo yes"), f"after {time.monotonic() - start:.1f} s")
assert connection.ask("echo still") == "still"
print("the old conversation goes on")

again.send(POWER, struct.pack("<I", 1))
again.answer()
print("reboot asked for", flush=True)
