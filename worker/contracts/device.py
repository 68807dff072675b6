"""The names of devices, parsed in one place: ``cpu``, ``cuda:N``, ``npu:N``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nermill.worker.contracts.errors import UsageError

_NAME = re.compile(r"(?P<kind>cuda|npu):(?P<number>[0-9]+)|cpu")


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``npu``.
        number: Number of the device among those of its kind, from 0.
    """

    kind: str
    number: int = 0

    @property
    def name(self) -> str:
        """The name as users write it: ``cpu``, ``cuda:0``, ``npu:3``."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


def find_device(name: str) -> Device | None:
    """The device that a name stands for; None where it names no device."""
    match = _NAME.fullmatch(name.strip())
    if match is None:
        return None
    return Device(match["kind"], int(match["number"])) if match["kind"] else Device("cpu")


def parse_devices(text: str) -> list[Device] | None:
    """The devices of ``--devices``; ``cpu`` may be repeated, for several processes that share the cores.

    Args:
        text: ``auto``, or names separated by commas: ``cpu``, ``npu:0,npu:1``.

    Returns:
        The devices in order; None for ``auto``.

    Raises:
        UsageError: a name that is no device, or a device that is named twice.
    """
    if text.strip() == "auto":
        return None
    devices: list[Device] = []
    for name in text.split(","):
        device = find_device(name)
        if device is None:
            raise UsageError(f"--devices {text!r}: {name!r} is no device; say auto, or a list of cpu, cuda:N and npu:N")
        if device.kind == "cpu":
            device = Device("cpu", sum(other.kind == "cpu" for other in devices))
        if device in devices:
            raise UsageError(f"--devices {text!r}: {device.name} is named twice")
        devices.append(device)
    return devices
