"""What many write first: a Celery task a document, a Hugging Face pipeline inside; ``BENCH_BROKER`` is a socket."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from celery import Celery

from tests.benchmarks.ways import hugging_face

SOCKET = os.environ["BENCH_BROKER"]
app = Celery("handmade", broker=f"redis+socket://{SOCKET}", backend=f"redis+socket://{SOCKET}")


@cache
def _pipeline() -> Any:
    return hugging_face(Path(os.environ["BENCH_CHECKPOINT"]))


@app.task
def tag(text: str) -> list[dict[str, Any]]:
    """The entities of one document."""
    found = _pipeline()(text)
    return [{**entity, "score": float(entity["score"])} for entity in found]
