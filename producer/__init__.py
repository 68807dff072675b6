"""The producer's Python interface: ``from nermill.producer import Producer``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nermill.producer.client import Producer

__all__ = ["Producer"]


def __getattr__(name: str) -> Any:
    """Imports ``Producer`` on first access, so that the command line starts without pyarrow."""
    if name != "Producer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nermill.producer.client import Producer

    return Producer
