"""What Celery's consumer is taught: which messages are refused, and when no further shard is received.

Everything here runs in the consumer's thread. Only public API of Celery and kombu is used: ``Task.Strategy``, a step of
the consumer's blueprint, ``Consumer.add_task_queue`` and ``cancel_task_queue``, ``control_command``,
``kombu.compression.register``, ``Transport.on_readable`` and ``Channel.basic_consume``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from celery.bootsteps import StartStopStep
from celery.states import FAILURE
from celery.worker import control
from celery.worker.consumer.tasks import Tasks
from celery.worker.control import control_command
from celery.worker.strategy import default
from kombu import compression
from kombu.exceptions import KombuError
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as redis_transport
from redis.exceptions import DataError

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.message import QUEUE, TAG_DOCUMENTS, TAG_SHARD
from nermill.worker.queue.shards import ShardWorker

log = logging.getLogger("nermill.worker")

LOOK_SECONDS = 0.02  # between two looks at whether there is room for another shard
MAX_BODY = 16_000_000  # bytes of a request; its documents are limited to a million characters
MAX_SHARD_BODY = 65_536  # bytes of any other message
MAX_ID = 255  # characters of a task id

# What a malformed message raises inside kombu and Celery, before any check of ours.
_MALFORMED = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    DataError,
    KombuError,
)
# What remote control is answered that would end a task.
_NO_TERMINATION = {
    "error": "a running task is a thread and cannot be ended; nermill cancel RUN stops what has not begun, "
    "and control shutdown stops the worker"
}
_FOLLOWED = ("callbacks", "errbacks", "chain", "chord")  # Celery follows them in headers as well as in the body

Refuse = Callable[[str], None]


def _only_log(reason: str) -> None:
    log.warning("refused: %s", reason)


class _Refusing:
    """What the channels and transports below share.

    Attributes:
        refuse: Logs and counts a refused message; set by ``harden``.
    """

    refuse: Refuse = staticmethod(_only_log)


# What kombu raises where a message is acknowledged on a channel whose connection was lost meanwhile.
_CLOSED = (AttributeError,)


class _Channel(_Refusing):
    """A channel whose consumers refuse a message that cannot be handled, instead of ending the process."""

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], *args: Any, **options: Any
    ) -> Any:
        def guarded(message: Any) -> Any:
            try:
                if message.errors:  # it could not be unpacked
                    raise ValueError("compressed or damaged")
                return callback(message)
            except _MALFORMED as error:
                _Refusing.refuse(_malformed(error))
                if not no_ack and not message.acknowledged:
                    message.ack()

        return super().basic_consume(queue, no_ack, guarded, *args, **options)  # type: ignore[misc]


class _Transport(_Refusing):
    """A transport that drops what is no message at all: bytes that are no JSON, JSON that is no object, no headers."""

    def on_readable(self, fileno: int) -> None:
        try:
            super().on_readable(fileno)  # type: ignore[misc]
        except _MALFORMED as error:
            _Refusing.refuse(_malformed(error))


class Channel(_Channel, redis_transport.Channel):  # type: ignore[misc]
    """kombu's Redis channel, which refuses malformed messages."""


class Transport(_Transport, redis_transport.Transport):  # type: ignore[misc]
    """kombu's Redis transport, which refuses malformed messages."""

    Channel = Channel
    connection_errors = (*redis_transport.Transport.connection_errors, *_CLOSED)


class SentinelChannel(_Channel, redis_transport.SentinelChannel):  # type: ignore[misc]
    """The same through Sentinel."""


class SentinelTransport(_Transport, redis_transport.SentinelTransport):  # type: ignore[misc]
    """The same through Sentinel."""

    Channel = SentinelChannel
    connection_errors = (*redis_transport.SentinelTransport.connection_errors, *_CLOSED)


def _malformed(error: Exception) -> str:
    return f"a malformed message ({type(error).__name__}: {' '.join(str(error).split()):.120})"


def harden(refuse: Refuse) -> None:
    """Makes malformed messages harmless; refuses compressed ones, which kombu would unpack before any check.

    Args:
        refuse: Logs and counts a refused message, by its reason.
    """
    _Refusing.refuse = staticmethod(refuse)
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
    TRANSPORT_ALIASES["sentinel"] = f"{__name__}:SentinelTransport"
    for content_type in compression.encoders():
        compression.register(_refuse_compressed, _refuse_compressed, content_type)


