"""The ledger: who holds which shard, how often it was tried, what is done; in Redis, beside the bell.

The run's folder is the truth and the ledger its cheap shadow: losing it loses progress bars, never results.
Each step is one atomic function of ``ledger.lua``. A shard is in exactly one place: waiting, leased or done.
Whoever holds a lease also holds a *fencing token* that grows with every claim; a worker that slept past its
lease finds its token stale.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Protocol

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.layout import RunFolder
from nermill.worker.contracts.message import KEY_PREFIX
from nermill.worker.contracts.plan import RUN_ID, SHA256, Options, Shard, options_from

FINISH = -1  # number of a run's last step, which is leased like a shard: _SUCCESS and evaluation
MAX_ATTEMPTS = 3  # tries of a whole shard before its documents are tried one by one
MAX_STRIKES = 2  # crashes of one document, alone, before it is rejected
MAX_INDEX = 1 << 62  # of a document; parts hold it in 64 bits
CLOSED_SECONDS = 86_400  # how long a finished run's counters stay readable
_SEND_CHUNK = 500
_SOURCE = files("nermill.worker.contracts").joinpath("ledger.lua").read_text("utf-8")


class RedisClient(Protocol):
    """The few calls of redis-py that the ledger makes (a client made with ``decode_responses=True``)."""

    def register_script(self, script: str) -> Any: ...
    def hgetall(self, name: str) -> Any: ...
    def hkeys(self, name: str) -> Any: ...
    def hlen(self, name: str) -> Any: ...
    def zcard(self, name: str) -> Any: ...
    def zrange(self, name: str, start: int, end: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """A leased shard: what to do, and the token that proves the lease.

    Attributes:
        waited: How long it had waited, in seconds.
        fresh_until: Time by ``time.monotonic`` until which half of the lease is left at least, so that nobody else can
            have been given it.
    """

    run_id: str
    uri: str
    options: Options
    shard: Shard
    token: str
    attempts: int
    waited: float
    fresh_until: float

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.uri)


@dataclass(frozen=True, slots=True)
class Progress:
    """A run's counters. Documents and tokens are those of committed shards; times are Unix seconds or 0."""

    state: str = "unknown"
    submitted: int = 0
    ok: int = 0
    rejected: int = 0
    tokens: int = 0
    computed: int = 0
    redeliveries: int = 0
    duplicates: int = 0
    buried: int = 0
    waiting: int = 0
    leased: int = 0
    done: int = 0
    started: float = 0.0
    finished: float = 0.0
    artifact: str = ""
    trouble: str = ""

    @property
    def unfinished_documents(self) -> int:
        """Documents that were sent and are not committed: what back-pressure looks at."""
        return self.submitted - self.ok - self.rejected


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker process as it presents itself to people.

    Attributes:
        name: As in the statistics of its parts.
        device: ``cpu``, ``cuda:N`` or ``npu:N``, as seen from outside.
        model: Name of the artifact that it serves.
        artifact: Its sha256.
    """

    name: str
    device: str
    model: str
    artifact: str


@dataclass(frozen=True, slots=True)
class Completion:
    """``newly`` is False for a duplicate; ``last`` says that the run's last step now waits for a worker."""

    newly: bool
    last: bool


