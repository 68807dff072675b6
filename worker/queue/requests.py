"""Requests: tags a few documents, in the same batches as shards; Celery's result backend returns the annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.message import check_request
from nermill.worker.contracts.plan import options_from
from nermill.worker.queue.shards import ShardWorker
from nermill.worker.tagging.pipeline import Tagger


def tag_documents(worker: ShardWorker, documents: Any, options: Any) -> list[dict[str, Any]]:
    """Tags the documents of a request.

    Args:
        worker: The process's worker.
        documents: Texts, or lists of words; at most 1,000 and a million characters together. Unchecked.
        options: Fields of ``Options``, or None. Unchecked.

    Returns:
        For each document ``entities`` (``start``, ``end``, ``label``, ``text``, ``score``), ``tags`` (one for each word
        of a list of words) and ``fault`` (``reason``, ``message``) where the document could not be tagged.

    Raises:
        MessageError: the arguments are not valid.
        EngineError: the device failed; the process is about to end.
    """
    with worker.refusals():
        check_request(documents)
        if options is not None and not isinstance(options, Mapping):
            raise MessageError("options: an object is expected")
        try:
            checked = options_from(dict(options or {}))
        except ValueError as error:
            raise MessageError(f"options: {error}") from None
    with worker.isolation.shared():
        annotations = Tagger(worker.pipeline).tag(documents, urgent=True, **asdict(checked))
    worker.metrics.requested(len(documents))
    return [
        {
            "entities": [asdict(entity) for entity in annotation.entities],
            "tags": annotation.tags and list(annotation.tags),
            "fault": annotation.fault and asdict(annotation.fault),
        }
        for annotation in annotations
    ]
