"""Graphs for OpenVINO, in int8 by post-training quantization with scales from texts of the user's kind.

Weights have a scale a column and activations one fixed scale a tensor, found once, when the artifact is built: no
window's numbers depend on another's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nermill.model_build.calibration import Inputs, Windows, window_inputs
from nermill.model_build.export import to_onnx
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import Manifest, Precision
from nermill.worker.engine.encoder import Encoder
from nermill.worker.engine.layers import Attention, replace

MODEL_FILE = "model.xml"


class SummedAttention(Attention):
    """``Attention`` whose softmax is summed by the product with the values, as one more column of ones.

    A softmax adds in the lanes of a vector register: shift a window within its row, and its sum differs in the last
    bit, which rounding to int8 further down makes a step of. A matrix product adds one key after another, and the
    zeros of other windows change nothing.
    """

    def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        query, key, value = self.split(qkv)
        scores = (query * self.scale) @ key.transpose(-1, -2) + bias
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        seen = weights @ functional.pad(value, (0, 1), value=1.0)
        return (seen[..., :-1] / seen[..., -1:]).transpose(1, 2).flatten(-2)


def check_machine(precision: Precision) -> None:
    """Refuses what cannot be built here.

    Raises:
        UsageError: OpenVINO, or what quantizes for it, is not installed.
        ArtifactError: this CPU does not compute in that precision.
    """
    try:
        from nermill.worker.engine.openvino import check_precision

        check_precision(precision, f"--precision {precision}")
        if precision == "int8":
            import_nncf()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--backend openvino needs {error.name}, which is not installed; pip install 'nermill[openvino-build]'"
        ) from None


def import_nncf() -> Any:
    """The package that quantizes, silent, and without its telemetry."""
    os.environ.setdefault("NNCF_CI", "1")  # read on import; it would tell a server of each use
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


def to_openvino(model: Encoder, folder: Path, dtype: torch.dtype, manifest: Manifest, windows: Windows) -> None:
    """Writes ``model.xml`` and ``model.bin`` with free rows and length.

    Args:
        model: In float32; its attention is replaced where rows are packed.
        folder: The artifact's folder.
        dtype: Of the inputs.
        manifest: The artifact's, as far as it is known.
        windows: What to find the scales of int8 with; none for a float32 graph.
    """
    import openvino

    if manifest.layout != "equal":
        replace(model, Attention, lambda plain: SummedAttention(plain.heads, plain.scale))
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        path = Path(aside) / "model.onnx"
        to_onnx(model, path, dtype)
        graph = openvino.Core().read_model(path)
        if windows:
            graph = _quantized(graph, [window_inputs(window, manifest) for window in windows])
        openvino.save_model(graph, folder / MODEL_FILE, compress_to_fp16=False)


def _quantized(graph: Any, rows: Sequence[Inputs]) -> Any:
    nncf = import_nncf()
    # the weights of attention reach from 0 to 1 with most of them near 0: eight bits do not hold them
    attended = [op.get_friendly_name() for op in graph.get_ops() if _is_attended(op)]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            graph,
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
            ignored_scope=nncf.IgnoredScope(names=attended),
        )


def _is_attended(operation: Any) -> bool:
    is_product: bool = operation.get_type_name() == "MatMul"
    return is_product and operation.input_value(0).get_node().get_type_name() in ("Exp", "Softmax")