class Ledger:
    """Face of the ledger; what changes it is one atomic step (``send``: one for every 500 shards).

    Args:
        client: A redis-py client with ``decode_responses=True``.
        prefix: Prefix of all keys.
    """

    def __init__(self, client: RedisClient, prefix: str = KEY_PREFIX) -> None:
        self._client = client
        self._prefix = prefix
        self._script = client.register_script(_SOURCE)

    def _step(self, name: str, *arguments: object) -> Any:
        return self._script(keys=[self._prefix], args=[name, *arguments])

    def _key(self, run_id: str, part: str = "") -> str:
        return f"{self._prefix}run:{run_id}" + (part and f":{part}")

    def open(self, run_id: str, uri: str, options: Options, *, artifact: str = "", state: str = "closed") -> bool:
        """Makes a run known, or known again. ``state`` is ``open`` for a stream that still grows, else ``closed``.

        Returns:
            Whether this server did not know the run.
        """
        header = ("uri", uri, "options", json.dumps(asdict(options)), "state", state)
        return bool(self._step("open", run_id, artifact, *header))

    def send(self, run_id: str, shards: Iterable[Shard]) -> int:
        """Lets shards wait for a worker, unless they wait, are leased or done already; returns how many now do."""
        flat: list[object] = []
        for shard in shards:
            flat += [shard.index, f"{shard.documents} {shard.first} {shard.sha256}"]
        size = 2 * _SEND_CHUNK
        return sum(int(self._step("send", run_id, *flat[at : at + size])) for at in range(0, len(flat), size))

    def claim(self, artifact: str, lease_seconds: float, now: float | None = None) -> Claim | None:
        """Leases the next shard that ``artifact`` may serve; the first claim binds a run to its artifact.

        Raises:
            MessageError: the entry does not fit the contract; it is counted and nobody is sent it again.
        """
        fresh_until = time.monotonic() + lease_seconds / 2
        entry = self._step("claim", artifact, _ms(lease_seconds), _now(now))
        if entry is None:
            return None
        try:
            return _parse_claim(entry, fresh_until)
        except MessageError as error:
            self._step("bury", *entry[:2], str(error))
            raise

    def renew(self, claim: Claim, lease_seconds: float, now: float | None = None) -> bool:
        """Extends a lease; False where it went to another."""
        return bool(self._step("renew", *_held(claim), _ms(lease_seconds), _now(now)))

    def probe(self, claim: Claim, trial: int | None) -> bool:
        """Notes which trial of the shard is about to begin, or that none is, so that a crash has a name.

        Returns:
            False without the lease.
        """
        return bool(self._step("probe", *_held(claim), "" if trial is None else trial))

    def strikes(self, run_id: str) -> dict[int, int]:
        """How often each trial crashed its worker."""
        return {int(index): int(n) for index, n in self._client.hgetall(self._key(run_id, "strikes")).items()}

    def release(self, claim: Claim, trouble: str = "") -> bool:
        """Hands a shard back; the attempt does not count. ``trouble`` is shown to people until a shard succeeds."""
        return bool(self._step("release", *_held(claim), trouble))

    def bury(self, claim: Claim, trouble: str) -> None:
        """Takes a shard that must not be served out of the ledger, until it is sent again; it is counted."""
        self._step("bury", claim.run_id, claim.shard.index, trouble)

    def complete(
        self, claim: Claim, *, ok: int, rejected: int, tokens: int, computed: int, now: float | None = None
    ) -> Completion:
        """Records that the shard's part is committed; a repeated call changes no counter."""
        newly, last = self._step("complete", *_held(claim), ok, rejected, tokens, computed, _now(now))
        return Completion(bool(newly), bool(last))

    def seal(self, run_id: str) -> bool:
        """Closes a stream: no more shards will be sent. Returns whether the run's last step now waits."""
        return bool(self._step("seal", run_id))

    def forget(self, run_id: str, shard: int) -> bool:
        """Takes a result back whose part was removed on purpose, so that the shard can be sent again."""
        return bool(self._step("forget", run_id, shard))

    def reap(self, now: float | None = None) -> tuple[int, int]:
        """Lets expired leases wait again; returns (shards put back, shards that wait in all runs)."""
        expired, waiting = self._step("reap", _now(now))
        return int(expired), int(waiting)

    def cancel(self, run_id: str) -> bool:
        """Stops what has not started; what is leased may finish."""
        return bool(self._step("cancel", run_id))

    def close(self, run_id: str) -> None:
        """Takes a finished run off the books; its counters stay readable for a day."""
        self._step("close", run_id, CLOSED_SECONDS)

    def drop(self, run_id: str) -> None:
        """Forgets a run at once."""
        self._step("drop", run_id)

    def greet(self, worker: WorkerProcess, seconds: float) -> None:
        """Says that a worker process lives, for so long; 0 where it leaves."""
        self._step("greet", json.dumps(asdict(worker)), _ms(seconds))

    def workers(self) -> list[WorkerProcess]:
        """Worker processes that were heard of lately, by name."""
        found = []
        for entry in self._step("workers"):
            with suppress(AttributeError, TypeError, ValueError):  # an entry of another version, or nobody's
                found.append(WorkerProcess(**{name: str(value) for name, value in json.loads(entry).items()}))
        return sorted(found, key=lambda worker: worker.name)

    def runs(self) -> list[str]:
        """Runs that workers look at, the next to be served first."""
        return [str(run) for run in self._client.zrange(f"{self._prefix}runs", 0, -1)]

    def done(self, run_id: str) -> set[int]:
        """Shards whose completion the ledger has seen."""
        return {int(shard) for shard in self._client.hkeys(self._key(run_id, "results"))}

    def progress(self, run_id: str) -> Progress:
        """A run's counters; all zero and state ``unknown`` for a run that this server does not know."""
        header = self._client.hgetall(self._key(run_id))
        numbers = {
            name: int(header.get(name, 0))
            for name in ("submitted", "ok", "rejected", "tokens", "computed", "redeliveries", "duplicates", "buried")
        }
        return Progress(
            **numbers,
            state=header.get("state", "unknown"),
            waiting=int(self._client.zcard(self._key(run_id, "pending"))),
            leased=int(self._client.zcard(self._key(run_id, "leases"))),
            done=int(self._client.hlen(self._key(run_id, "results"))),
            started=int(header.get("started", 0)) / 1000,
            finished=int(header.get("finished", 0)) / 1000,
            artifact=header.get("artifact", ""),
            trouble=header.get("trouble", ""),
        )


def _held(claim: Claim) -> tuple[str, int, str]:
    return claim.run_id, claim.shard.index, claim.token


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _now(now: float | None) -> object:
    return "" if now is None else _ms(now)


def _parse_claim(entry: list[Any], fresh_until: float) -> Claim:
    try:
        run_id, shard, token, attempts, waited, uri, options, spec = entry
        if not RUN_ID.fullmatch(run_id) or not uri:
            raise ValueError("run id or folder")
        parsed = _parse_shard(int(shard), spec)
        options = options_from(json.loads(options))
        return Claim(run_id, str(uri), options, parsed, str(token), int(attempts), waited / 1000, fresh_until)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"a ledger entry does not fit the contract ({error}): {entry!r:.200}") from None


def _parse_shard(index: int, spec: str) -> Shard:
    if index == FINISH:
        return Shard(FINISH, 0, 0, "")
    documents, first, sha256 = spec.split(" ")
    if index < 0 or int(documents) <= 0 or not 0 <= int(first) < MAX_INDEX or not SHA256.fullmatch(sha256):
        raise ValueError("shard number, size or hash")
    return Shard(index, int(first), int(documents), sha256)
