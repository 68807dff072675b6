"""The graph alone, for people with a tool chain of their own: ``nermill-build export``."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from nermill.model_build.artifact import Order, check_order, describe
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.export import trace_onnx, trace_script
from nermill.model_build.reference import check_graph, golden
from nermill.model_build.shapes import parse_shapes
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.manifest import Manifest, file_sha256
from nermill.worker.engine import Batch
from nermill.worker.engine.aie import load_script
from nermill.worker.engine.encoder import MASKED, build
from nermill.worker.engine.inputs import named_inputs
from nermill.worker.engine.onnx import OnnxEngine

Format = Literal["torchscript", "onnx"]


def export_graph(where: str, out: Path, form: Format, order: Order) -> dict[str, Any]:
    """Writes the checkpoint ``where`` as the file ``out``, once it gives the checkpoint's logits in every shape.

    Args:
        where: The checkpoint.
        out: File to make; a graph over 1.9 GB has its weights in ``out`` + ``.data``.
        form: ``torchscript``, or ``onnx`` (opset 13, plain operators).
        order: Its layout, shapes and index dtype count. One shape is fixed in an ONNX graph, several leave it free.

    Returns:
        ``file``, ``sha256``, ``bytes``, ``inputs`` (name and dtype, in the graph's order), ``output``, ``shapes``,
        ``masked`` (what is added where a token must not look: float16 holds it), ``difference`` (largest, of a logit).

    Raises:
        UsageError: the checkpoint, an option or the file does not fit.
        EngineError: the graph does not give the checkpoint's logits.
        StoreError: the disk gave up on the way.
    """
    if form not in get_args(Format):
        raise UsageError(f"--format {form}: nermill exports {', '.join(get_args(Format))}")
    layout, precision = check_order(order)
    if layout == "equal":
        raise UsageError("--layout equal: its attention is onnxruntime's own; export takes packed, plain")
    if out.exists():
        raise UsageError(f"{out}: is there already; name a new file or remove it")
    checkpoint = open_checkpoint(where)
    shapes = parse_shapes(order.shapes, checkpoint.max_length, order.backend)
    max_length = min(checkpoint.max_length, max((length for _, length in shapes), default=checkpoint.max_length))
    weights = checkpoint.weights()
    answers = golden(checkpoint, max_length)
    model = build(checkpoint.architecture, weights, layout=layout)
    manifest = replace(
        describe(checkpoint, order, layout, precision, shapes, answers, model.inputs), model_file=out.name
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            written = Path(aside) / out.name
            trace = trace_onnx if form == "onnx" else trace_script
            trace(model, written, getattr(torch, order.index_dtype), shapes)
            difference = check_graph(
                OnnxEngine(written.parent, manifest) if form == "onnx" else _Script(written, manifest), answers
            )
            for path in sorted(written.parent.iterdir(), reverse=True):  # the graph last, when its weights are there
                os.chmod(path, 0o666 & ~_umask())
                os.replace(path, out.with_name(path.name))
    except OSError as error:
        raise StoreError(f"{out}: cannot be written ({error.strerror or error}); nothing was left there") from error
    return {
        "file": str(out),
        "sha256": file_sha256(out),
        "bytes": sum(path.stat().st_size for path in (out, out.with_name(f"{out.name}.data")) if path.exists()),
        "format": form,
        "layout": layout,
        "inputs": [{"name": entry.name, "dtype": entry.dtype} for entry in manifest.inputs],
        "output": {"name": "logits", "dtype": "float32", "labels": list(manifest.labels)},
        "shapes": [list(shape) for shape in shapes],
        "masked": MASKED,
        "difference": difference,
    }


class _Script:
    """TorchScript as an engine, inputs in the manifest's order."""

    device = "cpu"
    at_once = in_flight = 1

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._module = load_script(path)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        feeds = named_inputs(batch, self.manifest)
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._module(*map(torch.from_numpy, feeds.values())).numpy()
        return logits

    def close(self) -> None:
        del self._module


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
