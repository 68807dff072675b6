"""Simulated hosts on one machine: network namespaces with addresses of their own, linked to one switch.

They are in a user namespace, so no privileges are needed, and they vanish with the process that made them. A link is a
pair of TAP devices and a process that forwards each frame after the link's latency, as ``tc qdisc netem`` would do,
which not every kernel has. ``python -m tests.hosts SECONDS TAP TAP …`` forwards frames between each two of the devices.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NETWORK = "10.77.0"
TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MAX_FRAME = 65_536


def what_forbids() -> str | None:
    """Why this machine cannot simulate hosts; None where it can."""
    attempt = "ip link add name switch type bridge && ip tuntap add dev wire mode tap"
    try:
        done = subprocess.run([*_alone("--net", user=True), "sh", "-c", attempt], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"network namespaces need {error.filename}"
    told = done.stderr.strip().splitlines()
    return f"no network namespaces here: {told[-1] if told else 'unshare failed'}" if done.returncode else None


class Hosts:
    """Hosts that reach each other over one switch.

    Args:
        names: One name for each host.
        latency: Seconds that a frame takes on each link, each way; there are two links between two hosts.
        stack: Removes the hosts when it is closed.
    """

    def __init__(self, names: Sequence[str], latency: float, stack: ExitStack) -> None:
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._switch = stack.enter_context(_namespace(_alone("--net", user=True)))
        self._run("ip link add name switch type bridge", "ip link set switch up")
        self._namespaces = {
            name: stack.enter_context(_namespace([*_enter(self._switch), *_alone("--net")])) for name in names
        }
        taps = [tap for number in self._numbers.values() for tap in (f"host{number}", f"port{number}")]
        carrier = [*_enter(self._switch), sys.executable, "-m", "tests.hosts", str(latency), *taps]
        stack.enter_context(_attached(carrier, Path(__file__).parents[1]))
        for name, number in self._numbers.items():
            self._run(
                f"ip link set host{number} netns {self._namespaces[name]}",
                f"ip link set port{number} master switch up",
            )
            address = f"ip addr add {self.address(name)}/24 dev host{number}"
            self._run("ip link set lo up", address, f"ip link set host{number} up", on=self._namespaces[name])

    def address(self, name: str) -> str:
        """A host's address."""
        return f"{NETWORK}.{self._numbers[name]}"

    def enter(self, name: str) -> list[str]:
        """Prefix of a command line that runs it on a host."""
        return _enter(self._namespaces[name])

    @contextmanager
    def cut_off(self, name: str) -> Iterator[None]:
        """Disconnects a host from the switch for the time of the ``with`` block."""
        self._run(f"ip link set port{self._numbers[name]} down")
        try:
            yield
        finally:
            self._run(f"ip link set port{self._numbers[name]} up")

    def _run(self, *commands: str, on: int | None = None) -> None:
        for command in commands:
            subprocess.run([*_enter(on or self._switch), *command.split()], check=True)


@contextmanager
def hosts(*names: str, latency: float = 0.0) -> Iterator[Hosts]:
    """Makes hosts for the time of the ``with`` block."""
    with ExitStack() as stack:
        yield Hosts(names, latency, stack)


def _alone(*namespaces: str, user: bool = False) -> list[str]:
    return ["unshare", *(["--user", "--map-root-user"] if user else []), *namespaces]


def _enter(namespace: int) -> list[str]:
    return ["nsenter", "--target", str(namespace), "--user", "--net", "--preserve-credentials"]


@contextmanager
def _namespace(unshare: list[str]) -> Iterator[int]:
    """Keeps a namespace; yields the id of a process in it."""
    with _attached([*unshare, "sh", "-c", "echo; exec cat"]) as process:
        yield process


@contextmanager
def _attached(command: list[str], folder: Path | None = None) -> Iterator[int]:
    """Runs a process that prints a line when it is ready and ends when its standard input is closed."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline(), f"{' '.join(command)} failed"
        try:
            yield process.pid
        finally:
            process.stdin.close()


def carry(taps: Sequence[int], latency: float) -> None:
    """Forwards frames between each two of the devices until standard input is closed.

    A frame for a device that is down is lost.
    """
    ends = dict(zip(taps, (tap for pair in zip(taps[1::2], taps[::2], strict=True) for tap in pair), strict=True))
    under_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        stdin = sys.stdin.fileno()
        ready, _, _ = select.select([stdin, *taps], [], [], pause)
        if stdin in ready:
            return
        for tap in ready:
            under_way.append((time.monotonic() + latency, ends[tap], os.read(tap, MAX_FRAME)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, tap, frame = under_way.popleft()
            with suppress(OSError):
                os.write(tap, frame)


def _tap(name: str) -> int:
    tap = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


if __name__ == "__main__":
    opened = [_tap(name) for name in sys.argv[2:]]
    print(flush=True)
    carry(opened, float(sys.argv[1]))
