"""From a module to an ONNX graph."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from packaging import version
from torch import Tensor

from nermill.worker.contracts.errors import UsageError
from nermill.worker.engine.encoder import Encoder

OPSET = 18
INLINE_BYTES = 500_000_000


def example_inputs(model: Encoder, dtype: torch.dtype, shape: tuple[int, int] = (2, 16)) -> tuple[Tensor, ...]:
    """Inputs to trace with: one window a row, in the order of ``model.inputs``."""
    ones = torch.ones(shape, dtype=dtype)
    positions = torch.arange(shape[1], dtype=dtype).repeat(shape[0], 1)
    by_name = {
        "input_ids": ones,
        "segments": ones.clone(),
        "position_ids": positions + model.position_offset,
        "attention_mask": ones.clone(),
        "token_type_ids": torch.zeros_like(ones),
    }
    return tuple(by_name[name] for name in model.inputs)


def to_onnx(model: Encoder, path: Path, dtype: torch.dtype) -> None:
    """Writes an ONNX graph with free rows and length; parameters keep their names.

    Weights over INLINE_BYTES go into a file beside it: the format allows 2 GB in one, and writing them apart
    needs no copy in memory.

    Raises:
        UsageError: this torch is too old for the exporter.
    """
    if version.parse(torch.__version__) < version.parse("2.6"):
        raise UsageError(f"--backend onnx needs torch >= 2.6 to export, and here is {torch.__version__}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators that we do not use
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own use of what torch deprecates
        program = torch.onnx.export(
            model,
            example_inputs(model, dtype),
            dynamo=True,
            input_names=model.inputs,
            output_names=["logits"],
            dynamic_shapes=({0: "rows", 1: "length"},) * len(model.inputs),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.gelu.default: _gelu},
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine
        node.doc_string = None
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    program.save(path, external_data=size > INLINE_BYTES)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in the form that onnxruntime knows and fuses; as torch writes it, it would be five passes over its input."""
    from onnxscript import opset18 as op

    def constant(value: float) -> Any:
        return op.CastLike(value, x)

    if approximate == "tanh":
        cubed = op.Mul(op.Pow(x, constant(3.0)), constant(0.044715))
        curve = op.Tanh(op.Mul(op.Add(x, cubed), constant(math.sqrt(2 / math.pi))))
    else:
        curve = op.Erf(op.Div(x, constant(math.sqrt(2))))
    return op.Mul(op.Mul(x, constant(0.5)), op.Add(curve, constant(1.0)))
