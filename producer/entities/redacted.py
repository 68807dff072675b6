"""Writes a run's redacted texts and the key that restores them; few documents at a time are in memory."""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nermill.producer.entities.redact import Entity, Method, Replace, redact, replacement, restore
from nermill.producer.entities.show import read_rows
from nermill.producer.entities.tables import read_table, table_writer
from nermill.producer.sources.files import is_remote
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.plan import Plan
from nermill.worker.contracts.store import store_errors

_SECRET = re.compile(rb"[0-9a-f]{64}\n?")
_KEY_SCHEMA = """
CREATE TABLE pseudonyms (pseudonym TEXT PRIMARY KEY, label TEXT, original TEXT, UNIQUE (label, original)) WITHOUT ROWID;
CREATE TABLE key (id TEXT);
"""


@dataclass(frozen=True, slots=True)
class Redacted:
    """What was written.

    Attributes:
        documents: Documents of the run, rejected ones included.
        left_out: Rejected documents; their text is left out, since it was not searched for entities.
        entities: Number of replacements by label.
    """

    documents: int
    left_out: int
    entities: dict[str, int]


def redact_run(
    run: RunFolder,
    plan: Plan,
    to: str,
    method: Method = "label",
    key: str | None = None,
    only: frozenset[str] = frozenset(),
    min_score: float = 0.0,
) -> Redacted:
    """Writes a complete run's texts with their entities replaced, one row a document, in the order of the input.

    Columns: ``doc_index``, ``id``, ``status``, ``text`` (null where rejected), ``entities`` (offsets in that text)
    and ``key``, the id of the key of pseudonyms.

    Args:
        run: The run's folder.
        plan: Its plan.
        to: A new file: ``.jsonl``, ``.parquet`` or ``.csv``.
        method: See ``replacement``.
        key: With ``pseudonym``: a new SQLite file, which restores the texts. With ``hash``: a file with the secret, 64
            hexadecimal digits, which is created where it does not exist. The mode is 0600; files are not overwritten.
        only: Labels to replace; empty for all.
        min_score: Entities with a lower score stay.

    Raises:
        UsageError: a file exists or has a wrong name, the run's texts do not exist any more, or no entity of the run
            has a label of ``only``. Neither file is written.
        StoreError: a file cannot be read or written. Neither file is written.
    """
    if key is not None and method not in ("hash", "pseudonym"):
        raise UsageError(f"--key goes with --with hash or pseudonym, not with {method}")
    if key is not None and os.path.abspath(key) == os.path.abspath(to):
        raise UsageError(f"{key}: named as --key and as --to; name two files")
    entities: Counter[str] = Counter()
    labels: set[str] = set()
    documents = left_out = 0
    with ExitStack() as stack:
        aside = stack.enter_context(new_file(to))
        replace, key_id = _make_replacement(method, key, stack)
        write = stack.enter_context(table_writer(to, aside, _COLUMNS))
        for document in read_rows(run, plan, None):
            row = document.row
            documents += 1
            text: str | None = None
            found: list[Entity] = []
            if row["status"] == "ok":
                labels.update(entity["label"] for entity in row["entities"])
                text, found = redact(document.text, row["entities"], replace, only, min_score)
                entities.update(entity["label"] for entity in found if entity["redacted"])
            else:
                left_out += 1
            write(
                {
                    "doc_index": row["doc_index"],
                    "id": row["doc_id"],
                    "status": row["status"],
                    "text": text,
                    "entities": found,
                    "key": key_id,
                }
            )
        if unknown := sorted(only - labels):
            known = ", ".join(sorted(labels)) or "none"
            raise UsageError(
                f"--only {','.join(unknown)}: no entity of the run has this label, so nothing was written; "
                f"the run has: {known}"
            )
    return Redacted(documents, left_out, dict(sorted(entities.items())))


def restore_file(source: str, key: str, to: str) -> int:
    """Writes the original texts of a file with pseudonyms; returns the number of documents.

    Args:
        source: A file that ``redact_run`` wrote with ``pseudonym``.
        key: Its key.
        to: A new file.

    Raises:
        UsageError: ``source`` or ``key`` is no such file, the key is another one's, or ``to`` exists.
        StoreError: a file cannot be read or written.
    """
    documents = 0
    with ExitStack() as stack:
        original, key_id = _open_key(key, stack)
        aside = stack.enter_context(new_file(to))
        write = stack.enter_context(table_writer(to, aside, ("doc_index", "id", "status", "text")))
        for row in read_table(source, _COLUMNS):
            documents += 1
            if row["key"] != key_id:
                raise UsageError(f"{source}: document {row['id']!r:.80} was not made with the key {key}; name its own")
            try:
                text = restore(row["text"], row["entities"], original) if row["status"] == "ok" else None
            except (KeyError, TypeError):
                raise UsageError(f"{source}: the entities of document {row['id']!r:.80} are damaged") from None
            write({**{name: row[name] for name in ("doc_index", "id", "status")}, "text": text})
    return documents


