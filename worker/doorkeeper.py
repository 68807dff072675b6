"""Lets nothing but bells through to Celery; whatever else lies in the queue is counted and dropped.

Celery itself would unpack a compressed body, hold what has an ETA, follow callbacks, run its built-in tasks, and
end on what is no message at all. A bell carries nothing, so nothing of a message is passed on: where one rings, a
fresh one takes its place.
"""

from __future__ import annotations

import json
import uuid
from base64 import b64encode
from collections.abc import Callable
from queue import Empty
from typing import Any

from celery.bootsteps import StartStopStep
from celery.worker.consumer.tasks import Tasks

from nermill.worker.contracts.errors import MessageError
from nermill.worker.contracts.message import QUEUE, TASK, bell, check_message


def doorkeeper(refuse: Callable[[MessageError], None]) -> type[StartStopStep]:
    """The step of Celery's consumer that guards the queue.

    Args:
        refuse: Told of each message that was dropped.
    """

    class Doorkeeper(StartStopStep):
        requires = (Tasks,)

        def start(self, consumer: Any) -> None:
            # Private names of kombu, which is pinned; the fuzz test fails where they move.
            channel = consumer.task_consumer.channel
            transport = channel.connection
            deliver, receive = transport._deliver, channel.handlers["BRPOP"]
            the_brokers_own = (*transport.connection_errors, *transport.channel_errors, Empty)

            def deliver_bell(raw: Any, queue: str) -> None:
                if queue != QUEUE:
                    deliver(raw, queue)
                    return
                try:
                    check_message(raw)
                except MessageError as error:
                    refuse(error)
                else:
                    deliver(fresh_bell(), queue)

            def receive_json(**options: Any) -> bool:
                try:
                    return bool(receive(**options))
                except the_brokers_own:
                    raise
                except Exception as error:  # taken from the queue already
                    refuse(MessageError(f"a message that is no JSON ({type(error).__name__})"))
                    return True

            transport._deliver = deliver_bell
            channel.handlers["BRPOP"] = receive_json

    return Doorkeeper


def fresh_bell() -> dict[str, Any]:
    """A bell as the Redis transport has it."""
    return {
        "body": b64encode(json.dumps([[], bell(), {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": TASK, "id": str(uuid.uuid4())},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "delivery_tag": str(uuid.uuid4()),
            "priority": 0,
        },
    }
