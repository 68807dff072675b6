"""The ledger on a real server, against a model of it: nothing lost, one winner, done never undone."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redis import Redis

from nermill.worker.contracts.broker import redis_client
from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.ledger import FINISH, Claim, Ledger
from nermill.worker.contracts.plan import Options, Shard

LEASE = 60.0
SHA = "0" * 64


def shard(index: int) -> Shard:
    return Shard(index, index * 10, 10, SHA)


@pytest.fixture
def client(embedded_broker_url: str) -> Iterator[Redis]:
    with redis_client(embedded_broker_url) as made:
        yield made


@pytest.fixture
def ledger(client: Redis) -> Ledger:
    """A ledger of its own, under a prefix of its own."""
    return Ledger(client, f"test-{uuid.uuid4().hex}:")


def begin(ledger: Ledger, shards: int, run: str = "r") -> None:
    ledger.open(run, "/out", Options())
    ledger.send(run, [shard(n) for n in range(shards)])


def complete(ledger: Ledger, claim: Claim) -> bool:
    return ledger.complete(claim, ok=9, rejected=1, tokens=100, computed=110).newly


def test_shards_are_claimed_in_order_with_growing_tokens(ledger: Ledger) -> None:
    begin(ledger, 3)
    claims = [ledger.claim("art", LEASE) for _ in range(4)]
    assert [c and c.shard.index for c in claims] == [0, 1, 2, None]
    assert [c and int(c.token) for c in claims] == [1, 2, 3, None]


def test_sending_again_changes_nothing(ledger: Ledger) -> None:
    begin(ledger, 3)
    leased = ledger.claim("art", LEASE)
    done = ledger.claim("art", LEASE)
    assert leased is not None
    assert done is not None
    complete(ledger, done)
    assert ledger.send("r", [shard(n) for n in range(3)]) == 0
    assert ledger.progress("r").submitted == 30


def test_a_zombie_cannot_renew_probe_or_release_and_completes_only_once(ledger: Ledger) -> None:
    begin(ledger, 1)
    zombie = ledger.claim("art", LEASE, now=0)
    assert zombie is not None
    assert ledger.reap(now=LEASE + 1) == (1, 1)
    heir = ledger.claim("art", LEASE, now=LEASE + 2)
    assert heir is not None
    assert heir.attempts == 2
    assert not ledger.renew(zombie, LEASE)
    assert not ledger.probe(zombie, 3)
    assert not ledger.release(zombie)
    assert complete(ledger, heir)
    assert not complete(ledger, zombie)
    progress = ledger.progress("r")
    assert (progress.ok, progress.rejected, progress.duplicates, progress.redeliveries) == (9, 1, 1, 1)


def test_runs_take_turns(ledger: Ledger) -> None:
    begin(ledger, 4, "large")
    begin(ledger, 2, "small")
    order = [c.run_id for c in (ledger.claim("art", LEASE) for _ in range(6)) if c]
    assert sorted(order[:2]) == sorted(order[2:4]) == ["large", "small"]


def test_a_run_keeps_to_the_artifact_that_began_it(ledger: Ledger) -> None:
    begin(ledger, 2)
    assert ledger.claim("first", LEASE) is not None
    assert ledger.claim("second", LEASE) is None
    assert ledger.claim("first", LEASE) is not None


@pytest.mark.parametrize(
    ("trials", "strikes"), [([7], {7: 3}), ([7, None], {})], ids=["while it is probed", "after the last trial"]
)
def test_a_crash_while_a_document_is_probed_is_a_strike_against_it(
    ledger: Ledger, trials: list[int | None], strikes: dict[int, int]
) -> None:
    begin(ledger, 1)
    for n in range(3):
        claim = ledger.claim("art", LEASE, now=n * 100)
        assert claim is not None
        assert all(ledger.probe(claim, trial) for trial in trials)
        ledger.reap(now=n * 100 + LEASE + 1)
    ledger.claim("art", LEASE, now=1000)
    assert ledger.strikes("r") == strikes


def test_a_claim_says_how_long_its_shard_waited(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 2)
    time.sleep(0.2)
    assert ledger.send("r", [shard(0), shard(1)]) == 0, "sent again, it waits since it was sent first"
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    assert 0.2 <= claim.waited < 5
    assert 0 < claim.fresh_until - time.monotonic() < LEASE / 2
    assert ledger.release(claim)
    again = ledger.claim("art", LEASE)
    assert again is not None
    assert again.waited < 0.2, "put back, it waits since then"
    client.hset(ledger._key("r", "since"), "1", "nonsense")
    other = ledger.claim("art", LEASE)
    assert other is not None
    assert other.waited == 0
    assert client.hlen(ledger._key("r", "since")) == 0


def test_handing_back_is_no_attempt_and_no_strike(ledger: Ledger) -> None:
    begin(ledger, 1)
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    ledger.probe(claim, 7)
    assert ledger.release(claim)
    again = ledger.claim("art", LEASE)
    assert again is not None
    assert again.attempts == 1
    assert ledger.strikes("r") == {}


def test_cancel_stops_what_waits_and_lets_what_is_leased_finish(ledger: Ledger) -> None:
    begin(ledger, 3)
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    assert ledger.cancel("r")
    assert ledger.claim("art", LEASE) is None
    assert ledger.send("r", [shard(5)]) == 0
    assert complete(ledger, claim)
    assert ledger.progress("r").state == "cancelled"


def test_forgetting_takes_the_counts_back(ledger: Ledger) -> None:
    begin(ledger, 1)
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    complete(ledger, claim)
    assert ledger.forget("r", 0)
    assert not ledger.forget("r", 0)
    progress = ledger.progress("r")
    assert (progress.ok, progress.rejected, progress.tokens, progress.computed, progress.done) == (0, 0, 0, 0, 0)
    assert ledger.send("r", [shard(0)]) == 1


def test_a_closed_run_is_served_no_more_and_fades(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 1)
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    complete(ledger, claim)
    ledger.close("r")
    assert ledger.runs() == []
    assert ledger.progress("r").ok == 9
    assert 0 < client.ttl(ledger._key("r")) <= 86_400


def test_the_last_step_waits_once_when_all_shards_are_done(ledger: Ledger) -> None:
    begin(ledger, 2)
    first, second = ledger.claim("art", LEASE), ledger.claim("art", LEASE)
    assert first is not None
    assert second is not None
    assert not ledger.complete(first, ok=10, rejected=0, tokens=1, computed=1).last
    assert ledger.complete(second, ok=10, rejected=0, tokens=1, computed=1).last
    assert not ledger.complete(second, ok=10, rejected=0, tokens=1, computed=1).last
    finish = ledger.claim("art", LEASE, now=0)
    assert finish is not None
    assert finish.shard.index == FINISH
    assert ledger.reap(now=LEASE + 1) == (1, 1), "a kill in the middle of it, and it is done once more"
    again = ledger.claim("art", LEASE)
    assert again is not None
    assert complete(ledger, again)
    assert ledger.claim("art", LEASE) is None
    assert ledger.progress("r").ok == 20


def test_a_stream_has_its_last_step_when_it_is_sealed(ledger: Ledger) -> None:
    ledger.open("r", "/out", Options(), state="open")
    ledger.send("r", [shard(0)])
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    assert not ledger.complete(claim, ok=10, rejected=0, tokens=1, computed=1).last
    assert ledger.seal("r")
    assert not ledger.seal("r")


@pytest.mark.parametrize(
    ("field", "value"),
    [("options", "{"), ("options", '{"max_chars": "many"}'), ("options", '{"unknown": 1}'), ("uri", "")],
)
def test_an_entry_that_makes_no_sense_is_refused_once(ledger: Ledger, client: Redis, field: str, value: str) -> None:
    begin(ledger, 1)
    client.hset(ledger._key("r"), field, value)
    with pytest.raises(MessageError, match="does not fit"):
        ledger.claim("art", LEASE)
    assert ledger.claim("art", LEASE) is None
    assert ledger.progress("r").buried == 1
    assert "does not fit" in ledger.progress("r").trouble


def test_sending_again_mends_what_was_buried(ledger: Ledger, client: Redis) -> None:
    begin(ledger, 1)
    client.hset(ledger._key("r", "shards"), "0", "nonsense")
    with pytest.raises(MessageError, match="does not fit"):
        ledger.claim("art", LEASE)
    assert ledger.send("r", [shard(0)]) == 1
    assert (ledger.progress("r").buried, ledger.progress("r").trouble) == (0, "")
    claim = ledger.claim("art", LEASE)
    assert claim is not None
    assert claim.shard == shard(0)
    assert ledger.progress("r").submitted == 10


class LedgerMachine(RuleBasedStateMachine):
    """Producers, workers, crashes and a clock against a plain-Python model."""

    client: Redis

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.client, f"machine-{uuid.uuid4().hex}:")
        self.ledger.open("r", "/out", Options(), state="open")
        self.now = 0.0
        self.waiting: set[int] = set()
        self.leased: dict[int, tuple[Claim, float]] = {}
        self.done: set[int] = set()
        self.old_claims: list[Claim] = []
        self.cancelled = False

    @rule(index=st.integers(0, 12))
    def submit(self, index: int) -> None:
        expected = not self.cancelled and index not in self.waiting | self.leased.keys() | self.done
        assert self.ledger.send("r", [shard(index)]) == expected
        if expected:
            self.waiting.add(index)

    @rule()
    def claim(self) -> None:
        claim = self.ledger.claim("art", LEASE, self.now)
        if not self.waiting:
            assert claim is None
            return
        assert claim is not None
        assert claim.shard == shard(min(self.waiting))
        assert all(int(claim.token) > int(old.token) for old in self.old_claims)
        self.waiting.remove(claim.shard.index)
        self.leased[claim.shard.index] = (claim, self.now + LEASE)
        self.old_claims.append(claim)

    @rule(seconds=st.floats(1, 90))
    def time_passes(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)

    @rule()
    def reap(self) -> None:
        expired = {index for index, (_, until) in self.leased.items() if until <= self.now}
        for index in expired:
            del self.leased[index]
        back = set() if self.cancelled else expired - self.done
        self.waiting |= back
        assert self.ledger.reap(self.now) == (len(back), len(self.waiting))

    @precondition(lambda self: self.old_claims)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.old_claims))
        held = self._held(claim)
        assert self.ledger.renew(claim, LEASE, self.now) == held
        if held:
            self.leased[claim.shard.index] = (claim, self.now + LEASE)

    @precondition(lambda self: self.old_claims)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(self.old_claims))
        index = claim.shard.index
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
        assert self.ledger.release(claim) == held
        if held:
            del self.leased[claim.shard.index]
            if not self.cancelled and claim.shard.index not in self.done:
                self.waiting.add(claim.shard.index)

    @rule(chance=st.integers(0, 30))
    def cancel(self, chance: int) -> None:
        if chance == 0:
            self.ledger.cancel("r")
            self.cancelled = True
            self.waiting.clear()

    def _held(self, claim: Claim) -> bool:
        return self.leased.get(claim.shard.index, (None, 0))[0] == claim

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


def test_the_ledger_behaves_like_its_model(client: Redis) -> None:
    machine = type("Machine", (LedgerMachine,), {"client": client})
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
