"""Documents by value: they travel through Redis where the producer can reach the broker and not the store.

The ledger has the plan without shards, an entry for each shard and, until a worker has written them into the run's
folder, the documents of each shard: a JSON object of the columns of the SHARD schema, compressed with Zstandard.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import zstandard

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import PRIORITIES
from nermill.worker.contracts.plan import Plan, Shard, plan_from
from nermill.worker.contracts.records import Claim, RunState, lease_of, parse_shard, shard_entry
from nermill.worker.contracts.schema import SHARD

MAX_PACKED_BYTES = 1 << 20  # of a shard's documents
MAX_UNPACKED_BYTES = 16 << 20
_MAX_STORED_BYTES = 4 * -(-MAX_PACKED_BYTES // 3)  # in Redis, in base64
_LEVEL = 3
_KINDS = ("text", "words", "fault_reason")  # a document has exactly one


class TooLargeError(ValueError):
    """Documents that are above the size of a shard by value."""


def pack(table: pa.Table) -> tuple[bytes, str]:
    """A shard's documents as they travel, and their sha256.

    Args:
        table: Documents with the SHARD schema.

    Raises:
        TooLargeError: they are above ``MAX_PACKED_BYTES`` or, before compression, ``MAX_UNPACKED_BYTES``.
    """
    body = json.dumps(table.to_pydict(), ensure_ascii=False, separators=(",", ":")).encode()
    if len(body) > MAX_UNPACKED_BYTES:
        raise TooLargeError(f"{len(body)} bytes; {MAX_UNPACKED_BYTES} is the limit of a shard by value")
    data = zstandard.ZstdCompressor(level=_LEVEL).compress(body)
    if len(data) > MAX_PACKED_BYTES:
        raise TooLargeError(f"{len(data)} bytes when compressed; {MAX_PACKED_BYTES} is the limit of a shard by value")
    return data, hashlib.sha256(data).hexdigest()


def unpack(data: bytes, sha256: str) -> pa.Table:
    """The documents of a shard, from untrusted bytes, with the SHARD schema.

    Raises:
        ValueError: they are not what ``pack`` makes.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("their sha256 differs from the shard's")
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_UNPACKED_BYTES)
        with decompressor.stream_reader(data) as stream:
            body = stream.read(MAX_UNPACKED_BYTES + 1)
        if len(body) > MAX_UNPACKED_BYTES:
            raise ValueError(f"they unpack to more than {MAX_UNPACKED_BYTES} bytes")
        columns = json.loads(body)
        if not isinstance(columns, dict) or list(columns) != SHARD.names or {*map(type, columns.values())} != {list}:
            raise ValueError("they have other columns")
        table = pa.Table.from_pydict(columns, schema=SHARD)
    except (zstandard.ZstdError, pa.ArrowException, TypeError, AttributeError, RecursionError, UnicodeError) as error:
        raise ValueError(f"no documents ({' '.join(str(error).split()):.120})") from None
    _check_rows(columns)
    return table


