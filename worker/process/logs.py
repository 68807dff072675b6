"""Logs of a worker process: text lines, or one JSON object a line that names the run and the shard."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

from nermill.worker.contracts.console import visible
from nermill.worker.contracts.errors import NermillError

FORMATS = ("text", "json")

log = logging.getLogger("nermill.worker")
_subject: ContextVar[dict[str, object] | None] = ContextVar("subject", default=None)


@contextmanager
def about(**facts: object) -> Iterator[None]:
    """Adds members to the JSON objects that this thread logs inside the ``with`` block.

    Args:
        facts: Members by name, such as ``run`` and ``shard``.
    """
    token = _subject.set({**(_subject.get() or {}), **facts})
    try:
        yield
    finally:
        _subject.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message, the members of ``about``, and a traceback.

    Args:
        facts: Members of every object, such as ``device`` and ``worker``.
    """

    def __init__(self, **facts: object) -> None:
        super().__init__()
        self._facts = facts

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._facts,
            **(_subject.get() or {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure(log_format: str, **facts: object) -> None:
    """Sends all logs of the process, warnings and uncaught exceptions included, to standard error.

    Args:
        log_format: One of FORMATS.
        facts: Members of every JSON object.
    """
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(**facts))
        sys.excepthook = _log_exception
        threading.excepthook = lambda thrown: _log_exception(thrown.exc_type, thrown.exc_value, thrown.exc_traceback)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def report_error(error: NermillError) -> None:
    """Writes an error's one line to standard error, as a JSON record where logs are JSON; the process then ends."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        log.critical("%s", error)
    else:
        print(f"nermill-worker: {visible(str(error))}", file=sys.stderr)


def _log_exception(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None = None
) -> None:
    if error is not None:
        log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))
