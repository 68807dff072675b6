"""Graphs for OpenVINO, in int8 by post-training quantization with scales from texts of the user's kind.

Weights have a scale a column and activations one fixed scale a tensor, found once, when the artifact is built: no
window's numbers depend on another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from nermill.model_build.corpus import Text, encode, read_texts
from nermill.model_build.export import to_onnx
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest, Precision
from nermill.worker.engine.encoder import Encoder
from nermill.worker.engine.golden import lay_rows
from nermill.worker.engine.inputs import named_inputs
from nermill.worker.engine.layers import Attention, replace

MODEL_FILE = "model.xml"
CALIBRATION_ROWS = 150  # packed rows that scales are found with
ROW_LENGTH = 128
MOST_TEXTS = 5000  # of a file that are tokenized, evenly spread

Feeds = dict[str, NDArray[np.integer]]
Windows = Sequence[Sequence[int]]


class SummedAttention(Attention):
    """``Attention`` whose softmax is summed by the product with the values, as one more column of ones.

    A softmax adds in the lanes of a vector register: shift a window within its row, and its sum differs in the last
    bit, which rounding to int8 further down makes a step of. A matrix product adds one key after another, and the
    zeros of other windows change nothing.
    """

    def forward(self, qkv: Tensor, bias: Tensor) -> Tensor:
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


def calibration(
    path: str | None, folder: Path, manifest: Manifest, golden: Windows
) -> tuple[list[Feeds], dict[str, Any]]:
    """Rows to find the scales of int8 with, of a file's texts or else the golden ones; none for another precision.

    Args:
        path: The file: CoNLL, JSONL or plain lines.
        folder: Where the artifact's tokenizer is.
        manifest: The artifact's, as far as it is known.
        golden: Token ids of the golden texts.

    Returns:
        At most CALIBRATION_ROWS rows, evenly spread over the texts, each as the graph's inputs; and for the manifest
        what they are.

    Raises:
        UsageError: the file cannot be read, or holds no text.
    """
    if manifest.precision != "int8":
        return [], {}
    windows, source = golden, f"{len(golden)} golden texts"
    if path is not None:
        texts = read_texts([path])
        windows, source = list(_windows(texts, folder, manifest)), f"{len(texts)} texts of {Path(path).name}"
    rows = list(_rows(windows, manifest))
    step = max(1.0, len(rows) / CALIBRATION_ROWS)
    chosen = [rows[int(at * step)] for at in range(min(len(rows), CALIBRATION_ROWS))]
    return chosen, {"calibration": {"texts": source, "rows": len(chosen)}}


def _windows(texts: Sequence[Text], folder: Path, manifest: Manifest) -> Iterator[Sequence[int]]:
    step = max(1, len(texts) // MOST_TEXTS)
    keep = min(manifest.max_length, ROW_LENGTH) - 2
    for ids, _ in encode(Tokenizer.from_file(str(folder / TOKENIZER_FILE)), texts[::step]):
        yield from ((manifest.cls_id, *ids[at : at + keep], manifest.sep_id) for at in range(0, len(ids), keep))


def _rows(windows: Windows, manifest: Manifest) -> Iterator[Feeds]:
    length = max(min(ROW_LENGTH, manifest.max_length), *map(len, windows))
    rows: list[list[Sequence[int]]] = []
    free = 0
    for window in windows:
        if len(window) > free or manifest.layout == "plain":
            rows.append([])
            free = length
        rows[-1].append(window)
        free -= len(window)
    free_shapes = dataclasses.replace(manifest, shapes=())
    return (named_inputs(lay_rows([row], (1, length), manifest), free_shapes) for row in rows)


def to_openvino(model: Encoder, folder: Path, dtype: torch.dtype, rows: Sequence[Feeds]) -> None:
    """Writes ``model.xml`` and ``model.bin`` with free rows and length.

    Args:
        model: In float32; its attention is replaced.
        folder: The artifact's folder.
        dtype: Of the inputs.
        rows: What to find the scales of int8 with; none for a float32 graph.
    """
    import openvino

    replace(model, Attention, lambda plain: SummedAttention(plain.heads, plain.scale))
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        path = Path(aside) / "model.onnx"
        to_onnx(model, path, dtype)
        graph = openvino.Core().read_model(path)
        if rows:
            graph = _quantized(graph, rows)
        openvino.save_model(graph, folder / MODEL_FILE, compress_to_fp16=False)


def _quantized(graph: Any, rows: Sequence[Feeds]) -> Any:
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
    return is_product and operation.input_value(0).get_node().get_type_name() == "Exp"
