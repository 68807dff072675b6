"""The bell: the one message that goes through Celery.

A bell says "there may be work" and names none. What the work is, who holds it and how often it was tried
stands in the ledger, where a worker claims it in one atomic step. So a bell that is lost, late, repeated or
forged costs at most one empty look: the queue's faults cannot become the table's.
"""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

from nermill.worker.contracts.errors import MessageError

MESSAGE_VERSION = 1
TASK = "nermill.tag"
QUEUE = "nermill"
KEY_PREFIX = "nermill:"
MAX_BELLS = 256  # in the queue: each is answered until no shard is left, and workers ring for what waits unheard
MAX_BODY = 4096  # characters; a bell's own body has 120


def bell() -> dict[str, Any]:
    """Keyword arguments of one bell."""
    return {"version": MESSAGE_VERSION}


def check_message(raw: Any) -> None:
    """Refuses whatever lies in the queue and is no bell, without unpacking more than it must.

    Args:
        raw: The message as the Redis transport has it, parsed from JSON.

    Raises:
        MessageError: not a bell that this version understands.
    """
    try:
        task, kind, body = raw["headers"]["task"], raw["content-type"], raw["body"]
        if task != TASK:
            raise MessageError(f"a message for the task {task!r:.80}, which is not ours")
        if kind != "application/json" or len(body) > MAX_BODY:
            raise MessageError(f"a message of {len(body)} characters of {kind!r:.80}; a bell is short JSON")
        _, keywords, _ = json.loads(b64decode(body, validate=True))
        version = keywords["version"]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise MessageError(f"a message that is no bell ({type(error).__name__})") from None
    if version != MESSAGE_VERSION:
        raise MessageError(
            f"message version {version!r:.40}: this worker speaks {MESSAGE_VERSION}; upgrade the older side"
        )
