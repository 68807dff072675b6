"""Tags a few texts at once: with a model in a child process, or through the workers at a broker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.device import find_device
from nermill.worker.contracts.document import Annotation, Entity, Fault
from nermill.worker.contracts.errors import EngineError, UsageError

if TYPE_CHECKING:  # importing them would delay the start of the child process
    from nermill.producer.runs.queue import Queue
    from nermill.worker.contracts.plan import Options

REQUEST_SECONDS = 60.0


class LocalTagger:
    """A model in a child process, which loads while the caller reads the texts.

    Args:
        process: The child, ``nermill.worker.process.tag_lines``.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tag(self, texts: list[str]) -> list[Annotation]:
        """One annotation for each text, in order; ``fault`` is set where a text could not be tagged. Call it once.

        Raises:
            UsageError: the model cannot be loaded on the device.
            EngineError: the process failed.
        """
        out, err = self._process.communicate("".join(json.dumps(text) + "\n" for text in texts))
        if code := self._process.returncode:
            message = err.strip().rpartition("\n")[2] or f"the process of the model ended with {code}"
            raise UsageError(message) if code == UsageError.exit_code else EngineError(message)
        return [_annotation(json.loads(line)) for line in out.splitlines()]


@contextmanager
def local_tagger(model: str = "demo", device: str = "cpu") -> Iterator[LocalTagger]:
    """Starts a process that loads a model; it ends with the ``with`` block.

    Args:
        model: Artifact, by name or path.
        device: ``cpu``, ``cuda:N`` or ``npu:N``.

    Raises:
        UsageError: ``device`` is no device's name.
    """
    if find_device(device) is None:
        raise UsageError(f"--device {device!r}: say cpu, cuda:N or npu:N")
    process = subprocess.Popen(
        python_command("nermill.worker.process.tag_lines", model, device),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
    )
    with process:
        try:
            yield LocalTagger(process)
        finally:
            process.kill()  # has no effect where it has ended


class RemoteTagger:
    """The workers at a broker.

    Args:
        broker: Broker URL.

    Raises:
        UsageError: the URL is invalid.
        BrokerError: the broker does not answer.
    """

    def __init__(self, broker: str) -> None:
        from nermill.producer.runs.queue import Queue

        self._queue = Queue(broker)

    def tag(self, texts: list[str]) -> list[Annotation]:
        """One annotation for each text, in order; see ``request_annotations``."""
        from nermill.worker.contracts.plan import Options

        return request_annotations(self._queue, texts, Options())


def request_annotations(
    queue: Queue,
    documents: Sequence[str] | Sequence[Sequence[str]],
    options: Options,
    *,
    model: str | None = None,
    timeout: float = REQUEST_SECONDS,
) -> list[Annotation]:
    """Sends a few documents to the workers at a broker and waits for the annotations.

    Args:
        queue: The broker.
        documents: Texts, or lists of words.
        options: Options of tagging.
        model: Artifact that must tag them, by name or path; None for that of any worker.
        timeout: Most seconds to wait.

    Raises:
        UsageError: the workers refuse the request, or the model does not exist.
        BrokerError: there was no answer in time.
    """
    from nermill.producer.runs.planning import model_identity

    given = [document if isinstance(document, str) else list(document) for document in documents]
    artifact = model_identity(model)["sha256"]
    answer = queue.request(given, asdict(options), artifact=artifact, timeout=timeout)
    return [_annotation(body) for body in answer]


def _annotation(body: dict[str, Any]) -> Annotation:
    fault, tags = body["fault"], body.get("tags")
    return Annotation(
        tuple(Entity(**entity) for entity in body["entities"]),
        tags=tags and tuple(tags),
        fault=fault and Fault(**fault),
    )
