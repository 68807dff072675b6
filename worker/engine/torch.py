"""The engine on TorchScript: CPU, CUDA, and Ascend NPUs through torch_npu (that one has not been tried on hardware)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from worker.contracts.errors import ArtifactError
from worker.contracts.manifest import Manifest
from worker.engine import Batch
from worker.engine.inputs import check_names, named_inputs, refusal


class TorchEngine:
    """A traced module on one device; see ``worker.engine.Engine``."""

    def __init__(self, artifact: Path, manifest: Manifest, device: str = "cpu", threads: int = 0) -> None:
        self.manifest = manifest
        self.device = device
        self.in_flight = 1 if device == "cpu" else 2
        target = _device(device)
        if threads:
            torch.set_num_threads(threads)
        try:
            self._module = load_script(artifact / manifest.model_file, map_location=target)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(
                f"{artifact}: torch {torch.__version__} does not load it on {device} ({reason})"
            ) from None
        check_names(manifest, [argument.name for argument in self._module.forward.schema.arguments[1:]])

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels)."""
        feeds = named_inputs(batch, self.manifest)
        try:
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
                logits: NDArray[np.float32] = self._module(**tensors).cpu().numpy()
        except RuntimeError as error:
            raise refusal("torch", self.device, batch, error) from error
        return logits

    def close(self) -> None:
        """Frees the module."""
        del self._module


def load_script(path: Path, **options: Any) -> Any:
    """``torch.jit.load``, quiet: TorchScript is deprecated, and still what compilers for NPUs take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), **options).eval()  # type: ignore[no-untyped-call]


def _device(device: str) -> torch.device:
    kind = device.partition(":")[0]
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401  (registers the device with torch)
        except ImportError:
            raise ArtifactError(f"device {device}: torch_npu is not installed; pip install torch-npu") from None
    elif kind == "cuda":
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ArtifactError(
                f"device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            )
    elif kind != "cpu":
        raise ArtifactError(f"device {device!r}: write cpu, cuda:N or npu:N")
    return torch.device(device)
