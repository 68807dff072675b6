"""The bell: the one message that goes through Celery.

A bell says "there may be work" and names none. What the work is, who holds it and how often it was tried
stands in the ledger, where a worker claims it in one atomic step. So a bell that is lost, late, repeated or
forged costs at most one empty look: the queue's faults cannot become the table's.
"""

from __future__ import annotations

from typing import Any

from worker.contracts.errors import MessageError

MESSAGE_VERSION = 1
TASK = "nermill.tag"
QUEUE = "nermill"
KEY_PREFIX = "nermill:"


def bell() -> dict[str, Any]:
    """Keyword arguments of one bell."""
    return {"version": MESSAGE_VERSION}


def check_bell(version: Any) -> None:
    """Refuses a bell of another version.

    Raises:
        MessageError: not a bell that this version understands.
    """
    if version != MESSAGE_VERSION:
        raise MessageError(
            f"message version {version!r:.40}: this worker speaks {MESSAGE_VERSION}; upgrade the older side"
        )
