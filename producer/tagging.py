"""A few texts to their entities on this machine, at once: the model runs in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.document import Annotation, Entity, Fault
from nermill.worker.contracts.errors import EngineError, UsageError

_DEVICE = re.compile(r"cpu|cuda:\d+|npu:\d+")


class LocalTagger:
    """A model in a child process, which loads while the texts are still being read.

    Args:
        process: The child, ``nermill.worker.tag_lines``.
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
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"--device {device!r}: say cpu, cuda:N or npu:N")
    process = subprocess.Popen(
        python_command("nermill.worker.tag_lines", model, device),
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


def _annotation(body: dict[str, Any]) -> Annotation:
    fault = body["fault"]
    return Annotation(tuple(Entity(**entity) for entity in body["entities"]), fault=fault and Fault(**fault))
