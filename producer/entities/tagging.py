"""A few texts to their entities at once: by a model in a process of its own, or by the workers at a broker."""

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

if TYPE_CHECKING:  # each costs time before the child with the model starts
    from nermill.producer.runs.queue import Queue
    from nermill.worker.contracts.plan import Options

REQUEST_SECONDS = 60.0


class LocalTagger:
    """A model in a child process, which loads while the texts are still being read.

    Args:
        process: The child, ``nermill.worker.process.tag_lines``.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tag(self, texts: list[str]) -> list[Annotation]:
        """One annotation a text, in order; ``fault`` is set where one could not be tagged. To be called once.

        Raises:
            UsageError: the model or the device cannot be served here.
            EngineError: the process failed.
        """
        out, err = self._process.communicate("".join(json.dumps(text) + "\n" for text in texts))
        if code := self._process.returncode:
            told = err.strip().rpartition("\n")[2] or f"the process of the model ended with {code}"
            raise UsageError(told) if code == UsageError.exit_code else EngineError(told)
        return [_annotation(json.loads(line)) for line in out.splitlines()]


@contextmanager
def local_tagger(model: str = "demo", device: str = "cpu") -> Iterator[LocalTagger]:
    """Starts to load a model; its process ends with the ``with`` block.

    Args:
        model: Artifact, by name or path.
        device: ``cpu``, ``cuda:N`` or ``npu:N``.

    Raises:
        UsageError: ``device`` names no device.
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
            process.kill()  # one that has ended is left as it is


class RemoteTagger:
    """The workers at a broker.

    Args:
        broker: Broker URL.

    Raises:
        UsageError: a URL that cannot be served.
        BrokerError: nobody answers at the broker.
    """

    def __init__(self, broker: str) -> None:
        from nermill.producer.runs.queue import Queue

        self._queue = Queue(broker)

    def tag(self, texts: list[str]) -> list[Annotation]:
        """One annotation a text, in order; see ``request_annotations``."""
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
    """Has the workers at a broker tag a few documents.

    Args:
        queue: The broker.
        documents: Texts, or lists of words.
        options: How they are tagged.
        model: Artifact that must tag them, by name or path; None leaves it to the workers.
        timeout: Seconds to wait for the answer.

    Raises:
        UsageError: the workers refuse the request; the model is not there.
        BrokerError: no answer in time.
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
