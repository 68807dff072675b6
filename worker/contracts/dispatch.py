"""Sends Celery messages for what the ledger promotes, and sends again what was lost; producers and workers use it.

Everybody who adds, begins, ends or recovers work calls ``promote``. Whoever dies between the ledger's mark and the
sending leaves a message that ``recover`` misses and sends again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nermill.worker.contracts.ledger import Ledger
from nermill.worker.contracts.message import FINISH_RUN, QUEUE, TAG_SHARD
from nermill.worker.contracts.records import Message


class Dispatcher:
    """Sends messages.

    Args:
        app: A Celery application without a result backend, so that sending subscribes to nothing.
        ledger: Says what to send.
    """

    def __init__(self, app: Any, ledger: Ledger) -> None:
        self._app = app
        self._ledger = ledger

    def promote(self, queues: Iterable[str]) -> int:
        """Fills the message windows of queues; returns how many messages were sent.

        Raises:
            kombu.exceptions.OperationalError: the broker does not answer.
        """
        return self._send([message for queue in queues for message in self._ledger.promote(queue)])

    def recover(self, every: float) -> int:
        """Makes shards of expired leases pending, sends lost messages again, and fills all windows.

        Args:
            every: Seconds between two looks; a look that comes earlier, by whomever, does nothing.

        Returns:
            How many leases had expired and messages were lost.
        """
        if not self._ledger.begin_recovery(every):
            return 0
        expired = self._ledger.expire()
        queues = self._ledger.queues()
        lost = [message for queue in queues for message in self._ledger.recover(queue, self.depth(queue))]
        self._send(lost)
        self.promote(queues)
        return expired + len(lost)

    def depth(self, queue: str) -> int:
        """Messages in a queue, over all priorities."""
        with self._app.connection_or_acquire() as connection:
            try:
                return int(connection.default_channel.queue_declare(queue=queue, passive=True).message_count)
            except connection.channel_errors:  # 404: nothing was ever sent, or everything was received
                return 0

    def _send(self, messages: list[Message]) -> int:
        if not messages:
            return 0
        with self._app.producer_or_acquire() as producer:
            for message in messages:
                shard = () if message.shard is None else (message.shard,)
                self._app.send_task(
                    FINISH_RUN if message.shard is None else TAG_SHARD,
                    args=(message.run_id, message.uri, *shard),
                    queue=QUEUE if message.shard is None else message.queue,
                    priority=message.priority,
                    producer=producer,
                    retry=False,
                )
        return len(messages)
