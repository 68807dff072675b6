"""What goes through Celery: three tasks, their queues and priorities, and the checks of their arguments.

A message names one unit of work. Whether its receiver does that work is decided by the ledger, in one atomic step, so
a message that is lost, late, repeated or forged cannot change a table.
"""

from __future__ import annotations

from typing import Any

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.plan import RUN_ID

TAG_SHARD = "nermill.tag_shard"
FINISH_RUN = "nermill.finish_run"
TAG_DOCUMENTS = "nermill.tag_documents"
FIRST_VERSION_TASK = "nermill.tag"

KEY_PREFIX = "nermill:2:"  # 2 is the ledger's version: the first version's keys begin with ``nermill:run``
QUEUE = "nermill"  # requests, last steps, and shards of runs that no artifact serves yet
FINISH = "finish"  # how the ledger names a run's last step, beside the numbers of its shards

# Redis serves the smallest number first.
PRIORITIES = {"high": 3, "normal": 6, "low": 9}
REQUEST_PRIORITY = 0
PRIORITY_STEPS = [0, 3, 6, 9]

MAX_URI = 4096  # characters
MAX_SHARD = 1 << 40
MAX_REQUEST_DOCUMENTS = 1_000
MAX_REQUEST_CHARACTERS = 1_000_000


def queue_of(artifact: str) -> str:
    """The queue of an artifact's shards, by the artifact's sha256."""
    return f"{QUEUE}.{artifact[:12]}"


def check_run(run_id: Any, folder: Any) -> None:
    """Checks the arguments that ``nermill.tag_shard`` and ``nermill.finish_run`` share.

    Raises:
        MessageError: a value of the wrong type or form.
    """
    if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
        raise MessageError(f"run id {run_id!r:.80}: a run id has 1 to 64 of the characters 0-9 a-z _ -")
    if not isinstance(folder, str) or not 0 < len(folder) <= MAX_URI or "\0" in folder:
        raise MessageError(f"folder {folder!r:.80}: a path or URI of 1 to {MAX_URI} characters is expected")


def check_shard(shard: Any) -> None:
    """Checks a shard's number.

    Raises:
        MessageError: it is no whole number in range.
    """
    if type(shard) is not int or not 0 <= shard < MAX_SHARD:
        raise MessageError(f"shard {shard!r:.80}: a whole number from 0 on is expected")


def check_request(documents: Any) -> None:
    """Checks the documents of ``nermill.tag_documents``: texts, or lists of words.

    Raises:
        MessageError: not a list, too many documents or characters, or a document of another type.
    """
    if not isinstance(documents, list):
        raise MessageError(
            f"documents: a list of texts or of lists of words is expected, not {type(documents).__name__}"
        )
    if len(documents) > MAX_REQUEST_DOCUMENTS:
        raise MessageError(f"{len(documents)} documents: a request has {MAX_REQUEST_DOCUMENTS} at most; submit a run")
    if len({isinstance(document, str) for document in documents}) > 1:
        raise MessageError("documents: texts and lists of words in one request; send them in two")
    characters = 0
    for number, document in enumerate(documents):
        words = [document] if isinstance(document, str) else document
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise MessageError(f"document {number}: a text or a list of words is expected")
        characters += sum(map(len, words))
    if characters > MAX_REQUEST_CHARACTERS:
        raise MessageError(f"{characters} characters: a request has {MAX_REQUEST_CHARACTERS} at most; submit a run")
