"""From a module to an ONNX graph, or to TorchScript."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from packaging import version
from torch import Tensor, nn

from nermill.worker.contracts.errors import UsageError
from nermill.worker.engine.encoder import Encoder
from nermill.worker.engine.layers import Attention, replace

OPSET = 18
INLINE_BYTES = 500_000_000
HAS_OPERATORS = hasattr(torch.onnx, "ops")  # those of onnxruntime can be named: torch 2.8
TRACED_OPSET = 13  # CANN's own recipes use 11 to 13; Clip takes integers since 12
ONE_FILE_BYTES = 1_900_000_000  # protobuf's limit is 2 GB

Shapes = tuple[tuple[int, int], ...]


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


def to_onnx(model: Encoder, path: Path, dtype: torch.dtype, *, fused: bool = False) -> None:
    """Writes an ONNX graph with free rows and length; parameters keep their names.

    With ``fused``, attention is onnxruntime's own operator, which takes no mask; the model's attention is replaced.

    Weights over INLINE_BYTES go into a file beside it: the format allows 2 GB in one, and writing them apart
    needs no copy in memory.

    Raises:
        UsageError: this torch is too old for the exporter.
    """
    if version.parse(torch.__version__) < version.parse("2.6"):
        raise UsageError(f"--backend onnx needs torch >= 2.6 to export, and here is {torch.__version__}")
    if fused and not HAS_OPERATORS:
        raise UsageError(
            f"--layout equal needs torch >= 2.8 to export, and here is {torch.__version__}; or take --layout packed"
        )
    if fused:
        replace(model, Attention, lambda plain: _OnnxruntimeAttention(plain.heads, plain.scale))
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


def trace_script(model: Encoder, path: Path, dtype: torch.dtype, shapes: Shapes) -> None:
    """Writes TorchScript, traced with the first shape; it takes the inputs in the order of ``model.inputs``."""
    _plain_attention(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still what compilers for NPUs take
        example = example_inputs(model, dtype, *shapes[:1])
        torch.jit.trace(model, example, check_trace=False).save(str(path))  # type: ignore[no-untyped-call]


def trace_onnx(model: Encoder, path: Path, dtype: torch.dtype, shapes: Shapes) -> None:
    """Writes an ONNX graph of opset 13 in plain operators: the form that compilers of accelerators match.

    Layer norm and GELU are the chains of operators that their fusion passes look for, where opset 17 and later would
    say LayerNormalization. With one shape the graph is fixed to it; with several, or none, rows and length are free.
    """
    _plain_attention(model)
    free = None if len(shapes) == 1 else {name: {0: "rows", 1: "length"} for name in model.inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracing exporter is deprecated; torch 2.1 of Ascend hosts has no other
        torch.onnx.export(
            model,
            example_inputs(model, dtype, *shapes[:1]),
            str(path),
            dynamo=False,
            input_names=list(model.inputs),
            output_names=["logits"],
            dynamic_axes=free,
            opset_version=TRACED_OPSET,
        )
    _declare_unused_inputs(path, model, dtype, free)
    if sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) > ONE_FILE_BYTES:
        _into_one_data_file(path)


def _declare_unused_inputs(path: Path, model: Encoder, dtype: torch.dtype, free: dict[str, Any] | None) -> None:
    """Puts inputs back that the exporter dropped: token types, of which DistilBERT has none, belong to the contract."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    there = {entry.name: entry for entry in graph.graph.input}
    if len(there) == len(model.inputs):
        return
    element = onnx.TensorProto.INT32 if dtype == torch.int32 else onnx.TensorProto.INT64
    like = there["input_ids"].type.tensor_type.shape.dim
    shape = ["rows", "length"] if free else [dim.dim_value for dim in like]
    inputs = [there.get(n) or onnx.helper.make_tensor_value_info(n, element, shape) for n in model.inputs]
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    onnx.save(graph, path)


def _into_one_data_file(path: Path) -> None:
    """Gathers the files, one a weight, that the exporter writes where a graph does not fit into one."""
    import onnx

    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                (path.parent / entry.value).unlink(missing_ok=True)
    onnx.save(graph, path, save_as_external_data=True, location=f"{path.name}.data")


class _PlainAttention(Attention):
    """``Attention`` with the sizes of heads as constants: its reshapes leave no arithmetic in a traced graph."""

    def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        rows, length, width = qkv.shape
        hidden = int(width) // 3
        query, key, value = (
            part.reshape(rows, length, self.heads, hidden // self.heads).transpose(1, 2)
            for part in qkv.split(hidden, -1)
        )
        scores = (query * self.scale) @ key.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, hidden)


class _OnnxruntimeAttention(Attention):
    """``Attention`` without a mask as one operator of onnxruntime, which holds few of the scores at a time."""

    def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        parts = qkv.chunk(3, dim=-1)
        return torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            parts,
            {"num_heads": self.heads, "scale": self.scale},
            dtype=qkv.dtype,
            shape=parts[0].shape,
            version=1,
        )


def _plain_attention(model: nn.Module) -> None:
    replace(model, Attention, lambda layer: _PlainAttention(layer.heads, layer.scale))


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
