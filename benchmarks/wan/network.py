"""A hub and regions in network namespaces of their own, each region behind one slow, long link to the hub.

Whoever uses this runs inside ``private``: in new network, mount and process namespaces, which the kernel takes away
with all devices and processes once their first process has ended, however that comes.

    hub, 10.77.0.1   wan1 ──tbf──▶ delay.py ◀──tbf── wan0   region-1, 10.77.1.2
                     wan2 ──tbf──▶ delay.py ◀──tbf── wan0   region-2, 10.77.2.2

The rate is held by ``tc tbf`` at both ends of a link, the delay by ``delay.py`` (netem is not in every kernel).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

__all__ = ["HUB", "Link", "Network", "in_namespace", "missing", "opened", "private"]

HUB = "10.77.0.1"
NETNS = Path("/run/netns")
DELAY = Path(__file__).with_name("delay.py")
TICK_S = 0.004
"""Most seconds between two ticks of a kernel's clock: a bucket holds at least what passes in one."""
QUEUE_MS = 200
"""Longest that a packet waits in the link's queue before it is dropped."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What lies between a region and the hub."""

    rate_mbit: float
    """Each way, in 10^6 bits a second."""
    rtt_ms: float
    """There and back, without the time in queues."""

    @property
    def bytes_per_s(self) -> float:
        return self.rate_mbit * 1e6 / 8

    @property
    def burst_bytes(self) -> int:
        return max(16 * 1024, int(2 * TICK_S * self.bytes_per_s))


def missing() -> str:
    """What this machine lacks for it; empty where it lacks nothing."""
    if sys.platform != "linux":
        return "Linux"
    if os.geteuid():
        return "root, for network namespaces"
    tools = [tool for tool in ("ip", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} (iproute2, util-linux)"
    return "" if Path("/dev/net/tun").exists() else "/dev/net/tun"


def private(command: Sequence[str]) -> int:
    """Run ``command`` as the first process of new namespaces; Ctrl-C and SIGTERM reach it as SIGTERM, once.

    Asked twice, or when this process dies, all of it is killed. Returns its exit status.
    """
    options = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    process = subprocess.Popen(["unshare", *options, "--", *command], start_new_session=True)
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        if children and len(asked) == 1:
            children[0].send_signal(signal.SIGTERM)
        elif process.poll() is None:
            process.kill()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if asked else status


def in_namespace(name: str, command: Sequence[str]) -> list[str]:
    """``command``, to be run inside a namespace; the hub's is the one that we are in (empty name)."""
    return ["ip", "netns", "exec", name, *command] if name else list(command)


class Network:
    """The open links; ``bytes_moved`` reads the kernel's own counters."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.regions: list[str] = []
        self._carriers: list[subprocess.Popen[str]] = []

    def add_region(self) -> str:
        """Make the next region's namespace and its link to the hub; returns its name."""
        number = len(self.regions) + 1
        name, device = f"region-{number}", f"wan{number}"
        _run("ip", "netns", "add", name)
        _run("ip", "tuntap", "add", "dev", device, "mode", "tun")
        _run(*in_namespace(name, ("ip", "tuntap", "add", "dev", "wan0", "mode", "tun")))
        self._carry(device, name)
        self._configure("", device, f"10.77.{number}.1", f"10.77.{number}.2")
        self._configure(name, "wan0", f"10.77.{number}.2", f"10.77.{number}.1")
        _run(*in_namespace(name, ("ip", "link", "set", "lo", "up")))
        _run(*in_namespace(name, ("ip", "route", "add", "default", "dev", "wan0")))
        self.regions.append(name)
        return name

    def _carry(self, device: str, namespace: str) -> None:
        options = ("--here", device, "--there", "wan0", "--namespace", str(NETNS / namespace))
        command = [sys.executable, str(DELAY), *options, "--delay-ms", str(self.link.rtt_ms / 2)]
        carrier = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._carriers.append(carrier)
        assert carrier.stdout is not None
        if carrier.stdout.readline() != "{}\n":
            raise RuntimeError(f"the link of {namespace} did not come up")

    def _configure(self, namespace: str, device: str, own: str, peer: str) -> None:
        link = self.link
        shape = ("rate", f"{link.rate_mbit:g}mbit", "burst", str(link.burst_bytes), "latency", f"{QUEUE_MS}ms")
        for command in (
            ("ip", "address", "add", own, "peer", peer, "dev", device),
            ("ip", "link", "set", device, "up"),
            ("tc", "qdisc", "add", "dev", device, "root", "tbf", *shape),
        ):
            _run(*in_namespace(namespace, command))

    def bytes_moved(self) -> dict[str, tuple[int, int]]:
        """By region: IP bytes that came up from it, and that went down to it, so far."""
        listed = json.loads(_run("ip", "-json", "-statistics", "link", "show"))
        stats = {device["ifname"]: device["stats64"] for device in listed}
        return {
            name: (stats[f"wan{number}"]["rx"]["bytes"], stats[f"wan{number}"]["tx"]["bytes"])
            for number, name in enumerate(self.regions, 1)
        }

    def close(self) -> list[dict[str, Any]]:
        """End the links; what each carrier has to say about itself. Asked again: nothing more."""
        reports = []
        for carrier in self._carriers:
            carrier.terminate()
            said, _ = carrier.communicate(timeout=10)
            reports += [json.loads(line) for line in said.splitlines()]
        self._carriers.clear()
        return reports


@contextlib.contextmanager
def opened(link: Link, regions: int) -> Iterator[Network]:
    """The hub and so many regions. Once inside one ``private``: what is made here goes with its namespaces."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "replace", f"{HUB}/32", "dev", "lo")
    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")  # its own chatter would be counted
    NETNS.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "tmpfs", str(NETNS))
    network = Network(link)
    try:
        for _ in range(regions):
            network.add_region()
        yield network
    finally:
        network.close()


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if ended.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout
