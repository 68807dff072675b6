"""The ledger: who holds which shard, how often it was tried, what is done; in Redis, beside Celery's queue.

The run's folder holds the results; the ledger holds what makes progress cheap, and losing it loses no result. Celery's
messages say which shard to tag; the ledger decides whether the one who received a message does. A shard is in exactly
one place: pending (no message yet), sent, leased or recorded. Each step is one atomic function of ``ledger.lua``.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from typing import Any, Protocol

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.message import FINISH, KEY_PREFIX, PRIORITIES, QUEUE, queue_of
from nermill.worker.contracts.plan import Options, Plan, Shard, options_from, plan_json
from nermill.worker.contracts.records import (
    TRANSITIONS,
    Claim,
    Completion,
    Message,
    Progress,
    RunState,
    WorkerProcess,
    lease_of,
    parse_shard,
    shard_entry,
)

CLOSED_SECONDS = 86_400  # how long a finished run's counters stay readable
UNABLE_SECONDS = 60.0  # how long a worker that cannot read a run's folder leaves that run to others
SETTLE_SECONDS = 1.0  # a message is not missed before that age
_CHUNK = 500


def _script() -> str:
    moves = ", ".join(
        f"{start.value} = {{{', '.join(f'{end.value} = true' for end in ends)}}}" for start, ends in TRANSITIONS.items()
    )
    source = files("nermill.worker.contracts").joinpath("ledger.lua").read_text("utf-8")
    return source.replace("{{MOVES}}", f"{{{moves}}}")


class RedisClient(Protocol):
    """The few calls of redis-py that the ledger makes (a client made with ``decode_responses=True``)."""

    def register_script(self, script: str) -> Any: ...
    def hgetall(self, name: str) -> Any: ...
    def hget(self, name: str, key: str) -> Any: ...
    def hvals(self, name: str) -> Any: ...
    def hkeys(self, name: str) -> Any: ...
    def hlen(self, name: str) -> Any: ...
    def zcard(self, name: str) -> Any: ...
    def zrange(self, name: str, start: int, end: int) -> Any: ...
    def smembers(self, name: str) -> Any: ...
    def set(self, name: str, value: int, *, nx: bool, px: int) -> Any: ...


class Ledger:
    """The ledger's steps; each is atomic (``add``: one step for every 500 shards).

    Args:
        client: A redis-py client with ``decode_responses=True``.
        prefix: Prefix of all keys.
    """

    def __init__(self, client: RedisClient, prefix: str = KEY_PREFIX) -> None:
        self.client = client
        self._prefix = prefix
        self._script = client.register_script(_script())

    def step(self, name: str, *arguments: object) -> Any:
        """Runs one step of ``ledger.lua``."""
        return self._script(keys=[self._prefix], args=[name, *arguments])

    def key(self, run_id: str, part: str = "") -> str:
        """A run's key in Redis."""
        return f"{self._prefix}run:{run_id}" + (part and f":{part}")

    def open(
        self,
        run_id: str,
        uri: str,
        options: Options,
        *,
        artifact: str = "",
        state: RunState = RunState.CLOSED,
        priority: int = PRIORITIES["normal"],
        plan: Plan | None = None,
    ) -> bool:
        """Makes a run known, or known again.

        Args:
            artifact: sha256 of the artifact that must serve it; empty leaves it to the first worker.
            state: ``OPEN`` for a stream that still grows, else ``CLOSED``.
            priority: Of its messages: 3, 6 or 9; the smallest goes first.
            plan: Of a run by value: what the first worker writes into the run's folder.

        Returns:
            Whether this server did not know the run.
        """
        header = ["uri", uri, "options", json.dumps(asdict(options))]
        if plan is not None:
            header += ["plan", plan_json(plan)]
        return bool(self.step("open", run_id, state.value, artifact, priority, *header))

    def reopen(self, run_id: str, state: RunState, now: float | None = None) -> bool:
        """Lets a run take shards again, as ``OPEN`` or ``CLOSED``; False while somebody is at its last step."""
        return bool(self.step("reopen", run_id, state.value, _now(now)))

    def add(self, run_id: str, shards: Iterable[Shard]) -> int:
        """Makes shards pending, unless they are pending, sent, leased or recorded; returns how many newly are."""
        return sum(self.in_chunks("add", run_id, shards))

    def in_chunks(self, step: str, run_id: str, shards: Iterable[Shard]) -> list[Any]:
        """A step with many shards as arguments, some at a time; the answers."""
        flat = [entry for shard in shards for entry in (shard.index, shard_entry(shard))]
        size = 2 * _CHUNK
        return [self.step(step, run_id, *flat[at : at + size]) for at in range(0, len(flat), size)]

    def promote(self, queue: str, now: float | None = None) -> list[Message]:
        """Moves pending shards of a queue into its window of messages, runs in turn; returns what to send."""
        return _messages(queue, self.step("promote", queue, _now(now)))

    def recover(self, queue: str, depth: int, now: float | None = None) -> list[Message]:
        """What was sent and is lost: neither begun nor among the ``depth`` messages of the queue, in two calls."""
        return _messages(queue, self.step("recover", queue, depth, _ms(SETTLE_SECONDS), _now(now)))

    def begin_recovery(self, every: float) -> bool:
        """Whether nobody looked for lost work in the last ``every`` seconds; if so, the caller does now."""
        return bool(self.client.set(f"{self._prefix}recovery", 1, nx=True, px=max(1, _ms(every))))

    def lease(
        self,
        run_id: str,
        shard: int | None,
        worker: WorkerProcess,
        lease_seconds: float,
        now: float | None = None,
        *,
        is_whole: bool = False,
    ) -> Claim | str:
        """Leases a shard, or a run's last step; the first lease binds a run to the worker's artifact.

        Args:
            is_whole: The caller sees all parts of the run: its last step is due whatever is recorded, unless the run
                is open or has a producer.

        Returns:
            The claim, or why there is none: ``unknown``, ``done``, ``leased elsewhere``, ``cancelled``, ``blocked``,
            ``quarantined``, ``other artifact``, ``unable``, ``not due``.

        Raises:
            MessageError: the ledger's entry does not fit the contract; the shard is quarantined.
        """
        fresh_until = time.monotonic() + lease_seconds / 2
        lease, number = uuid.uuid4().hex, FINISH if shard is None else str(shard)
        state, *entry = self.step(
            "lease",
            run_id,
            number,
            lease,
            worker.name,
            worker.artifact,
            _ms(lease_seconds),
            "whole" if is_whole else "",
            _now(now),
        )
        if state != "leased":
            return str(state)
        try:
            attempts, waited, uri, options, spec, packed = entry
            parsed = None if shard is None else parse_shard(shard, spec)
            options = options_from(json.loads(options))
            return Claim(
                run_id, str(uri), options, parsed, lease, int(attempts), waited / 1000, fresh_until, int(packed)
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = f"run {run_id} shard {number}: the ledger's entry does not fit the contract ({error})"
            self.step("quarantine", run_id, number, lease, reason)
            raise MessageError(reason) from None

    def renew(
        self, claim: Claim, lease_seconds: float, now: float | None = None, *, tokens: tuple[int, int] | None = None
    ) -> bool:
        """Extends a lease; False where it ended: another worker may hold the shard, or nobody.

        Args:
            tokens: Tokens of the shard that are computed, and all of them; for people, as long as the shard is leased.
        """
        told = "" if tokens is None else "{} {}".format(*tokens)
        return bool(self.step("renew", *lease_of(claim), _ms(lease_seconds), told, _now(now)))

    def probe(self, claim: Claim, trial: str | None) -> bool:
        """Notes which trial of the shard is about to begin, or that none is, so that a crash is attributed to it.

        Returns:
            False without the lease.
        """
        return bool(self.step("probe", *lease_of(claim), trial or ""))

    def strikes(self, run_id: str) -> dict[str, int]:
        """How often each trial ended its worker."""
        return {str(name): int(n) for name, n in self.client.hgetall(self.key(run_id, "strikes")).items()}

    def release(self, claim: Claim, last_error: str = "") -> bool:
        """Gives a shard back; the attempt does not count. ``last_error`` is shown to people until a shard succeeds."""
        return bool(self.step("release", *lease_of(claim), last_error))

    def unable(self, run_id: str, worker: str, reason: str, now: float | None = None) -> bool:
        """Notes that a worker cannot read a run's folder; returns whether no live worker can, so the run is blocked."""
        return bool(self.step("unable", run_id, worker, _ms(UNABLE_SECONDS), reason, _now(now)))

    def quarantine(self, claim: Claim, last_error: str) -> None:
        """Takes a shard that must not be served out of the queue until it is sent again; a last step, if it is held."""
        self.step("quarantine", *lease_of(claim), last_error)

    def complete(
        self,
        claim: Claim,
        worker: str,
        *,
        ok: int,
        rejected: int,
        tokens: int,
        computed: int,
        now: float | None = None,
    ) -> Completion:
        """Records that the shard's part is committed; a repeated call changes no counter."""
        newly, last = self.step("complete", *lease_of(claim), worker, ok, rejected, tokens, computed, _now(now))
        return Completion(bool(newly), bool(last))

    def seal(self, run_id: str) -> bool:
        """Closes a stream: no more shards will be added. Returns whether the run's last step is due now."""
        return bool(self.step("seal", run_id))

    def forget(self, run_id: str, shard: int) -> bool:
        """Removes the result of a shard whose part was removed on purpose, so that the shard can be sent again."""
        return bool(self.step("forget", run_id, shard))

    def expire(self, now: float | None = None) -> int:
        """Makes shards whose lease ended pending again; returns how many."""
        return int(self.step("expire", _now(now)))

    def load(self) -> tuple[int, int]:
        """Shards of all runs that no worker began, and shards that are leased."""
        waiting, leased = self.step("load")
        return int(waiting), int(leased)

    def cancel(self, run_id: str) -> bool:
        """Stops what has not started; what is leased may finish. False for a run that is unknown or finished."""
        return bool(self.step("cancel", run_id))

    def close(self, run_id: str, claim: Claim | None = None, scores: str = "") -> bool:
        """Marks a run finished; its counters stay readable for a day.

        Args:
            claim: The lease of the run's last step; False is returned where it is not held any more.
            scores: Of the run's evaluation, as JSON, for producers that cannot read the run's folder.
        """
        return bool(self.step("close", run_id, claim.lease if claim else "", CLOSED_SECONDS, scores))

    def drop(self, run_id: str) -> None:
        """Forgets a run at once."""
        self.step("drop", run_id)

    def register(self, worker: WorkerProcess, seconds: float) -> None:
        """Says that a worker process lives, for so long; 0 where it leaves."""
        self.step("register", json.dumps(asdict(worker)), worker.name, queue_of(worker.artifact), _ms(seconds))

    def workers(self) -> list[WorkerProcess]:
        """Live worker processes, by name."""
        found = []
        for entry in self.step("workers"):
            with suppress(AttributeError, TypeError, ValueError):  # an entry of another version
                found.append(WorkerProcess(**{name: str(value) for name, value in json.loads(entry).items()}))
        return sorted(found, key=lambda worker: worker.name)

    def queues(self) -> list[str]:
        """Queues that runs or workers use."""
        return sorted({QUEUE, *map(str, self.client.smembers(f"{self._prefix}queues"))})

    def waiting_queues(self) -> list[str]:
        """Queues with shards that no worker began."""
        return [str(queue) for queue in self.step("waiting")]

    def done(self, run_id: str) -> set[int]:
        """Shards whose completion the ledger has recorded."""
        return {int(shard) for shard in self.client.hkeys(self.key(run_id, "results"))}

    def at_work(self, run_id: str) -> set[int]:
        """Shards that wait, whose message was sent, or that a worker holds."""
        return {int(shard) for shard in self.step("at_work", run_id) if shard != FINISH}

    def uri(self, run_id: str) -> str:
        """A run's folder or URI; empty for a run that this server does not know."""
        return str(self.client.hget(self.key(run_id), "uri") or "")

    def progress(self, run_id: str) -> Progress:
        """A run's counters; all zero and state ``unknown`` for a run that this server does not know."""
        # Read before the header, which has the reason.
        quarantined = int(self.client.hlen(self.key(run_id, "quarantined")))
        header = self.client.hgetall(self.key(run_id))
        numbers = {
            name: int(header.get(name, 0))
            for name in ("submitted", "ok", "rejected", "tokens", "computed", "redeliveries", "duplicates", "blocked")
        }
        leased_tokens = [str(told).split() for told in self.client.hvals(self.key(run_id, "tokens"))]
        return Progress(
            **numbers,
            leased_computed=sum(int(done) for done, _ in leased_tokens),
            leased_tokens=sum(int(total) for _, total in leased_tokens),
            state=header.get("state", "unknown"),
            pending=int(self.client.zcard(self.key(run_id, "pending"))),
            sent=int(self.client.hlen(self.key(run_id, "sent"))),
            leased=int(self.client.hlen(self.key(run_id, "leases"))),
            quarantined=quarantined,
            done=int(self.client.hlen(self.key(run_id, "results"))),
            planned=int(self.client.hlen(self.key(run_id, "shards"))),
            started=int(header.get("started", 0)) / 1000,
            finished=int(header.get("finished", 0)) / 1000,
            artifact=header.get("artifact", ""),
            last_error=header.get("last_error", ""),
            scores=header.get("scores", ""),
        )


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _now(now: float | None) -> object:
    return "" if now is None else _ms(now)


def _messages(queue: str, flat: list[Any]) -> list[Message]:
    messages = []
    for run_id, uri, shard, priority in zip(*[iter(map(str, flat))] * 4, strict=True):
        with suppress(ValueError):  # a shard that is no number: nobody could tag it
            messages.append(Message(queue, run_id, uri, None if shard == FINISH else int(shard), int(priority)))
    return messages
