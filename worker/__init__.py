"""The worker, which tags the documents of the queue; ``Tagger`` tags documents in the caller's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nermill.worker.tagging.tagger import Tagger

__all__ = ["Tagger"]


def __getattr__(name: str) -> Any:
    """Imports ``Tagger`` on first access: it brings in the engine's libraries, which the contracts do not need."""
    if name != "Tagger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nermill.worker.tagging.tagger import Tagger

    return Tagger
