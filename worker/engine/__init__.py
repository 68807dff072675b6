"""The compiled model behind one protocol; only this room knows an accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import Manifest, load_manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine computes at once; three int64 arrays of shape (rows, length).

    Attributes:
        input_ids: Token ids, the pad id where nothing is.
        segments: 0 where nothing is, else the number (from 1) of the token's window within its row;
            tokens see those of their own segment alone.
        position_ids: Position of each token within its window.
    """

    input_ids: NDArray[np.int64]
    segments: NDArray[np.int64]
    position_ids: NDArray[np.int64]


class Engine(Protocol):
    """A loaded model on one device.

    Attributes:
        manifest: The artifact's word.
        device: What it runs on: ``cpu``, ``cuda:0``, ``npu:0``.
        at_once: How many calls of ``run`` the device computes at the same time: onnxruntime and OpenVINO on a CPU one a
            core, others one.
        in_flight: How many calls of ``run`` may be under way at the same time to keep the device busy.
    """

    manifest: Manifest
    device: str
    at_once: int
    in_flight: int

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels).

        Raises:
            EngineError: the device or its runtime failed.
        """
        ...

    def close(self) -> None:
        """Gives the device back."""
        ...


def load_engine(artifact: Path, device: str = "cpu", threads: int = 0) -> Engine:
    """Loads an artifact on a device, its hashes checked.

    Args:
        artifact: The artifact's folder.
        device: ``cpu``, ``cuda:N`` or ``npu:N``.
        threads: Compute threads on a CPU; 0 takes as many as this process may use.

    Raises:
        ArtifactError: the artifact cannot be served here, with the reason.
    """
    manifest = load_manifest(artifact)
    try:
        if manifest.backend == "onnx":
            from nermill.worker.engine.onnx import OnnxEngine

            return OnnxEngine(artifact, manifest, device, threads)
        if manifest.backend == "torch":
            from nermill.worker.engine.torch import TorchEngine

            return TorchEngine(artifact, manifest, device, threads)
        if manifest.backend == "openvino":
            from nermill.worker.engine.openvino import OpenvinoEngine

            return OpenvinoEngine(artifact, manifest, device, threads)
        if manifest.backend == "om":
            from nermill.worker.engine.om import OmEngine

            return OmEngine(artifact, manifest, device)
        from nermill.worker.engine.aie import AieEngine

        return AieEngine(artifact, manifest, device)
    except ModuleNotFoundError as error:
        extra = {"onnx": "nermill[worker]", "torch": "nermill[torch]", "openvino": "nermill[openvino]"}.get(
            manifest.backend, "the mindietorch wheel of your MindIE release"
        )
        raise ArtifactError(
            f"{artifact}: backend {manifest.backend} needs {error.name}, which is not installed; pip install {extra}"
        ) from None
