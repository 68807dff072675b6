"""The ledger on a real server, against a model of it: nothing lost, one winner, no recorded shard changes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis
from redis.exceptions import ResponseError

from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.by_value import Documents, Held
from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.ledger import UNABLE_SECONDS, Ledger
from nermill.worker.contracts.message import PRIORITIES, QUEUE, queue_of
from nermill.worker.contracts.plan import Options, Shard
from nermill.worker.contracts.records import TRANSITIONS, Claim, Completion, Message, RunState, WorkerProcess

LEASE = 60.0
SHA = "0" * 64
ART, OTHER = "a" * 64, "b" * 64


def shard(index: int) -> Shard:
    return Shard(index, index * 10, 10, SHA)


def worker(artifact: str = ART, name: str = "w") -> WorkerProcess:
    return WorkerProcess(name, "cpu", "model", artifact)


@pytest.fixture
def client(embedded_broker_url: str) -> Iterator[Redis]:
    with redis_client(embedded_broker_url) as made:
        yield made


@pytest.fixture
def ledger(client: Redis) -> Ledger:
    """A ledger of its own, under a prefix of its own."""
    return Ledger(client, f"test-{uuid.uuid4().hex}:")


def begin(ledger: Ledger, shards: int, run: str = "r", **options: object) -> None:
    ledger.open(run, "/out", Options(), **options)  # type: ignore[arg-type]
    ledger.add(run, [shard(n) for n in range(shards)])


def due(ledger: Ledger, artifact: str = ART, now: float | None = None) -> list[Message]:
    """The messages that are sent now, in the order in which Redis would deliver them."""
    sent = [message for queue in (QUEUE, queue_of(artifact)) for message in ledger.promote(queue, now)]
    return sorted(sent, key=lambda message: message.priority)


class Delivery:
    """The queue between the ledger and one worker."""

    def __init__(self, ledger: Ledger, of: WorkerProcess | None = None) -> None:
        self.ledger, self.worker = ledger, of or worker()
        self.messages: list[Message] = []

    def next(self, now: float | None = None) -> Claim | None:
        """Leases the next shard whose message is there."""
        self.messages += due(self.ledger, self.worker.artifact, now)
        while self.messages:
            message = self.messages.pop(0)
            claim = self.ledger.lease(message.run_id, message.shard, self.worker, LEASE, now)
            if isinstance(claim, Claim):
                return claim
        return None

    def one(self, now: float | None = None) -> Claim:
        claim = self.next(now)
        assert claim is not None
        return claim


def record(ledger: Ledger, claim: Claim) -> Completion:
    return ledger.complete(claim, "w", ok=9, rejected=1, tokens=100, computed=110)


def complete(ledger: Ledger, claim: Claim) -> bool:
    return record(ledger, claim).newly


def index_of(claim: Claim | None) -> int | None:
    return None if claim is None or claim.shard is None else claim.shard.index


def test_shards_are_leased_in_order_under_random_ids(ledger: Ledger) -> None:
    begin(ledger, 3)
    queue = Delivery(ledger)
    claims = [queue.next() for _ in range(4)]
    assert [index_of(claim) for claim in claims] == [0, 1, 2, None]
    assert len({claim.lease for claim in claims if claim}) == 3


def test_a_lease_from_before_the_server_was_emptied_is_worth_nothing(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 1)
    old = Delivery(ledger).one()
    ledger.drop("r")
    begin(ledger, 1)
    heir = Delivery(ledger).one()
    assert not ledger.renew(old, LEASE)
    assert not ledger.release(old)
    assert ledger.renew(heir, LEASE)


def test_tokens_that_are_told_with_a_renewal_are_known_as_long_as_the_shard_is_leased(ledger: Ledger) -> None:
    begin(ledger, 3)
    queue = Delivery(ledger)
    claims = [queue.one(now=0), queue.one(now=0), queue.one(now=0)]

    def known() -> tuple[int, int]:
        progress = ledger.progress("r")
        return progress.leased_computed, progress.leased_tokens

    assert known() == (0, 0)
    for claim, tokens in zip(claims, [(10, 100), (20, 200), (30, 300)], strict=True):
        ledger.renew(claim, LEASE, 0, tokens=tokens)
    assert known() == (60, 600)
    ledger.renew(claims[0], LEASE, 0, tokens=(90, 100))
    ledger.renew(claims[1], LEASE, 0)  # what it told before stays
    assert known() == (140, 600)
    complete(ledger, claims[0])
    ledger.release(claims[1])
    assert known() == (30, 300)
    ledger.expire(now=LEASE + 1)
    assert known() == (0, 0)


def test_adding_again_changes_nothing(ledger: Ledger) -> None:
    begin(ledger, 3)
    queue = Delivery(ledger)
    queue.one()
    complete(ledger, queue.one())
    assert ledger.add("r", [shard(n) for n in range(3)]) == 0
    assert ledger.progress("r").submitted == 30


def test_a_worker_whose_lease_ended_cannot_renew_probe_or_release_and_completes_only_once(ledger: Ledger) -> None:
    begin(ledger, 1)
    queue = Delivery(ledger)
    late = queue.one(now=0)
    assert ledger.expire(now=LEASE + 1) == 1
    heir = queue.one(now=LEASE + 2)
    assert heir.attempts == 2
    assert not ledger.renew(late, LEASE)
    assert not ledger.probe(late, "3-3")
    assert not ledger.release(late)
    assert complete(ledger, heir)
    assert not complete(ledger, late)
    progress = ledger.progress("r")
    assert (progress.ok, progress.rejected, progress.duplicates, progress.redeliveries) == (9, 1, 1, 1)


def test_a_second_message_for_a_shard_says_why_it_is_not_leased(ledger: Ledger) -> None:
    begin(ledger, 2)
    queue = Delivery(ledger)
    claim = queue.one()
    assert ledger.lease("r", 0, worker(), LEASE) == "leased elsewhere"
    complete(ledger, claim)
    assert ledger.lease("r", 0, worker(), LEASE) == "done"
    assert ledger.lease("r", 7, worker(), LEASE) == "unknown"
    assert ledger.lease("nobody", 0, worker(), LEASE) == "unknown"
    assert ledger.lease("r", None, worker(), LEASE) == "not due"
    ledger.cancel("r")
    assert ledger.lease("r", 1, worker(), LEASE) == "cancelled"


def test_runs_take_turns(ledger: Ledger) -> None:
    begin(ledger, 4, "large", artifact=ART)
    begin(ledger, 2, "small", artifact=ART)
    queue = Delivery(ledger)
    order = [claim.run_id for claim in (queue.next() for _ in range(6)) if claim]
    assert sorted(order[:2]) == sorted(order[2:4]) == ["large", "small"]


def test_the_window_of_messages_is_bounded_and_grows_with_the_workers(ledger: Ledger) -> None:
    begin(ledger, 50, artifact=ART)
    assert len(due(ledger)) == 2
    assert due(ledger) == []
    for n in range(3):
        ledger.register(worker(name=f"w{n}"), 60)
    assert len(due(ledger)) == 4
    assert isinstance(ledger.lease("r", 0, worker(), LEASE), Claim)
    assert [message.shard for message in due(ledger)] == [6]


def test_a_higher_priority_has_a_window_of_its_own(ledger: Ledger) -> None:
    begin(ledger, 9, "low", artifact=ART, priority=PRIORITIES["low"])
    assert len(due(ledger)) == 2
    begin(ledger, 9, "high", artifact=ART, priority=PRIORITIES["high"])
    assert [(message.run_id, message.priority) for message in due(ledger)] == [("high", 3), ("high", 3)]


def test_the_first_shard_binds_a_run_to_the_artifact_that_serves_it(ledger: Ledger) -> None:
    begin(ledger, 3)
    first, second = Delivery(ledger), Delivery(ledger, worker(OTHER))
    assert len(due(ledger)) == 1, "one shard until its worker has bound the run"
    assert ledger.lease("r", 0, worker(), LEASE) != "unknown"
    assert second.next() is None
    assert {message.queue for message in due(ledger)} == {queue_of(ART)}
    assert ledger.lease("r", 1, worker(OTHER), LEASE) == "other artifact"
    assert index_of(first.next()) == 1, "its message was sent again, to the queue of the run's artifact"


@pytest.mark.parametrize(
    ("trials", "strikes"), [(["7-7"], {"7-7": 3}), (["7-7", None], {})], ids=["during a trial", "after the last trial"]
)
def test_a_crash_during_a_trial_is_a_strike_against_it(
    ledger: Ledger, trials: list[str | None], strikes: dict[str, int]
) -> None:
    begin(ledger, 1)
    queue = Delivery(ledger)
    for n in range(3):
        claim = queue.one(now=n * 100)
        assert all(ledger.probe(claim, trial) for trial in trials)
        ledger.expire(now=n * 100 + LEASE + 1)
    queue.one(now=1000)
    assert ledger.strikes("r") == strikes


def test_a_claim_says_how_long_its_shard_waited(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 2)
    time.sleep(0.2)
    assert ledger.add("r", [shard(0), shard(1)]) == 0, "added again, it waits since it was added first"
    queue = Delivery(ledger)
    claim = queue.one()
    assert 0.2 <= claim.waited < 5
    assert 0 < claim.fresh_until - time.monotonic() < LEASE / 2
    assert ledger.release(claim)
    client.hset(ledger.key("r", "since"), "1", "nonsense")
    waited = {index_of(claim): claim.waited for claim in (queue.one(), queue.one())}
    assert waited[0] < 0.2, "released, it waits since then"
    assert waited[1] == 0
    assert client.hlen(ledger.key("r", "since")) == 0


def test_a_release_is_no_attempt_and_no_strike(ledger: Ledger) -> None:
    begin(ledger, 1)
    queue = Delivery(ledger)
    claim = queue.one()
    ledger.probe(claim, "7-7")
    assert ledger.release(claim)
    assert queue.one().attempts == 1
    assert ledger.strikes("r") == {}


def test_cancel_stops_what_waits_and_lets_what_is_leased_finish(ledger: Ledger) -> None:
    begin(ledger, 3)
    queue = Delivery(ledger)
    claim = queue.one()
    assert ledger.cancel("r")
    assert queue.next() is None
    assert ledger.add("r", [shard(5)]) == 0
    assert complete(ledger, claim)
    assert ledger.progress("r").state == "cancelled"


def test_cancelled_and_finished_runs_leave_the_indexes_and_expire(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 3, "cancelled")
    begin(ledger, 1, "finished")
    queue = Delivery(ledger)
    ledger.cancel("cancelled")
    complete(ledger, queue.one())
    finish = queue.one()
    assert finish.shard is None
    assert ledger.close("finished", finish)
    assert ledger.progress("finished").ok == 9
    assert ledger.load() == (0, 0)
    assert ledger.waiting_queues() == []
    for run in ("cancelled", "finished"):
        keys = list(client.keys(f"{ledger._prefix}run:{run}*"))
        assert keys
        assert all(0 < client.ttl(key) <= 86_400 for key in keys)


def test_forgetting_removes_the_counts(ledger: Ledger) -> None:
    begin(ledger, 1)
    complete(ledger, Delivery(ledger).one())
    assert ledger.forget("r", 0)
    assert not ledger.forget("r", 0)
    progress = ledger.progress("r")
    assert (progress.ok, progress.rejected, progress.tokens, progress.computed, progress.done) == (0, 0, 0, 0, 0)
    assert ledger.add("r", [shard(0)]) == 1
    assert ledger.progress("r").state == "closed"


def test_the_last_step_is_due_once_when_all_shards_are_recorded(ledger: Ledger) -> None:
    begin(ledger, 2)
    queue = Delivery(ledger)
    first, second = queue.one(now=0), queue.one(now=0)
    counts = {"ok": 10, "rejected": 0, "tokens": 1, "computed": 1}
    assert not ledger.complete(first, "w", **counts).last
    assert ledger.complete(second, "w", **counts).last
    assert not ledger.complete(second, "w", **counts).last
    finish = queue.one(now=0)
    assert finish.shard is None
    assert ledger.expire(now=LEASE + 1) == 1, "its worker was killed"
    again = queue.one(now=LEASE + 2)
    assert again.attempts == 2
    assert not ledger.close("r", finish)
    assert ledger.close("r", again)
    assert queue.next() is None
    assert ledger.progress("r").state == "finished"
    assert ledger.progress("r").ok == 20


def test_a_run_that_is_sealed_again_has_its_last_step_once(ledger: Ledger) -> None:
    begin(ledger, 1)
    queue = Delivery(ledger)
    assert ledger.complete(queue.one(now=0), "w", ok=10, rejected=0, tokens=1, computed=1).last
    [message] = due(ledger, now=0)
    ledger.open("r", "/out", Options())
    assert not ledger.seal("r"), "its message was sent"
    finish = ledger.lease("r", message.shard, worker(), LEASE, 0)
    assert isinstance(finish, Claim)
    ledger.open("r", "/out", Options())
    assert not ledger.seal("r"), "a worker is at it"
    assert due(ledger, now=0) == []
    assert ledger.renew(finish, LEASE, 0)
    assert ledger.close("r", finish)
    ledger.open("r", "/out", Options())
    assert ledger.seal("r"), "it is due again"


@pytest.mark.parametrize("end", ["close", "cancel"])
def test_a_run_that_ended_before_it_is_sealed_stays_so(ledger: Ledger, end: str) -> None:
    begin(ledger, 1)
    queue = Delivery(ledger)
    complete(ledger, queue.one(now=0))
    getattr(ledger, end)("r")
    before = ledger.progress("r").state
    assert not ledger.seal("r")
    assert ledger.progress("r").state == before
    assert queue.next(now=0) is None


def test_a_last_step_that_began_before_more_shards_came_has_no_say(ledger: Ledger) -> None:
    begin(ledger, 1)
    queue = Delivery(ledger)
    complete(ledger, queue.one(now=0))
    early = queue.one(now=0)
    assert early.shard is None
    ledger.add("r", [shard(1)])
    assert not ledger.renew(early, LEASE, 0)
    ledger.quarantine(early, "1 parts are missing")
    complete(ledger, queue.one(now=0))
    assert not ledger.close("r", early)
    last = queue.one(now=0)
    assert (last.shard, last.attempts) == (None, 1)
    ledger.quarantine(early, "1 parts are missing")
    assert ledger.close("r", last)
    assert ledger.progress("r").quarantined == 0


def test_a_stream_has_its_last_step_when_it_is_sealed(ledger: Ledger) -> None:
    ledger.open("r", "/out", Options(), state=RunState.OPEN)
    ledger.add("r", [shard(0)])
    claim = Delivery(ledger).one()
    assert not ledger.complete(claim, "w", ok=10, rejected=0, tokens=1, computed=1).last
    assert ledger.seal("r")
    assert not ledger.seal("r")


@pytest.mark.parametrize(
    ("field", "value"),
    [("options", "{"), ("options", '{"max_chars": "many"}'), ("options", '{"unknown": 1}'), ("uri", "")],
)
def test_an_entry_that_does_not_fit_is_quarantined_until_it_is_sent_again(
    ledger: Ledger, client: Redis, field: str, value: str
) -> None:
    begin(ledger, 2)
    (message,) = due(ledger)
    client.hset(ledger.key("r"), field, value)
    if field == "uri":
        assert isinstance(ledger.lease("r", message.shard, worker(), LEASE), Claim), "the root check refuses it"
        return
    with pytest.raises(MessageError, match="does not fit"):
        ledger.lease("r", message.shard, worker(), LEASE)
    assert ledger.lease("r", message.shard, worker(), LEASE) == "quarantined"
    assert ledger.progress("r").quarantined == 1
    assert "does not fit" in ledger.progress("r").last_error
    begin(ledger, 2)
    assert (ledger.progress("r").quarantined, ledger.progress("r").last_error) == (0, "")
    assert index_of(Delivery(ledger).one()) == 0


def test_a_late_worker_does_not_hold_up_a_run_that_was_lost_with_the_servers_memory(ledger: Ledger) -> None:
    begin(ledger, 3)
    (message,) = due(ledger)
    claim = ledger.lease("r", message.shard, worker(), LEASE)
    assert isinstance(claim, Claim)
    ledger.drop("r")
    begin(ledger, 3)
    assert [message.shard for message in due(ledger)] == [0], "one at a time, until a worker binds the run"
    ledger.complete(claim, "w", ok=10, rejected=0, tokens=1, computed=1)
    assert [message.shard for message in due(ledger)] == [1]


def test_a_shard_whose_worker_was_lost_when_its_run_was_finished_does_not_prolong_the_run(
    ledger: Ledger, client: Redis
) -> None:
    begin(ledger, 1)
    lost = Delivery(ledger).one(now=0)
    ledger.close("r")  # its producer found all parts in the folder

    def seconds() -> list[int]:
        return [client.ttl(key) for key in client.scan_iter(f"{ledger._prefix}run:r*")]

    assert ledger.expire(now=2 * LEASE) == 1
    assert all(0 < left <= 86_400 for left in seconds()), "while its shard waits"
    heir = Delivery(ledger).one()
    assert heir.key == lost.key
    assert all(0 < left <= 86_400 for left in seconds()), "while its shard is leased"
    assert complete(ledger, heir)
    assert all(0 < left <= 86_400 for left in seconds())


def test_a_late_worker_does_not_end_a_run_that_was_sent_again_without_its_shard(ledger: Ledger) -> None:
    begin(ledger, 2)
    claim = Delivery(ledger).one()
    ledger.drop("r")
    ledger.open("r", "/out", Options())
    ledger.add("r", [shard(1)])
    assert not ledger.complete(claim, "w", ok=10, rejected=0, tokens=1, computed=1).last
    assert (ledger.progress("r").state, ledger.progress("r").done) == ("closed", 0)


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_what_is_written_after_a_runs_end_is_forgotten_with_it(ledger: Ledger, client: Redis, end: str) -> None:
    begin(ledger, 2)
    claim = Delivery(ledger).one()
    getattr(ledger, end)("r")
    ledger.complete(claim, "w", ok=10, rejected=0, tokens=1, computed=1)
    ledger.unable("r", "w", "/out: not there")
    ledger.quarantine(claim, "refused")
    keys = list(client.scan_iter(f"{ledger._prefix}run:*"))
    assert {key.rpartition(":")[2] for key in keys} >= {"results", "unable", "quarantined"}
    assert all(0 < client.ttl(key) <= 86_400 for key in keys)


def test_the_last_step_is_left_to_workers_that_can_read_the_folder(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    able, blind = worker(name="able"), worker(name="blind")
    for process in (able, blind):
        ledger.register(process, 3600)
    claim = Delivery(ledger).one()
    ledger.complete(claim, "able", ok=10, rejected=0, tokens=1, computed=1)
    assert [message.shard for message in due(ledger)] == [None]
    finish = ledger.lease("r", None, blind, LEASE)
    assert isinstance(finish, Claim)
    ledger.release(finish, "/out: not there")
    assert not ledger.unable("r", "blind", "blind: /out: not there")
    assert [message.shard for message in due(ledger)] == [None]
    assert ledger.lease("r", None, blind, LEASE) == "unable"
    assert [message.shard for message in due(ledger)] == [None], "it waits for a message again"
    assert isinstance(ledger.lease("r", None, able, LEASE), Claim)


def test_a_run_that_no_live_worker_can_read_is_blocked(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    able, blind = worker(name="able"), worker(name="blind")
    for process in (able, blind):
        ledger.register(process, 3600)
    (message,) = due(ledger)
    claim = ledger.lease("r", message.shard, blind, LEASE)
    assert isinstance(claim, Claim)
    ledger.release(claim, "/out: not there")
    assert not ledger.unable("r", "blind", "blind: /out: not there")
    assert ledger.lease("r", 0, blind, LEASE) == "unable"
    later = time.time() + UNABLE_SECONDS + 1
    again = ledger.lease("r", 0, blind, LEASE, now=later)
    assert isinstance(again, Claim), "it tries again after a while"
    ledger.release(again)
    assert ledger.unable("r", "able", "able: /out: not there")
    progress = ledger.progress("r")
    assert progress.blocked
    assert "none of 2 workers" in progress.last_error
    assert "/out: not there" in progress.last_error
    assert due(ledger) == []


def blocked(ledger: Ledger, shards: int) -> tuple[list[Claim], WorkerProcess]:
    """Claims of two shards of a run that was blocked after them, and the worker that has them."""
    begin(ledger, shards, artifact=ART)
    able, blind = worker(name="able"), worker(name="blind")
    ledger.register(able, 3600)
    claims = [ledger.lease("r", message.shard, able, LEASE) for message in due(ledger)[:2]]
    ledger.register(able, 0)
    ledger.register(blind, 3600)
    assert ledger.unable("r", "blind", "blind: /out: not there")
    return [claim for claim in claims if isinstance(claim, Claim)], able


def test_messages_of_a_blocked_run_leave_their_shards_pending(ledger: Ledger) -> None:
    begin(ledger, 3, artifact=ART)
    ledger.register(worker(name="blind"), 3600)
    first, second = due(ledger)
    assert ledger.unable("r", "blind", "blind: /out: not there")
    for message in (first, second):
        assert ledger.lease("r", message.shard, worker(name="other"), LEASE) == "blocked"
    progress = ledger.progress("r")
    assert (progress.pending, progress.sent) == (3, 0)
    assert due(ledger) == [], "the run is blocked"
    begin(ledger, 3, artifact=ART)
    assert [message.shard for message in due(ledger)] == [0, 1]


def test_a_message_that_comes_after_its_lease_ended_leaves_the_shard_in_one_place(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    claim = Delivery(ledger).one()
    ledger.register(worker(name="blind"), 3600)
    assert ledger.unable("r", "blind", "blind: /out: not there")
    assert ledger.lease("r", 0, worker(name="other"), LEASE, now=time.time() + LEASE + 1) == "blocked"
    progress = ledger.progress("r")
    assert (progress.pending, progress.leased) == (1, 0)
    assert not ledger.renew(claim, LEASE)


def test_a_part_that_is_recorded_ends_the_block(ledger: Ledger) -> None:
    (first, second), able = blocked(ledger, 3)
    assert due(ledger) == []
    record(ledger, first)
    progress = ledger.progress("r")
    assert not progress.blocked
    assert progress.last_error == ""
    assert [message.shard for message in due(ledger)] == [2]
    assert ledger.unable("r", "blind", "blind: /out: not there"), "the only live worker still cannot read it"
    record(ledger, first)
    assert ledger.progress("r").blocked, "what was recorded before says nothing new"
    record(ledger, second)
    third = ledger.lease("r", 2, able, LEASE)
    assert isinstance(third, Claim)
    assert record(ledger, third).last
    assert [message.shard for message in due(ledger)] == [None]


def test_the_last_step_of_a_blocked_run_waits_until_it_is_sent_again(ledger: Ledger) -> None:
    (first, second), _ = blocked(ledger, 2)
    record(ledger, first)
    assert record(ledger, second).last
    (message,) = due(ledger)
    assert ledger.unable("r", "blind", "blind: /out: not there")
    assert ledger.lease("r", message.shard, worker(name="blind"), LEASE) == "blocked"
    assert due(ledger) == []
    assert ledger.progress("r").pending == 1
    ledger.open("r", "/out", Options(), artifact=ART)
    ledger.seal("r")
    assert [message.shard for message in due(ledger)] == [None]


def test_shards_that_come_after_the_last_step_was_due_go_to_the_queue_of_their_artifact(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    (message,) = due(ledger)
    claim = ledger.lease("r", message.shard, worker(), LEASE)
    assert isinstance(claim, Claim)
    assert record(ledger, claim).last
    ledger.add("r", [shard(0), shard(1)])
    assert ledger.promote(QUEUE) == []
    assert [message.shard for message in ledger.promote(queue_of(ART))] == [1]


def test_a_run_is_not_reopened_while_a_worker_is_at_its_last_step(ledger: Ledger) -> None:
    assert ledger.reopen("r", RunState.OPEN), "a run that is not known has no last step"
    assert ledger.progress("r").state == "unknown"
    begin(ledger, 1, artifact=ART)
    claim = Delivery(ledger).one()
    assert record(ledger, claim).last
    finish = Delivery(ledger).one()
    assert not ledger.reopen("r", RunState.OPEN)
    assert ledger.renew(finish, LEASE)
    later = time.time() + LEASE + 1
    assert ledger.lease("r", None, worker(), LEASE, now=later) == "not due", "nobody begins it again"
    assert ledger.reopen("r", RunState.OPEN, now=later)
    assert ledger.progress("r").state == "open"
    assert not ledger.renew(finish, LEASE), "who was at it may not mark the run"
    assert due(ledger) == []
    assert ledger.seal("r")
    assert ledger.close("r", Delivery(ledger).one())
    assert ledger.reopen("r", RunState.CLOSED)
    assert ledger.progress("r").state == "closed"


def test_a_producer_that_sees_all_parts_leases_the_last_step(ledger: Ledger) -> None:
    producer = worker(name="producer")
    assert ledger.lease("r", None, producer, LEASE, is_whole=True) == "unknown"
    begin(ledger, 2, artifact=ART)
    late = Delivery(ledger).one()
    ledger.register(worker(), 3600)
    assert ledger.unable("r", "w", "/out: not there")
    assert ledger.lease("r", None, producer, LEASE) == "not due"
    claim = ledger.lease("r", None, producer, LEASE, is_whole=True)
    assert isinstance(claim, Claim)
    assert ledger.progress("r").blocked == 1, "it sees its folder, workers do not"
    assert ledger.lease("r", None, worker(), LEASE, is_whole=True) == "leased elsewhere"
    assert ledger.at_work("r") == {0, 1}
    assert ledger.release(claim)
    assert ledger.at_work("r") == {0, 1}
    assert ledger.progress("r").state == "closed"
    assert ledger.progress("r").waiting == 1, "the last step is not due for a worker"
    claim = ledger.lease("r", None, producer, LEASE, is_whole=True)
    assert isinstance(claim, Claim)
    assert ledger.close("r", claim)
    assert record(ledger, late) == Completion(newly=True, last=False)
    assert (ledger.progress("r").state, ledger.at_work("r")) == ("finished", set()), "all parts are there"
    assert ledger.progress("r").blocked == 0
    assert isinstance(ledger.lease("r", None, producer, LEASE, is_whole=True), Claim), "a mark that was taken away"


def test_a_last_step_that_is_due_waits_for_a_worker_where_a_producer_gives_it_back(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    late = Delivery(ledger).one()
    claim = ledger.lease("r", None, worker(name="producer"), LEASE, is_whole=True)
    assert isinstance(claim, Claim)
    assert not record(ledger, late).last, "a producer is at it"
    assert ledger.release(claim)
    assert Delivery(ledger).one().shard is None


def test_a_worker_does_the_last_step_of_a_producer_that_was_lost(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    claim = ledger.lease("r", None, worker(name="producer"), LEASE, is_whole=True)
    assert isinstance(claim, Claim)
    ledger.expire(time.time() + LEASE + 1)
    assert ledger.progress("r").state == "finishing"
    assert {message.shard for message in due(ledger)} == {0, None}


def test_the_last_step_of_a_run_that_may_change_is_not_due(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 1, artifact=ART)
    record(ledger, Delivery(ledger).one())
    assert ledger.close("r", Delivery(ledger).one())
    held = ledger.key("r").replace("run:", "stream:")
    client.set(held, "a producer")
    assert ledger.lease("r", None, worker(), LEASE, is_whole=True) == "not due"
    client.delete(held)
    ledger.open("r", "/out", Options(), artifact=ART, state=RunState.OPEN)
    assert ledger.lease("r", None, worker(), LEASE, is_whole=True) == "not due"
    assert ledger.progress("r").state == "open"


def test_what_is_missing_in_two_looks_is_sent_again_the_oldest_first(ledger: Ledger) -> None:
    begin(ledger, 9, artifact=ART)
    queue = queue_of(ART)
    for n in range(3):
        ledger.register(worker(name=f"w{n}"), 3600)
    assert [message.shard for message in ledger.promote(queue, now=100)] == [0, 1, 2, 3, 4, 5]
    assert ledger.recover(queue, depth=6, now=200) == [], "all are in the queue"
    assert ledger.recover(queue, depth=4, now=210) == [], "two are missing, perhaps about to begin"
    assert [message.shard for message in ledger.recover(queue, depth=4, now=220)] == [0, 1]
    assert ledger.recover(queue, depth=6, now=230) == []
    assert len(ledger.recover(queue, depth=0, now=240)) == 6, "an empty queue has none of them"


def test_a_message_that_was_just_sent_is_not_missed(ledger: Ledger) -> None:
    begin(ledger, 1, artifact=ART)
    ledger.promote(queue_of(ART), now=100)
    assert ledger.recover(queue_of(ART), depth=0, now=100.5) == []
    assert len(ledger.recover(queue_of(ART), depth=0, now=102)) == 1


def test_one_looks_for_lost_work_at_a_time(ledger: Ledger) -> None:
    assert ledger.begin_recovery(60)
    assert not ledger.begin_recovery(60)


PATHS = {
    RunState.OPEN: ["open"],
    RunState.CLOSED: ["closed"],
    RunState.FINISHING: ["closed", "finishing"],
    RunState.FINISHED: ["closed", "finishing", "finished"],
    RunState.CANCELLED: ["closed", "cancelled"],
}


@pytest.mark.parametrize("start", RunState)
@pytest.mark.parametrize("end", RunState)
def test_a_run_moves_along_its_transitions_only(ledger: Ledger, client: Redis, start: RunState, end: RunState) -> None:
    ledger.open("r", "/out", Options(), state=RunState(PATHS[start][0]))
    for state in PATHS[start][1:]:
        ledger.open("r", "/out", Options(), state=RunState(state))
    assert ledger.progress("r").state == start.value
    if end is start or end in TRANSITIONS[start]:
        ledger.open("r", "/out", Options(), state=end)
        assert ledger.progress("r").state == end.value
    else:
        with pytest.raises(ResponseError, match=f"cannot go from {start.value} to {end.value}"):
            ledger.open("r", "/out", Options(), state=end)
        assert ledger.progress("r").state == start.value


class LedgerMachine(RuleBasedStateMachine):
    """Producers, workers, crashes, lost messages and a clock against a plain-Python model."""

    client: Redis

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.client, f"machine-{uuid.uuid4().hex}:")
        self.ledger.open("r", "/out", Options(), state=RunState.OPEN, artifact=ART)
        self.now = 0.0
        self.queue: list[int] = []
        self.waiting: set[int] = set()
        self.leased: dict[int, tuple[Claim, float]] = {}
        self.done: set[int] = set()
        self.old_claims: list[Claim] = []
        self.cancelled = False

    @rule(index=st.integers(0, 12))
    def submit(self, index: int) -> None:
        expected = not self.cancelled and index not in self.waiting | self.leased.keys() | self.done
        assert self.ledger.add("r", [shard(index)]) == expected
        if expected:
            self.waiting.add(index)

    @rule()
    def promote(self) -> None:
        self.queue += [message.shard for message in self.ledger.promote(queue_of(ART), self.now)]  # type: ignore[misc]

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def lose_or_repeat(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.queue))
        if data.draw(st.booleans()):
            self.queue.append(number)
        else:
            self.queue.remove(number)

    @rule()
    def recover(self) -> None:
        self.now += 2
        self._expire()
        again = self.ledger.recover(queue_of(ART), len(self.queue), self.now)
        assert {message.shard for message in again} <= self.waiting
        self.queue += [message.shard for message in again]  # type: ignore[misc]

    @precondition(lambda self: self.queue)
    @rule()
    def receive(self) -> None:
        index = self.queue.pop(0)
        claim = self.ledger.lease("r", index, worker(), LEASE, self.now)
        held = self.leased.get(index)
        if held and held[1] > self.now:
            assert claim == "leased elsewhere"
        elif index in self.done:
            assert claim == "done"
            self.leased.pop(index, None)
        elif self.cancelled:
            assert claim == "cancelled"
        else:
            assert isinstance(claim, Claim)
            assert claim.shard == shard(index)
            assert claim.lease not in {old.lease for old in self.old_claims}
            self.waiting.discard(index)
            self.leased[index] = (claim, self.now + LEASE)
            self.old_claims.append(claim)

    @rule(seconds=st.floats(1, 90))
    def time_passes(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)

    @rule()
    def expire(self) -> None:
        self._expire()

    def _expire(self) -> None:
        expired = {index for index, (_, until) in self.leased.items() if until <= self.now}
        for index in expired:
            del self.leased[index]
        self.waiting |= set() if self.cancelled else expired - self.done
        assert self.ledger.expire(self.now) == len(expired)

    @precondition(lambda self: self.old_claims)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.old_claims))
        held = self._held(claim)
        assert self.ledger.renew(claim, LEASE, self.now) == held
        if held:
            self.leased[index_of(claim)] = (claim, self.now + LEASE)  # type: ignore[index]

    @precondition(lambda self: self.old_claims)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.old_claims))
        index = index_of(claim)
        assert index is not None
        assert complete(self.ledger, claim) == (index not in self.done)
        if self._held(claim):
            del self.leased[index]
        self.waiting.discard(index)
        self.done.add(index)

    @precondition(lambda self: self.old_claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.old_claims))
        held = self._held(claim)
        index = index_of(claim)
        assert index is not None
        assert self.ledger.release(claim) == held
        if held:
            del self.leased[index]
            if not self.cancelled and index not in self.done:
                self.waiting.add(index)

    @rule(chance=st.integers(0, 30))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self.ledger.cancel("r")
            self.cancelled = True
            self.waiting.clear()

    def _held(self, claim: Claim) -> bool:
        return self.leased.get(index_of(claim), (None, 0))[0] == claim  # type: ignore[call-overload, arg-type, no-any-return]

    @invariant()
    def counters_agree(self) -> None:
        progress = self.ledger.progress("r")
        assert (progress.waiting, progress.leased, progress.done) == (
            len(self.waiting),
            len(self.leased),
            len(self.done),
        )
        assert (progress.ok, progress.rejected) == (9 * len(self.done), len(self.done))
        assert self.ledger.done("r") == self.done

    def teardown(self) -> None:
        """Without further faults every shard is recorded: nothing is lost for ever."""
        if self.cancelled:
            return
        for _ in range(200):
            self.now += LEASE + 1
            self._expire()
            self.queue += [message.shard for message in self.ledger.promote(queue_of(ART), self.now)]  # type: ignore[misc]
            again = self.ledger.recover(queue_of(ART), len(self.queue), self.now)
            self.queue += [message.shard for message in again]  # type: ignore[misc]
            while self.queue:
                claim = self.ledger.lease("r", self.queue.pop(0), worker(), LEASE, self.now)
                if isinstance(claim, Claim):
                    complete(self.ledger, claim)
            if not self.ledger.progress("r").waiting and not self.ledger.progress("r").leased:
                return
        raise AssertionError(f"shards are left: {self.ledger.progress('r')}")


def test_the_ledger_behaves_like_its_model(client: Redis) -> None:
    machine = type("Machine", (LedgerMachine,), {"client": client})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def declared(ledger: Ledger, shards: int) -> Documents:
    """A run by value of which no documents were offered."""
    ledger.open("r", "/out/run=r", Options())
    documents = Documents(ledger)
    assert documents.declare("r", [shard(n) for n in range(shards)]) == "declared"
    return documents


def test_a_declared_shard_waits_once_its_documents_are_there(ledger: Ledger) -> None:
    documents = declared(ledger, 3)
    assert (ledger.progress("r").planned, ledger.progress("r").submitted) == (3, 30)
    assert due(ledger) == []
    assert documents.needed("r") == {0, 1, 2}
    state, held = documents.offer("r", shard(1), b"one")
    assert (state, held) == ("closed", Held(4, 4))
    assert documents.offer("r", shard(1), b"another one")[1] == Held(4, 4), "what waits keeps its documents"
    assert documents.needed("r") == {0, 2}
    claim = Delivery(ledger).one()
    assert (index_of(claim), claim.packed) == (1, 4)
    assert documents.stored(claim, shard(1))
    assert documents.held("r") == Held(0, 0)
    assert documents.needed("r") == {0, 2}
    complete(ledger, claim)
    assert not ledger.seal("r"), "two shards have not come"
    assert documents.needed("r") == {0, 2}


def test_a_message_of_a_lost_server_leases_no_shard_whose_documents_have_not_come(ledger: Ledger) -> None:
    documents = declared(ledger, 2)
    assert ledger.lease("r", 0, worker(), LEASE) == "unknown"
    documents.offer("r", shard(0), b"some")
    claim = ledger.lease("r", 0, worker(), LEASE)
    assert isinstance(claim, Claim)
    assert claim.packed


def test_a_run_by_value_ends_when_the_last_declared_shard_is_recorded(ledger: Ledger) -> None:
    documents = declared(ledger, 2)
    queue = Delivery(ledger)
    for index in range(2):
        documents.offer("r", shard(index), b"some")
        complete(ledger, queue.one())
    assert documents.held("r") == Held(0, 0)
    last = queue.one()
    assert last.shard is None
    assert ledger.close("r", last, '{"f1": 1.0}')
    assert (ledger.progress("r").state, ledger.progress("r").scores) == ("finished", '{"f1": 1.0}')
    assert documents.offer("r", shard(0), b"again")[1] == Held(0, 0)


def test_another_shard_of_the_same_number_is_not_declared(ledger: Ledger) -> None:
    documents = declared(ledger, 2)
    assert documents.declare("r", [Shard(1, 10, 10, "1" * 64)]) == "declared", "its documents may be packed otherwise"
    assert documents.declare("r", [Shard(1, 10, 11, SHA)]) == "another"
    assert documents.declare("r", [Shard(1, 9, 10, SHA)]) == "another"
    assert [one.documents for one in documents.shards("r")] == [10, 10]


def test_a_server_that_lost_a_run_takes_no_shards_of_it_and_can_be_told_of_it_again(
    ledger: Ledger, client: Redis
) -> None:
    documents = Documents(ledger)
    assert documents.declare("r", [shard(0)]) == "unknown"
    documents.place("r", 0, "{}")
    assert not client.exists(ledger.key("r"), ledger.key("r", "shards"), ledger.key("r", "positions"))
    client.hset(ledger.key("r"), "submitted", 10)  # as an earlier version left it
    assert declared(ledger, 2).needed("r") == {0, 1}


def held_stream(ledger: Ledger, client: Redis) -> Documents:
    """An open run that ``me`` fills."""
    ledger.open("r", "/out/run=r", Options(), state=RunState.OPEN)
    client.set(f"{ledger._prefix}stream:r", "me")
    return Documents(ledger)


def test_shards_of_a_stream_are_durable_in_order_once_a_worker_stored_them(ledger: Ledger, client: Redis) -> None:
    documents, queue = held_stream(ledger, client), Delivery(ledger)
    for index in range(3):
        assert documents.offer("r", shard(index), b"some", position=f"{index}", holder="me")[0] == "open"
    assert (ledger.progress("r").planned, ledger.progress("r").submitted) == (3, 30)
    assert documents.positions("r") == {0: "0", 1: "1", 2: "2"}
    first, second = queue.one(), queue.one()
    assert documents.durable("r", 0) == []
    stored = Shard(1, 10, 10, "1" * 64)
    assert documents.stored(second, stored)
    assert documents.durable("r", 0) == [], "the one before is not"
    assert documents.durable("r", 1) == [stored]
    complete(ledger, first)
    assert documents.durable("r", 0) == [shard(0), stored]
    ledger.quarantine(second, "no")
    assert documents.durable("r", 0) == [shard(0)], "its file may not be what was sent"
    assert documents.offer("r", shard(1), b"some", position="1", holder="me")[0] == "open"
    assert documents.needed("r") == set()


def test_a_streams_shards_come_from_its_holder_while_it_is_open(ledger: Ledger, client: Redis) -> None:
    documents = held_stream(ledger, client)

    def offer(index: int, position: str = "", holder: str = "me", count: int = 10) -> str:
        return documents.offer("r", Shard(index, 0, count, SHA), b"some", position=position, holder=holder)[0]

    assert offer(0, "a") == offer(0, "a") == "open"
    assert ledger.progress("r").submitted == 10
    assert [offer(0, "b"), offer(0), offer(0, "a", count=9)] == ["another"] * 3
    assert offer(1, "b", holder="another one") == "not held"
    ledger.seal("r")
    assert offer(1, "b") == "closed"
    client.delete(f"{ledger._prefix}stream:r")
    assert offer(1, "b") == "not held"
    assert set(documents.positions("r")) == {0}
    documents.place("r", 0, "c")
    assert documents.positions("r") == {0: "c"}


def test_runs_that_were_forgotten_are_counted_once(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 3)
    turns = f"{ledger._prefix}turn:{QUEUE}:6"
    client.zadd(turns, {f"forgotten-{n}": n for n in range(2500)})
    for _ in range(4):
        assert ledger.load()[1] == 0
    assert client.zrange(turns, 0, -1) == ["r"]
    assert ledger.load() == (3, 0)
    assert index_of(Delivery(ledger).one()) == 0


@pytest.mark.parametrize("end", ["cancel", "drop", "quarantine", "complete"])
def test_documents_leave_redis(ledger: Ledger, client: Redis, end: str) -> None:
    documents = declared(ledger, 3)
    for index in range(3):
        documents.offer("r", shard(index), b"some")
    claim = Delivery(ledger).one()
    assert documents.held("r") == Held(24, 24)
    {
        "cancel": lambda: ledger.cancel("r"),
        "drop": lambda: ledger.drop("r"),
        "quarantine": lambda: ledger.quarantine(claim, "no"),
        "complete": lambda: complete(ledger, claim),
    }[end]()
    left = {"cancel": 8, "drop": 0, "quarantine": 16, "complete": 16}[end]  # what is leased may finish
    assert documents.held("r") == Held(left, left)
    if end == "cancel":
        assert documents.stored(claim, shard(0))
        assert documents.offer("r", shard(1), b"more") == ("cancelled", Held(0, 0))
    if end == "drop":
        assert documents.offer("r", shard(1), b"more") == ("unknown", Held(0, 0))
        assert not client.keys(f"{ledger.key('r')}*")
    if end == "quarantine":
        assert documents.needed("r") == {0}, "sent again, it is served again"


def test_a_run_that_was_forgotten_leaves_the_index_of_documents(ledger: Ledger, client: Redis) -> None:
    documents = declared(ledger, 1)
    documents.offer("r", shard(0), b"some")
    assert 0 < client.ttl(ledger.key("r", "documents")) <= 7 * 86400
    client.delete(*client.keys(f"{ledger.key('r')}*"))
    ledger.expire()
    assert client.zcard(f"{ledger._prefix}documents") == 0


@pytest.mark.parametrize(
    "entries", [{"0": "x"}, {"1": f"10 0 {SHA}"}, {"0": f"10 0 {SHA}", "1": f"10 11 {SHA}"}, {"x": ""}]
)
def test_shards_that_do_not_follow_one_another_close_no_plan(
    ledger: Ledger, client: Redis, entries: dict[Any, str]
) -> None:
    client.hset(ledger.key("r", "shards"), mapping=entries)
    with pytest.raises(MessageError, match="the ledger's shards do not fit"):
        Documents(ledger).shards("r")