def _check_rows(columns: dict[str, list[Any]]) -> None:
    """Checks what the schema does not say.

    Raises:
        ValueError: a document without id, or that is not exactly one of text, words and fault; both kinds in one shard;
            words or gold tags that are null or not of the same number.
    """
    kinds: set[str] = set()
    for row, values in enumerate(zip(*(columns[name] for name in _KINDS), strict=True)):
        given = [name for name, value in zip(_KINDS, values, strict=True) if value is not None]
        if len(given) != 1 or columns["doc_id"][row] is None:
            raise ValueError(f"document {row} is not one text, one list of words or one fault, with an id")
        kinds.update(given)
        words, gold = columns["words"][row], columns["gold_tags"][row]
        if None in (words or []) or None in (gold or []) or (gold is not None and len(gold) != len(words or [])):
            raise ValueError(f"document {row} has words or tags that do not fit")
    if {"text", "words"} <= kinds:
        raise ValueError("texts and lists of words in one shard")


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of documents by value that lie in Redis: of all runs, and of one."""

    total: int
    own: int


class Documents:
    """The ledger's steps for runs by value.

    Args:
        ledger: The ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def declare(self, run_id: str, shards: Iterable[Shard]) -> str:
        """Says which shards a run has; each becomes pending once its documents are offered.

        Returns:
            ``declared``; ``another`` where the ledger has another shard of the same number, which stays; ``unknown``
            where it does not know the run.
        """
        answers = self._ledger.in_chunks("declare", run_id, shards)
        return next((str(answer) for answer in answers if answer != "declared"), "declared")

    def needed(self, run_id: str) -> set[int]:
        """Declared shards whose documents must be offered: neither recorded nor pending, sent or leased."""
        client, key = self._ledger.client, self._ledger.key
        known: set[str] = set(client.hkeys(key(run_id, "shards")))
        known.difference_update(client.zrange(key(run_id, "pending"), 0, -1))
        for part in ("sent", "leases", "results"):  # as a shard goes: one that moves meanwhile is found later
            known.difference_update(client.hkeys(key(run_id, part)))
        return set(map(int, known))

    def open(self, uri: str, plan: Plan, state: RunState = RunState.CLOSED) -> None:
        """Makes a run by value known, or known again.

        Args:
            uri: The run's folder, as workers see it.
            plan: What the first worker writes there.
            state: ``OPEN`` for a stream that still grows, else ``CLOSED``.
        """
        self._ledger.open(
            plan.run_id,
            uri,
            plan.options,
            artifact=plan.model["sha256"],
            state=state,
            priority=PRIORITIES[plan.priority],
            plan=plan,
        )

    def offer(
        self, run_id: str, shard: Shard, documents: bytes, *, position: str = "", holder: str = ""
    ) -> tuple[str, Held]:
        """Gives a shard its documents and makes it pending, unless it is pending, sent, leased or recorded.

        Args:
            run_id: The run.
            shard: ``sha256`` is that of ``documents``.
            documents: As ``pack`` makes them.
            position: Of a stream: how far the shard reaches in the input.
            holder: Of a stream: who holds it; nobody else's shards are taken, and none once it ended.

        Returns:
            State of the run, of which ``unknown`` and ``cancelled`` take no documents, or ``not held``, or ``another``
            where the shard is known with other documents; and what lies in Redis.
        """
        entry, packed = shard_entry(shard), base64.b64encode(documents)
        state, total, own = self._ledger.step("offer", run_id, shard.index, entry, packed, position, holder)
        return str(state), Held(int(total), int(own))

    def durable(self, run_id: str, first: int) -> list[Shard]:
        """Shards from number ``first`` on whose documents are in the run's folder, up to the first that is not.

        Returns:
            At most 500; ``sha256`` is that of the shard's file.

        Raises:
            MessageError: an entry does not fit the contract.
        """
        entries = self._ledger.step("durable", run_id, first)
        try:
            return [parse_shard(number, entry) for number, entry in enumerate(entries, first)]
        except ValueError as error:
            raise _misfit(run_id, error) from None

    def place(self, run_id: str, shard: int, position: str) -> None:
        """Says how far a shard of a stream reaches, to a server that lost that."""
        self._ledger.step("place", run_id, shard, position)

    def positions(self, run_id: str) -> dict[int, str]:
        """How far the shards of a stream reach in its input, as they were offered."""
        found = self._ledger.client.hgetall(self._ledger.key(run_id, "positions"))
        return {int(shard): str(position) for shard, position in found.items()}

    def held(self, run_id: str) -> Held:
        """Documents that lie in Redis."""
        total, own = self._ledger.step("held", run_id)
        return Held(int(total), int(own))

    def take(self, claim: Claim, shard: Shard) -> pa.Table:
        """The documents of a leased shard, with the SHARD schema.

        Raises:
            MessageError: they are gone, or are not what the ledger's entry says.
        """
        try:
            if claim.packed > _MAX_STORED_BYTES:
                raise ValueError(f"{claim.packed} bytes; {_MAX_STORED_BYTES} are the most")
            entry = self._ledger.client.hget(self._ledger.key(claim.run_id, "documents"), claim.key)
            if entry is None:
                raise ValueError("they are gone")
            table = unpack(base64.b64decode(entry, validate=True), shard.sha256)
            if table.num_rows != shard.documents:
                raise ValueError(f"{table.num_rows} documents where the shard has {shard.documents}")
            return table
        except ValueError as error:
            reason = f"{error}; submit the same input again"
            raise MessageError(f"run {claim.run_id} shard {claim.key}: its documents do not fit: {reason}") from None

    def stored(self, claim: Claim, shard: Shard) -> bool:
        """Records that a shard's documents are in the run's folder, and removes them from Redis.

        Args:
            claim: The lease.
            shard: ``sha256`` is that of the shard's file.

        Returns:
            False without the lease.
        """
        return bool(self._ledger.step("stored", *lease_of(claim), shard_entry(shard)))

    def plan(self, run_id: str) -> Plan | None:
        """The plan of a run by value, without shards; None for any other run.

        Raises:
            MessageError: it does not fit the contract.
        """
        entry = self._ledger.client.hget(self._ledger.key(run_id), "plan")
        try:
            return plan_from(json.loads(entry)) if entry else None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MessageError(f"run {run_id}: the ledger's plan does not fit the contract ({error})") from None

    def shards(self, run_id: str) -> tuple[Shard, ...]:
        """The shards of a run, by number.

        Raises:
            MessageError: an entry does not fit the contract, or documents are missing between two shards.
        """
        entries = self._ledger.client.hgetall(self._ledger.key(run_id, "shards"))
        try:
            shards = tuple(parse_shard(number, entries[str(number)]) for number in sorted(map(int, entries)))
            first = 0
            for number, shard in enumerate(shards):
                if (shard.index, shard.first) != (number, first):
                    raise ValueError(f"shard {number} is missing")
                first += shard.documents
            return shards
        except (ValueError, KeyError) as error:
            raise _misfit(run_id, error) from None


def _misfit(run_id: str, error: Exception) -> MessageError:
    return MessageError(f"run {run_id}: the ledger's shards do not fit the contract ({error})")