@contextmanager
def new_file(path: str, mode: int = 0o666) -> Iterator[str]:
    """Creates a file whole or not at all: what is written to the path that it yields appears at ``path`` at the end.

    Args:
        path: The new file; an existing one is not replaced.
        mode: Permissions before the umask.

    Raises:
        UsageError: the file exists, or is not on a local disk.
        StoreError: it cannot be written.
    """
    if is_remote(path):
        raise UsageError(f"{path}: name a file on a disk")
    if os.path.lexists(path):
        raise UsageError(f"{path}: exists already, and is not overwritten; name another file")
    folder, name = os.path.split(os.path.abspath(path))
    aside = f"{folder}/.{name}.{uuid.uuid4().hex}"
    with store_errors("write", path):
        os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield aside
        with store_errors("write", path):
            with open(aside, "rb") as stream:
                os.fsync(stream.fileno())
            os.link(aside, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(aside)


def _make_replacement(method: Method, key: str | None, stack: ExitStack) -> tuple[Replace, str | None]:
    """The function that computes replacements, and the id of the key where there is one."""
    if method == "pseudonym":
        aside = (
            stack.enter_context(new_file(key, 0o600)) if key else ""
        )  # SQLite removes a database with an empty name when it is closed
        key_id = secrets.token_hex(8)
        return replacement(method, pseudonym=_new_pseudonyms(aside, key_id, stack)), key_id if key else None
    return replacement(method, secret=_read_or_create_secret(key, stack) if method == "hash" else b""), None


def _new_pseudonyms(path: str, key_id: str, stack: ExitStack) -> Replace:
    """A function that returns the pseudonym of a label and a text, numbered by label, and stores it in the key file."""
    database = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
    database.execute("PRAGMA journal_mode = OFF")  # the file gets its name when it is complete
    database.execute("PRAGMA synchronous = OFF")
    database.executescript(_KEY_SCHEMA)
    database.execute("INSERT INTO key VALUES (?)", (key_id,))
    database.execute("BEGIN")
    name = path or "the temporary file of pseudonyms"

    def commit() -> None:
        with store_errors("write", name):
            database.execute("COMMIT")

    stack.callback(commit)
    numbers: Counter[str] = Counter()

    @lru_cache(1 << 16)
    def pseudonym(label: str, text: str) -> str:
        query = "SELECT pseudonym FROM pseudonyms WHERE label = ? AND original = ?"
        if known := database.execute(query, (label, text)).fetchone():
            return str(known[0])
        numbers[label] += 1
        new = f"{label}_{numbers[label]}"
        with store_errors("write", name):
            database.execute("INSERT INTO pseudonyms VALUES (?, ?, ?)", (new, label, text))
        return new

    return pseudonym


def _open_key(path: str, stack: ExitStack) -> tuple[Any, str]:
    """A function that returns the text of a pseudonym, and the key's id."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such key file; name what nermill redact --with pseudonym --key wrote")
    database = stack.enter_context(closing(sqlite3.connect(path)))
    try:
        (key_id,) = database.execute("SELECT id FROM key").fetchone()
        database.execute("SELECT pseudonym, original FROM pseudonyms LIMIT 1")
    except (sqlite3.Error, TypeError) as error:
        raise UsageError(f"{path}: no key of pseudonyms ({error}); name what nermill redact --key wrote") from None

    @lru_cache(1 << 16)
    def original(pseudonym: str) -> str:
        found = database.execute("SELECT original FROM pseudonyms WHERE pseudonym = ?", (pseudonym,)).fetchone()
        if found is None:
            raise UsageError(f"{path}: holds no {pseudonym!r:.80}; the redacted file was changed")
        return str(found[0])

    return original, key_id


def _read_or_create_secret(path: str | None, stack: ExitStack) -> bytes:
    """The secret of hashes: read from the file, which is created where it does not exist; random without a file."""
    if path is not None and os.path.lexists(path):
        try:
            with open(path, "rb") as stream:
                held = stream.read(66)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
        if not _SECRET.fullmatch(held):
            raise UsageError(f"{path}: exists and is no secret of hashes (64 hexadecimal digits); name another file")
        return bytes.fromhex(held.decode())
    secret = secrets.token_bytes(32)
    if path is not None:
        aside = stack.enter_context(new_file(path, 0o600))
        with open(aside, "w", encoding="ascii") as stream:
            stream.write(f"{secret.hex()}\n")
    return secret


_COLUMNS = ("doc_index", "id", "status", "text", "entities", "key")
