"""Carry IP packets between two TUN devices, each way after the same delay. A program of its own, one a link.

    python delay.py --here wan1 --there wan0 --namespace /run/netns/region-1 --delay-ms 40

TCP sees the delay as it would on a long line: handshakes, slow start and windows behave. (A proxy that ends the
connection would hide it from them.) The devices exist already; SIGTERM ends it with one line of JSON on stdout:
packets carried, CPU seconds, and how late the latest and the mean packet left.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Callable

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MOST_AT_ONCE = 64
"""Packets read from one side before the other gets its turn."""
LONGEST = 65_536


def open_tun(name: str) -> int:
    """Attach to a TUN device of the namespace that this process is in."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def enter(namespace: str) -> None:
    """Move this thread into a network namespace. (``os.setns`` is Python 3.12's.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(handle, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(handle)


class Line:
    """Packets under way in one direction, in order; each is due a fixed time after it came."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._under_way: deque[tuple[float, bytes]] = deque()
        self.carried, self.late_s, self.latest_s = 0, 0.0, 0.0

    def put(self, packet: bytes, now: float) -> None:
        self._under_way.append((now + self._delay_s, packet))

    @property
    def due(self) -> float:
        """When the next packet is due; infinity where none is under way."""
        return self._under_way[0][0] if self._under_way else float("inf")

    def deliver(self, now: float, send: Callable[[bytes], object]) -> None:
        """Send on what is due."""
        while self._under_way and self._under_way[0][0] <= now:
            due, packet = self._under_way.popleft()
            self.carried += 1
            self.late_s += now - due
            self.latest_s = max(self.latest_s, now - due)
            with contextlib.suppress(OSError):  # a device that is going down, or full: lost, as on a line
                send(packet)


def carry(ends: tuple[int, int], lines: tuple[Line, Line]) -> None:
    """For ever: ``lines[n]`` takes packets from ``ends[n]`` to the other end."""
    while True:
        wait_s = min(line.due for line in lines) - time.monotonic()
        readable, _, _ = select.select(ends, (), (), None if wait_s == float("inf") else max(0.0, wait_s))
        for end, line in zip(ends, lines, strict=True):
            if end in readable:
                _take(end, line)
        for line, other in zip(lines, reversed(ends), strict=True):
            line.deliver(time.monotonic(), lambda packet, other=other: os.write(other, packet))  # type: ignore[misc]


def _take(end: int, line: Line) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(MOST_AT_ONCE):
            line.put(os.read(end, LONGEST), time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", required=True, metavar="DEVICE")
    parser.add_argument("--there", required=True, metavar="DEVICE")
    parser.add_argument("--namespace", required=True, metavar="FILE", help="where the second device is")
    parser.add_argument("--delay-ms", type=float, required=True, help="each way")
    asked = parser.parse_args()

    def stop(number: int, frame: object) -> None:
        del number, frame
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lines = (Line(asked.delay_ms / 1000), Line(asked.delay_ms / 1000))
    here = open_tun(asked.here)
    enter(asked.namespace)
    there = open_tun(asked.there)
    print("{}", flush=True)
    try:
        carry((here, there), lines)
    finally:
        carried = sum(line.carried for line in lines)
        late_s = sum(line.late_s for line in lines) / max(1, carried)
        latest_s = max(line.latest_s for line in lines)
        report = {"packets": carried, "late_ms": 1000 * late_s, "latest_ms": 1000 * latest_s}
        print(json.dumps({**report, "cpu_s": time.process_time()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
