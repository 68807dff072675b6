"""The compiled half of ais_bench; the double needs nothing of it but that it is there."""

from __future__ import annotations

import enum


class dtype(enum.Enum):  # noqa: N801 - the binding's name
    """Prints as the binding's does: ``dtype.int64``."""

    int32 = 3
    int64 = 9
    float32 = 0
