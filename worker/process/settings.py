"""Settings of a worker process, read from ``NERMILL_*`` environment variables, and the allowed roots."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.store import without_local_scheme
from nermill.worker.process.logs import FORMATS

_URI = re.compile(
    r"(?:^|:)([A-Za-z][A-Za-z0-9+.-]*://.*)", re.DOTALL
)  # at the start, or behind local paths and a colon


@dataclass(frozen=True)
class Settings:
    """Settings of one worker process; the environment variable of a field is ``NERMILL_<FIELD>``.

    Attributes:
        broker_url: Where Celery's queues, its results and the ledger are: redis, rediss, redis+socket or sentinel URL.
        model: ``demo`` or an artifact's folder.
        device: ``cpu``, ``cuda:N`` or ``npu:N``, as this process sees them.
        device_name: The device's name on the machine; a process that sees one device alone calls it number 0.
        lease_seconds: Length of a lease; a worker renews its leases at least three times in that time.
        hang_seconds: Longest time of one call of the engine; a process whose call takes longer ends.
        grace_seconds: How long a worker that was told to stop may go on with the shards that it holds.
        allowed_roots: Folders and URIs below which runs may lie, separated by ``,``; see ``split_roots``.
        concurrency: Most shards in the process at once.
        threads: Compute threads on a CPU; 0 takes one for each core that the process may use.
        metrics_port: First port of the Prometheus endpoints (device N listens on port + N); 0 for none.
        start_attempts: ``nermill-worker`` ends when a process has ended so often before it was ready; 0 for no limit.
        log_format: ``text`` for people, ``json`` for one object a line.
        result_seconds: How long Celery keeps the results of tasks.
    """

    broker_url: str = "redis://localhost:6379/0"
    model: str = "demo"
    device: str = "cpu"
    device_name: str = "cpu"
    lease_seconds: float = 60.0
    hang_seconds: float = 120.0
    grace_seconds: float = 25.0
    allowed_roots: str = ""
    concurrency: int = 16
    threads: int = 0
    metrics_port: int = 0
    start_attempts: int = 0
    log_format: str = "text"
    result_seconds: float = 3600.0

    @property
    def worker_name(self) -> str:
        return f"nermill-{self.device_name.replace(':', '')}@{socket.gethostname()}-{os.getpid()}"

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The allowed roots, resolved once; the working directory where none are set.

        Raises:
            UsageError: a root is invalid.
        """
        return tuple(resolve(root) for root in split_roots(self.allowed_roots)) or (os.getcwd(),)


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment over the defaults.

    Raises:
        UsageError: a value is no number or out of range.
    """
    values: dict[str, object] = {}
    for name, default in vars(Settings()).items():
        variable = f"NERMILL_{name.upper()}"
        text = environ.get(variable)
        if text is None:
            continue
        try:
            value = type(default)(text)
        except ValueError:
            raise UsageError(f"{variable}={text!r} is no number") from None
        if isinstance(value, (int, float)) and not 0 <= value < float("inf"):
            raise UsageError(f"{variable}={text!r} is out of range")
        values[name] = value
    settings = Settings(**values)  # type: ignore[arg-type]
    if settings.lease_seconds < 1 or settings.concurrency < 1:
        raise UsageError("NERMILL_LEASE_SECONDS and NERMILL_CONCURRENCY must be at least 1")
    if settings.log_format not in FORMATS:
        raise UsageError(f"NERMILL_LOG_FORMAT={settings.log_format!r}: say text or json")
    _ = settings.roots  # invalid roots are refused at the start
    return settings


def split_roots(text: str) -> list[str]:
    """The roots of a list.

    Args:
        text: Roots separated by commas; absolute local paths may be separated by colons too, as in
            ``/data:/srv,s3://minio:9000/bucket``. A text that is the path of a folder is that one root, whatever
            its name contains.

    Raises:
        UsageError: a root is invalid, or the text is not empty and names no root.
    """
    if os.path.isdir(text):
        return [text]
    roots: list[str] = []
    if "::" in text:
        raise UsageError(f"NERMILL_ALLOWED_ROOTS={text!r}: a chain of stores (::) is not allowed; name the store")
    for piece in (piece.strip() for piece in text.split(",")):
        found = _URI.search(piece)
        several = (piece[: found.start()] if found else piece).split(":")
        for path in filter(None, map(str.strip, several)):
            _check_folder(path, is_one_of_several=len(several) > 1)
            roots.append(path)
        if found:
            _check_uri(found[1])
            roots.append(found[1])
    if text.strip() and not roots:
        raise UsageError(f"NERMILL_ALLOWED_ROOTS={text!r} names no root; name folders and URIs, or leave it unset")
    return roots


def _check_folder(path: str, *, is_one_of_several: bool) -> None:
    wrong = ""
    if is_one_of_several and not path.startswith("/"):
        wrong = "is no absolute path; separate a URI, or a path with a colon in it, by commas"
    elif path.startswith("~"):
        wrong = "is not expanded; write the path out"
    elif "*" in path:
        wrong = "is a pattern; name the folder around what it fits"
    elif os.path.lexists(path) and not os.path.isdir(path):
        wrong = "is no folder"
    if wrong or "\0" in path:
        raise UsageError(f"NERMILL_ALLOWED_ROOTS: {path!r} {wrong or 'has a null byte'}")


def _check_uri(uri: str) -> None:
    path = uri.partition("://")[2]
    wrong = ""
    if "://" in path or ":/" in path:
        wrong = "is two roots in one; separate them by a comma"
    elif not path.strip("/."):
        wrong = "names no bucket or folder"
    elif "*" in path:
        wrong = "is a pattern; name the prefix before it"
    if wrong or "\0" in uri:
        raise UsageError(f"NERMILL_ALLOWED_ROOTS: {uri!r} {wrong or 'has a null byte'}")


def resolve(uri: str) -> str:
    """The form in which places are compared with roots: a path without symlinks and ``..``, a URI without ``..``."""
    path = without_local_scheme(uri)
    if "://" not in path:
        return os.path.realpath(path)
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{os.path.normpath(path)}"


def is_allowed(uri: str, roots: tuple[str, ...]) -> bool:
    """Whether a place lies below one of the roots; a chain of stores (``a://b::c://d``) never does.

    Args:
        uri: Path or URI.
        roots: Resolved roots, as ``Settings.roots`` has them.
    """
    if "\0" in uri or "::" in uri:
        return False
    resolved = resolve(uri)
    return any(resolved == root or resolved.startswith(root.rstrip("/") + "/") for root in roots)
