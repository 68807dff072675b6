"""The worker: what stands between the queue and the tables. ``Tagger`` is its face without a queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nermill.worker.tagging.pipeline import Tagger

__all__ = ["Tagger"]


def __getattr__(name: str) -> Any:
    """Imports the engine's libraries when the Tagger is asked for, not when a contract is."""
    if name != "Tagger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nermill.worker.tagging.pipeline import Tagger

    return Tagger