def _refuse_compressed(_: bytes) -> bytes:
    raise ValueError("a compressed message; nermill sends none")


def check_envelope(message: Any, run: Callable[..., Any]) -> None:
    """Refuses what no sender of ours uses and what would make Celery hold, chain or unpack a message.

    Args:
        message: kombu's message.
        run: The task's function, whose arguments the message must have.

    Raises:
        MessageError: it has a shadow name that is no text, an ETA, time limits, callbacks, a chain or a chord, is too
            long, is no task message, or has arguments that the task does not take.
    """
    headers = message.headers
    limit = MAX_BODY if headers["task"] == TAG_DOCUMENTS else MAX_SHARD_BODY
    if len(message.body or b"") > limit:
        raise MessageError(f"a message of {len(message.body)} bytes; {limit} are the most")
    if not _is_task_id(headers.get("id")):
        raise MessageError(f"a message whose task id is not a text of 1 to {MAX_ID} characters")
    if not isinstance(headers.get("shadow") or "", str):  # Celery counts by it, in a thread whose error nobody hears
        raise MessageError("a message with a shadow name that is no text")
    if headers.get("eta"):
        raise MessageError("a message with an ETA or countdown; nermill's tasks start at once")
    if any(headers.get("timelimit") or ()):
        raise MessageError("a message with a time limit; tasks in threads cannot be ended")
    try:
        args, keywords, embed = message.payload
        extras = [name for name, value in {**_only(headers, _FOLLOWED), **embed}.items() if value]
    except Exception:  # whatever kombu's decoders raise: another content type, no JSON, too deep, not three items
        raise MessageError("a message whose body is not [args, kwargs, embed] in JSON") from None
    if extras:
        raise MessageError(f"a message with {', '.join(extras):.80}; nermill's tasks take no callbacks or chains")
    if not isinstance(args, list) or not isinstance(keywords, dict):
        raise MessageError("a message whose arguments are not a list and an object")
    try:
        signature(run).bind(*args, **keywords)
    except TypeError as error:
        raise MessageError(f"a message for {headers['task']} with wrong arguments ({error!s:.80})") from None


def _only(headers: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: headers[name] for name in names if name in headers}


def _answer(task: Any, task_id: Any, error: MessageError) -> None:
    """Stores the refusal as the message's result, so that its sender does not wait in vain."""
    if not _is_task_id(task_id):
        return
    try:
        task.backend.store_result(task_id, error, FAILURE)
    except Exception as failure:  # of the backend, whatever it is: the message is refused all the same
        log.warning("the answer to a refused message could not be stored (%s)", failure)


def _is_task_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID


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
                check_envelope(message, task.run)
            except MessageError as error:
                shards.refuse(str(error))
                _answer(task, message.headers.get("id"), error)
                ack(log, consumer.connection_errors)  # last, for it is put off: see basic_consume
                return None
            shards.metrics.received(task.name)
            if task.name == TAG_SHARD:
                shards.capacity.received(str(message.headers["id"]))
            result = handle(message, body, ack, reject, callbacks, **more)
            if room is not None and task.name == TAG_SHARD:
                room.look()
            return result

        return receive

    return make


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Celery's ``revoke`` for tasks that wait; one that runs is not ended."""
    return dict(_NO_TERMINATION) if terminate else control.revoke(state, task_id, **options)  # type: ignore[attr-defined]


@control_command(  # type: ignore[untyped-decorator]
    variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]"
)
def terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> dict[str, str]:
    """Refused: a task that runs is not ended."""
    return dict(_NO_TERMINATION)


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
            _, bound = shards.leases.queues
            self._set(QUEUE, shards.capacity.takes_common())
            self._set(bound, shards.capacity.takes_bound())

        def _set(self, queue: str, wanted: bool) -> None:
            tasks = self._consumer.task_consumer
            if tasks is None or wanted == bool(tasks.consuming_from(queue)):
                return
            if wanted:
                self._consumer.add_task_queue(queue)
            else:
                self._consumer.cancel_task_queue(queue)

    return Room
