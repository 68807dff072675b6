"""The engine on plain torch: CPU, CUDA, and Ascend NPUs through torch_npu (those two are untried on their devices)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from nermill.worker.contracts.errors import ArtifactError, EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch
from nermill.worker.engine.cuda import StreamRunner
from nermill.worker.engine.encoder import Architecture, Encoder, build
from nermill.worker.engine.inputs import check_names, lines_of, named_inputs, refusal
from nermill.worker.engine.layers import fuse


class TorchEngine:
    """Our forward pass with an artifact's weights on one device; see ``nermill.worker.engine.Engine``."""

    def __init__(self, artifact: Path, manifest: Manifest, device: str = "cpu", threads: int = 0) -> None:
        self.manifest = manifest
        self.device = device
        self.at_once = 1
        self.in_flight = 1 if device == "cpu" else 2
        target = _device(device)
        if manifest.precision == "int8" and target.type != "cpu":  # CUDA's _int_mm takes eights of labels alone
            raise ArtifactError(f"{artifact}: int8 is for CPUs; for {device} build it with --precision fp16")
        if manifest.layout == "equal" and target.type != "cpu":
            raise ArtifactError(f"{artifact}: layout equal is for CPUs; for {device} compile with --layout packed")
        if threads:
            torch.set_num_threads(threads)
        try:
            self._model = _load(artifact / manifest.model_file, manifest, target)
            check_names(manifest, list(self._model.inputs))
            with torch.inference_mode():  # weights that do not go together show now
                self._compute({name: torch.zeros(1, 2, dtype=torch.int64) for name in self._model.inputs})
            self._forward = [self._lane(target) for _ in range(self.in_flight)]
        except ArtifactError:
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(f"{device} has no memory for {artifact}: {lines_of(error)[0]}") from None
        except Exception as error:
            reason = shorten(str(error), 200, placeholder=" ...")
            raise ArtifactError(
                f"{artifact}: torch {torch.__version__} does not load it on {device} ({reason}); build it again"
            ) from None

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels)."""
        inputs = {name: torch.from_numpy(array) for name, array in named_inputs(batch, self.manifest).items()}
        forward = self._forward.pop()  # at most ``in_flight`` calls are under way
        try:
            with torch.inference_mode():
                logits: NDArray[np.float32] = forward(inputs).numpy()
        except Exception as error:  # its traceback would keep the batch's tensors while it is tried again
            raise refusal("torch", self.device, batch, lines_of(error)[0]) from error.with_traceback(None)
        finally:
            self._forward.append(forward)
        return logits

    def _lane(self, device: torch.device) -> Callable[[Mapping[str, Tensor]], Tensor]:
        return StreamRunner(self._model, self.manifest, device) if device.type == "cuda" else self._compute

    def _compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self._model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return logits.cpu()

    def close(self) -> None:
        """Frees the model."""
        del self._forward, self._model


def _load(file: Path, manifest: Manifest, device: torch.device) -> Encoder:
    model = build(
        Architecture(**manifest.details["architecture"]),
        load_file(file),
        layout=manifest.layout,
        int8=manifest.precision == "int8",
    )
    fuse(model, device)
    model.to(device)
    return model


def _device(device: str) -> torch.device:
    kind = device.partition(":")[0]
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401  (registers the device with torch)
        except ImportError:
            raise ArtifactError(f"device {device}: torch_npu is not installed; pip install torch-npu") from None
    elif kind == "cuda":
        index = device.partition(":")[2] or "0"
        if not index.isdecimal() or int(index) >= torch.cuda.device_count():
            raise ArtifactError(
                f"device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            )
    elif device != "cpu":
        raise ArtifactError(f"device {device!r}: write cpu, cuda:N or npu:N")
    return torch.device(device)
