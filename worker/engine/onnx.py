"""The engine on onnxruntime: the default on a CPU; CUDA and CANN through their execution providers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read on import; it would write to the home and to the network

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.contracts.processor import usable_cores
from nermill.worker.engine import Batch
from nermill.worker.engine.inputs import check_names, lines_of, named_inputs, refusal

_PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "npu": ("CANNExecutionProvider", "onnxruntime-cann"),
}


class OnnxEngine:
    """A graph of onnxruntime on one device; see ``nermill.worker.engine.Engine``."""

    def __init__(self, artifact: Path, manifest: Manifest, device: str = "cpu", threads: int = 0) -> None:
        self.manifest = manifest
        self.device = device
        # a batch a core is faster than one batch on all cores: no thread waits for another
        self.at_once = (threads or usable_cores()) if device == "cpu" else 1
        self.in_flight = self.at_once if device == "cpu" else 2
        try:
            self._session = open_session(str(artifact / manifest.model_file), device, manifest)
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{artifact}: onnxruntime {onnxruntime.__version__} does not load it ({error})"
            ) from None
        check_names(manifest, [entry.name for entry in self._session.get_inputs()])

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels)."""
        feeds = named_inputs(batch, self.manifest)
        try:
            logits: NDArray[np.float32] = self._session.run(None, feeds)[0]
        except Exception as error:
            raise refusal("onnxruntime", self.device, batch, lines_of(error)[-1]) from error
        return logits

    def close(self) -> None:
        """Frees the session."""
        del self._session


def open_session(model: str | bytes, device: str, manifest: Manifest) -> Any:
    """A session of onnxruntime on a device, each call on one thread; ``model`` is a file's path or a graph's bytes.

    Raises:
        ArtifactError: this onnxruntime cannot serve the device.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # fused, skip and layer norm take twice the time that they take apart on a CPU (onnxruntime 1.32)
    slow = ["SkipLayerNormFusion"] if device == "cpu" else []
    return onnxruntime.InferenceSession(
        model, options, providers=_providers(device, manifest), disabled_optimizers=slow
    )


def _providers(device: str, manifest: Manifest) -> list[Any]:
    kind, _, number = device.partition(":")
    if kind not in _PROVIDERS:
        raise ArtifactError(f"device {device!r}: write cpu, cuda:N or npu:N")
    if kind != "cpu" and manifest.precision == "int8":
        raise ArtifactError(f"{manifest.name}: its int8 graph runs on a CPU; for {device} compile fp16")
    if kind != "cpu" and manifest.layout == "equal":
        raise ArtifactError(f"{manifest.name}: layout equal is for CPUs; for {device} compile with --layout packed")
    provider, package = _PROVIDERS[kind]
    if provider not in onnxruntime.get_available_providers():
        raise ArtifactError(f"device {device}: this onnxruntime has no {provider}; pip install {package}")
    if kind == "cpu":
        return [provider]
    settings: dict[str, Any] = {"device_id": int(number or 0)}
    if kind == "npu":
        settings |= {"enable_cann_graph": True}
        settings |= {"precision_mode": "force_fp16"} if manifest.precision == "fp16" else {}
    return [(provider, settings), "CPUExecutionProvider"]
