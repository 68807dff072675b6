"""The engine on Ascend NPUs through ``mindietorch``, or ``torch_aie`` as it was called before.

Written against the documented API of both; it has not run on an NPU. ``set_device`` comes before the module is
loaded, inputs go to the device by hand, the forward is asynchronous on a stream of our own, and the answer of a
module that was compiled in parts may lie on the CPU already.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch
from nermill.worker.engine.inputs import check_names, lines_of, named_inputs, npu_number, refusal

PACKAGES = ("mindietorch", "torch_aie")


def import_package() -> Any:
    """The installed package of MindIE Torch; its import must follow torch's.

    Raises:
        ModuleNotFoundError: there is none.
    """
    for name in PACKAGES:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ModuleNotFoundError("mindietorch is not installed", name=PACKAGES[0])


class AieEngine:
    """A module compiled for an NPU; see ``nermill.worker.engine.Engine``. One process serves one chip."""

    at_once = 1
    in_flight = 2

    def __init__(self, artifact: Path, manifest: Manifest, device: str = "npu:0") -> None:
        self.manifest = manifest
        self.device = device
        index = npu_number(artifact, device)
        self._package = import_package()
        try:
            self._package.set_device(index)
            self._module = load_script(artifact / manifest.model_file)
            self._streams = [self._package.npu.Stream(f"npu:{index}") for _ in range(self.in_flight)]
        except RuntimeError as error:
            raise ArtifactError(f"{artifact}: {device} does not load it ({lines_of(error)[0]})") from None
        check_names(manifest, list(manifest.details["graph_inputs"]))

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels)."""
        feeds = named_inputs(batch, self.manifest)
        stream = self._streams.pop()  # one a call: at most ``in_flight`` calls are under way
        try:
            inputs = [torch.from_numpy(array).to(self.device) for array in feeds.values()]
            with self._package.npu.stream(stream):
                logits = self._module(*inputs)
            stream.synchronize()
            if logits.device.type != "cpu":
                logits = logits.to("cpu")
            answer: NDArray[np.float32] = logits.float().numpy()
        except RuntimeError as error:
            raise refusal(self._package.__name__, self.device, batch, lines_of(error)[-1]) from error
        finally:
            self._streams.append(stream)
        return answer

    def close(self) -> None:
        """Frees the module and finalizes the package: the last call of this process."""
        del self._module
        self._streams.clear()
        self._package.finalize()


def load_script(path: Path) -> Any:
    """A TorchScript module from a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still what compilers for NPUs take
        return torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]
