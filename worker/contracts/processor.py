"""What the processor of this machine is called and can do, by Linux's own account."""

from __future__ import annotations

import math
import os
import platform
import re
from functools import cache
from pathlib import Path

_INT8_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time in a period, and the period


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, or fewer where its container has a limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text("utf-8").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no limit: "max 100000"
        return cores


@cache
def _entries() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", text, re.MULTILINE))


def processor_name() -> str:
    """The processor's model, or at least its architecture."""
    return _entries().get("model name") or platform.machine()


def processor_flags() -> frozenset[str]:
    """Extensions of the instruction set, as Linux names them; empty where it does not say."""
    entries = _entries()
    return frozenset((entries.get("flags") or entries.get("Features") or "").split())


def has_int8_products() -> bool:
    """Whether products of 8-bit integers are summed in one instruction (VNNI, AMX, or ARM's dot product)."""
    return not _INT8_PRODUCTS.isdisjoint(processor_flags())


def has_bf16() -> bool:
    """Whether products of bfloat16 are computed in hardware."""
    return not _BF16.isdisjoint(processor_flags())
