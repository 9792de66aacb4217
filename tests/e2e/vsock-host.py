#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""vsock-host.py user|vhost DIRECTORY CID: the host's end of tests/e2e/cases/vsock.sh; see vsock-guest.c for the other."""

import array
import json
import os
import socket
import sys
import threading
import time
import zlib

backend, directory, cid = sys.argv[1], sys.argv[2], int(sys.argv[3])
PATH = os.path.join(directory, "vsock.sock")


def receive_all(stream):
    parts = []
    while part := stream.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def connect(port):
    if backend == "vhost":
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        stream.connect((cid, port))
        return stream
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(PATH)
    stream.sendall(b"CONNECT %d\n" % port)
    line = b""
    while not line.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte:
            raise ConnectionResetError(f"port {port}: closed after {line!r}")
        line += byte
    word, host_port = line.split()
    assert word == b"OK" and int(host_port) >= 1024, line
    return stream


def listen(port):
    if backend == "vhost":
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, port))
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{PATH}_{port}")
    listener.listen(64)
    return listener


def pattern(size):
    block = bytes((i * 7 + i // 256) & 255 for i in range(65536))
    return b"".join(block.translate(bytes((i + k) & 255 for i in range(256))) for k in range(size // 65536))


def call(method, parameters):
    control = socket.socket(socket.AF_UNIX)
    control.connect(os.path.join(directory, "control.sock"))
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
    control.sendall(json.dumps(request).encode() + b"\n")
    text, descriptors = b"", array.array("i")
    while not text.endswith(b"\n"):
        part, ancillary, _, _ = control.recvmsg(65536, socket.CMSG_SPACE(4 * descriptors.itemsize))
        assert part, text
        text += part
        for _, kind, data in ancillary:
            assert kind == socket.SCM_RIGHTS
            descriptors.frombytes(data)
    return json.loads(text), descriptors


# The guest dials as soon as it is there.
dialled = listen(7000)
stream, _ = dialled.accept()
data = receive_all(stream)  # until the guest has ended its direction
assert data == pattern(2 << 20), (len(data), "bytes from the guest")
stream.sendall(b"host says: %d bytes\n" % len(data))
stream.close()
print("guest to host: ok", flush=True)

for attempt in range(100):
    try:
        stream = connect(5003)
        break
    except OSError:
        time.sleep(0.1)
port = int(receive_all(stream))
assert port >= 1024, port

# Port without a listener.
try:
    connect(5500)
    raise SystemExit("a stream to a port that nobody listens on was accepted")
except OSError:
    pass

# Half-close: the answer comes after our direction has ended.
data = os.urandom(1 << 20)
stream = connect(5001)
stream.sendall(data)
stream.shutdown(socket.SHUT_WR)
answer = receive_all(stream).split()
assert int(answer[0], 16) == zlib.crc32(data) and int(answer[1]) == len(data), answer
print("half-close: ok", flush=True)

started = time.monotonic()
data = receive_all(connect(5002))
print(f"to the host: {len(data) / (time.monotonic() - started) / 1e6:.1f} MB/s", flush=True)
assert data == pattern(4 << 20), len(data)

# Both ways at once, more than is buffered anywhere.
stream = connect(5000)
data = os.urandom(4 << 20)
started = time.monotonic()
writer = threading.Thread(target=lambda: (stream.sendall(data), stream.shutdown(socket.SHUT_WR)))
writer.start()
echoed = receive_all(stream)
writer.join()
assert echoed == data, (len(echoed), "bytes of", len(data))
print(f"echo: {len(data) / (time.monotonic() - started) / 1e6:.1f} MB/s each way", flush=True)

# Many at once.
many = [connect(5000) for _ in range(120)]
for number, stream in enumerate(many):
    stream.sendall(b"%d" % number)
for number, stream in enumerate(many):
    expected = b"%d" % number
    got = b""
    while len(got) < len(expected):
        got += stream.recv(100)
    assert got == expected
for stream in many:
    stream.close()
print("many: ok", flush=True)

stream = connect(5000)
trips = []
for _ in range(200):
    started = time.monotonic()
    stream.sendall(b"x")
    assert stream.recv(1) == b"x"
    trips.append(time.monotonic() - started)
print(f"round trip: {sorted(trips)[100] * 1e6:.0f} us", flush=True)
stream.close()

# The control socket: streams of the VMM's own come from a port below 1024.
answer, descriptors = call("virtio-vsock.connect", {"port": 5003})
assert answer["result"] == {"port": 5003} and len(descriptors) == 1, answer
stream = socket.socket(fileno=descriptors[0])
stream.setblocking(True)
port = int(receive_all(stream))
assert 1 <= port < 1024, port
answer, descriptors = call("virtio-vsock.connect", {"port": 5501})
assert "does not accept streams to port 5501" in answer["error"]["message"] and not descriptors, answer
answer, _ = call("virtio-vsock.status", {})
assert answer["result"]["cid"] == cid and answer["result"]["backend"] == backend, answer
print("control: ok", flush=True)
connect(5099)
