# SPDX-License-Identifier: Apache-2.0
"""A program on a pseudo-terminal of its own, for cases that type at it."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time


class Terminal:
    def __init__(self, command, **options):
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (37, 123))
        self.mode = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)), **options)  # the controlling terminal

    def _read(self, seconds):
        if select.select([self.master], [], [], seconds)[0]:
            data = os.read(self.master, 65536)
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            self.seen += data

    def expect(self, text, seconds=240):
        """Reads until `text` has come, and forgets all up to it."""
        end = time.monotonic() + seconds
        while text.encode() not in self.seen:
            if time.monotonic() > end:
                sys.exit(f"\nfailed: {text!r} did not come within {seconds} s")
            self._read(0.2)
        self.seen = self.seen.split(text.encode(), 1)[1]

    def type(self, text):
        os.write(self.master, text.encode())

    def kill(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def is_raw(self):
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def ends(self, status, seconds=120):
        """The program ends with `status` in time, with the terminal's mode as it was before."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > end:
                sys.exit(f"\nfailed: no end within {seconds} s")
            self._read(0.2)
        if self.process.returncode != status:
            sys.exit(f"\nfailed: status {self.process.returncode}, not {status}")
        if termios.tcgetattr(self.slave) != self.mode:
            sys.exit("\nfailed: the terminal's mode is not what it was")
