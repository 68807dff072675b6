"""A stream by reference: the producer writes shards into the run's folder, and the workers read them there."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from nermill.producer.runs.base_stream import BaseStream, Group
from nermill.producer.runs.planning import check_writable, normalised
from nermill.producer.runs.run import is_above, open_ledger, send, send_shards, unmark
from nermill.producer.runs.shards import ANOTHER_PRODUCER, write_shard
from nermill.producer.sources.files import is_remote
from nermill.worker.contracts.errors import BrokerError, StoreError
from nermill.worker.contracts.plan import Shard
from nermill.worker.contracts.records import RunState


class Stream(BaseStream):
    """An open run whose documents this process makes durable, in the run's folder.

    While the broker is away, shards are kept there and sent as soon as it is back.

    Raises:
        UsageError: the output or the model is wrong, or the run has another producer.
        BrokerError: the broker does not answer.
    """

    _unsent: list[Shard]

    def send_again(self) -> None:
        """Sends what has no part, after ``close``."""
        send(self.run, self.plan, self._queue)

    def _checked(self, out: str) -> str:
        root = normalised(out)
        if not is_remote(root):
            check_writable(root)
        return root

    def _open(self) -> None:
        reopen = partial(self._queue.reopen, self.plan.run_id, RunState.OPEN, self._keep_hold)
        reopen()  # it may have ended before
        while not self._queue.renew_hold(self.plan.run_id, self._holder):  # and again since
            self._keep_hold()
            reopen()
        unmark(self.run)
        self.plan.write(self.run)
        self._unsent = []
        self._open_again()

    def _open_again(self) -> None:
        with self._queue.ledger() as ledger:
            open_ledger(ledger, self.run, self.plan)
        committed = self.run.committed() if self._shards else set()
        with self._changed:
            self._unsent = [shard for shard in self._shards if shard.index not in committed]
            self._untried += bool(self._unsent)

    def _is_lost(self) -> bool:
        return self._state() == "unknown"

    def _state(self) -> str:
        """The run's state in the ledger: open, or unknown.

        Raises:
            StoreError: somebody closed or cancelled the run.
        """
        with self._queue.ledger() as ledger:
            state = ledger.progress(self.plan.run_id).state
        if state not in ("open", "unknown"):
            told = f"the stream is {state}: somebody else ended it; to go on: nermill submit - --resume {self.run.uri}"
            raise StoreError(f"{self.run.uri}: {told}, or --follow again")
        return state

    def _store(self, group: Group) -> None:
        last, position = self._shards[-1] if self._shards else None, group.positions[-1]
        shard = write_shard(
            self.run,
            last.index + 1 if last else 0,
            self._durable_documents(),
            group.documents,
            position=position,
            exclusive=True,
        )
        self._on_shard(shard, position)
        with self._changed:
            self._full.popleft()
            self._shards.append(shard)
            self._unsent.append(shard)
            self._untried += 1
            self._changed.notify_all()

    def _is_waiting(self) -> bool:
        return self._is_held_back

    def _send(self) -> None:
        with self._changed:
            shards = list(self._unsent)
        if shards:
            send_shards(self._queue, self.plan, shards)
        with self._changed:
            self._unsent = self._unsent[len(shards) :]

    def _is_above(self) -> bool:
        return is_above(self._queue, self.plan, self._high_water)

    def _away(self, error: BrokerError) -> bool:
        return False

    def _end(self) -> None:
        with suppress(BrokerError):  # it may be away: what is durable is sent later
            if not self._hold():
                raise StoreError(f"{self.run.uri}: {ANOTHER_PRODUCER}")
            self._state()
        self.plan = self.plan.closed(self._shards)
        self.plan.write(self.run)

    def _seal(self) -> None:
        self._send()
        self._queue.end_stream(self.plan.run_id, self._holder)
