"""What Celery's consumer is taught: which messages are refused, and when no further shard is received.

Everything here runs in the consumer's thread. Only public API of Celery and kombu is used: ``Task.Strategy``, a step of
the consumer's blueprint, ``Consumer.add_task_queue`` and ``cancel_task_queue``, ``kombu.compression.register`` and a
``Transport`` class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.bootsteps import StartStopStep
from celery.worker.consumer.tasks import Tasks
from celery.worker.strategy import default
from kombu import compression
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as redis_transport

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.message import QUEUE, TAG_DOCUMENTS, TAG_SHARD
from nermill.worker.queue.shards import ShardWorker

log = logging.getLogger("nermill.worker")

LOOK_SECONDS = 0.02  # between two looks at whether there is room for another shard
MAX_BODY = 16_000_000  # bytes of a request; its documents are limited to a million characters
MAX_SHARD_BODY = 65_536  # bytes of any other message

# What a malformed message raises inside kombu, before any check of ours: the connection is opened again, as after a
# fault of the network. Otherwise one message, or one PUBLISH to the control channel, would end the process.
_MALFORMED = (ValueError, TypeError, AttributeError, KeyError)


class Transport(redis_transport.Transport):  # type: ignore[misc]
    """kombu's Redis transport; a malformed message costs a reconnect instead of the process."""

    connection_errors = (*redis_transport.Transport.connection_errors, *_MALFORMED)


class SentinelTransport(redis_transport.SentinelTransport):  # type: ignore[misc]
    """The same through Sentinel."""

    connection_errors = (*redis_transport.SentinelTransport.connection_errors, *_MALFORMED)


def harden() -> None:
    """Makes malformed messages harmless; refuses compressed ones, which kombu would unpack before any check."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
    TRANSPORT_ALIASES["sentinel"] = f"{__name__}:SentinelTransport"
    for content_type in compression.encoders():
        compression.register(_refuse_compressed, _refuse_compressed, content_type)


def _refuse_compressed(_: bytes) -> bytes:
    raise ValueError("a compressed message; nermill sends none")


def check_envelope(message: Any) -> None:
    """Refuses what no sender of ours uses and what would make Celery hold, chain or unpack a message.

    Args:
        message: kombu's message.

    Raises:
        MessageError: it has an ETA, callbacks, a chain or a chord, is too long or is no task message.
    """
    headers = message.headers
    limit = MAX_BODY if headers.get("task") == TAG_DOCUMENTS else MAX_SHARD_BODY
    if len(message.body) > limit:
        raise MessageError(f"a message of {len(message.body)} bytes; {limit} are the most")
    if headers.get("eta"):
        raise MessageError("a message with an ETA or countdown; nermill's tasks start at once")
    try:
        args, keywords, embed = message.payload
        extras = [name for name, value in embed.items() if value]
    except (TypeError, ValueError, AttributeError):
        raise MessageError("a message whose body is not [args, kwargs, embed]") from None
    if extras:
        raise MessageError(f"a message with {', '.join(extras)}; nermill's tasks take no callbacks or chains")
    if not isinstance(args, list) or not isinstance(keywords, dict):
        raise MessageError("a message whose arguments are not a list and an object")


def strategy(worker: Callable[[], ShardWorker]) -> Callable[..., Any]:
    """The ``Task.Strategy`` of our tasks: checks the envelope, counts, then does as Celery's own.

    Args:
        worker: Gives the process's worker, which exists once Celery consumes.
    """

    def make(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
        handle = default(task, app, consumer, **options)
        room = getattr(consumer, "room", None)

        def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **more: Any) -> Any:
            shards = worker()
            try:
                check_envelope(message)
            except MessageError as error:
                shards.metrics.refused()
                log.warning("refused: %s", error)
                ack(log, consumer.connection_errors)
                return None
            shards.metrics.received(task.name)
            if task.name == TAG_SHARD:
                shards.received(str(message.headers["id"]))
            result = handle(message, body, ack, reject, callbacks, **more)
            if room is not None and task.name == TAG_SHARD:
                room.look()
            return result

        return receive

    return make


def room_step(worker: Callable[[], ShardWorker]) -> type[StartStopStep]:
    """The step that consumes from the queues of shards only while there is room for another shard.

    Requests come through the common queue, which is left out only while the process has all the shards that it may
    have; its threads for requests and last steps are never given to shards.
    """

    class Room(StartStopStep):  # type: ignore[misc]
        requires = (Tasks,)

        def __init__(self, consumer: Any, **options: Any) -> None:
            super().__init__(consumer, **options)
            self._consumer = consumer
            self._timer: Any = None
            consumer.room = self

        def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
            self._timer = hub.call_repeatedly(LOOK_SECONDS, self.look)

        def stop(self, consumer: Any) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def look(self) -> None:
            """Consumes from each queue of shards, or stops to, as there is room."""
            shards = worker()
            _, bound = shards.queues
            self._set(QUEUE, shards.takes_common())
            self._set(bound, shards.takes_bound())

        def _set(self, queue: str, wanted: bool) -> None:
            tasks = self._consumer.task_consumer
            if tasks is None or wanted == bool(tasks.consuming_from(queue)):
                return
            if wanted:
                self._consumer.add_task_queue(queue)
            else:
                self._consumer.cancel_task_queue(queue)

    return Room
