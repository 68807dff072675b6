"""The engine on OpenVINO, for CPUs; the activations of its int8 graphs have fixed scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import Manifest, Precision
from nermill.worker.contracts.processor import usable_cores
from nermill.worker.engine import Batch
from nermill.worker.engine.inputs import check_names, lines_of, named_inputs, refusal


class OpenvinoEngine:
    """A graph of OpenVINO on the CPU; see ``nermill.worker.engine.Engine``."""

    def __init__(self, artifact: Path, manifest: Manifest, device: str = "cpu", threads: int = 0) -> None:
        self.manifest = manifest
        self.device = device
        if device != "cpu":
            raise ArtifactError(f"{artifact}: backend openvino runs on CPUs; for {device} compile with --backend torch")
        check_precision(manifest.precision, str(artifact))
        self.at_once = self.in_flight = threads or usable_cores()
        try:
            compiled = openvino.Core().compile_model(
                str(artifact / manifest.model_file), "CPU", settings(manifest, self.at_once)
            )
        except Exception as error:
            raise ArtifactError(
                f"{artifact}: openvino {openvino.__version__} does not load it ({lines_of(error)[-1]})"
            ) from None
        check_names(manifest, [entry.any_name for entry in compiled.inputs])
        self._requests = [compiled.create_infer_request() for _ in range(self.in_flight)]

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels)."""
        feeds = named_inputs(batch, self.manifest)
        request = self._requests.pop()  # at most ``in_flight`` calls are under way
        try:
            logits: NDArray[np.float32] = request.infer(feeds)[0]
        except Exception as error:
            raise refusal("openvino", self.device, batch, lines_of(error)[-1]) from error
        finally:
            self._requests.append(request)
        return logits

    def close(self) -> None:
        """Frees the graph."""
        del self._requests


def check_precision(precision: Precision, what: str) -> None:
    """Refuses bf16 where the CPU computes none: OpenVINO would take fp32 without a word.

    Raises:
        ArtifactError: ``what`` is bf16, which this CPU computes not.
    """
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise ArtifactError(f"{what}: this CPU ({name}) computes no bf16; compile with --precision int8 or fp32")


def settings(manifest: Manifest, threads: int) -> dict[str, Any]:
    """A call on each of ``threads`` threads; between int8 products there is float32, whatever the CPU would prefer."""
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if manifest.precision == "bf16" else "f32",
        "ENABLE_CPU_PINNING": False,  # it would pin the threads of two workers to the same cores
    }
