"""int8: a scale for each column of a weight, and for activations one that does not depend on the batch.

The usual dynamic quantization takes one scale for a whole tensor, so that a token's logits depend on the other
documents of its batch. Here an activation's scale is fixed, found with calibration texts when the artifact is built, or
it is the token's own. With fixed scales a batch takes about two thirds of the time: no largest value is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nermill.model_build.calibration import Ranges
from nermill.worker.contracts.errors import UsageError
from nermill.worker.engine.encoder import Encoder
from nermill.worker.engine.layers import SMALLEST, TOKEN_RANGE, Int8Linear, Linear, replace

# Processors without VNNI add two products in 16 bits, and 2 × 255 × 64 is the most that fits: with weights in ±64
# an artifact gives the same answers on all of them. It costs about 20 tags of CoNLL valid's 51,362, and no F1.
WEIGHT_RANGE = 64
TABLE_RANGE = 127  # embedding rows are looked up, not multiplied in 8 bits
USUAL, OUTLIER = 0.99, 2.0  # quantile of a layer's channels, and how many times as large an outlier is at least
_FLOAT_TABLES = ("positions.weight",)  # small, and added to every token

Float = NDArray[np.float32]
_CONSTANTS = {
    "int8.last_axis": np.array([-1], np.int64),
    "int8.smallest": np.float32(SMALLEST),
    "int8.range": np.float32(TOKEN_RANGE),
    "int8.one": np.float32(1),
    "int8.zero_point": np.uint8(128),
    "int8.columns": np.array([2], np.int64),  # of ones; with a single one it would be a dot product, in lanes again
}


def quantize(weight: Float, axis: int, limit: int) -> tuple[NDArray[np.int8], Float]:
    """Symmetric int8 with one scale for each slice along ``axis``; the scale keeps the reduced axis."""
    scale = np.maximum(np.abs(weight).max(axis, keepdims=True), SMALLEST) / limit
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def quantize_onnx(path: Path, ranges: Ranges | None = None) -> None:
    """Rewrites a float32 graph in place: products with a weight and the word table become int8.

    Args:
        path: The graph.
        ranges: Smallest and largest inputs of each layer, for fixed scales; None for a scale a token.
    """
    model = onnx.load(path, load_external_data=False)  # weights in a file beside it are read one by one
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    stored: list[TensorProto] = [numpy_helper.from_array(np.asarray(v), k) for k, v in _CONSTANTS.items()]

    def read(tensor: TensorProto) -> NDArray[Any]:
        array: NDArray[Any] = numpy_helper.to_array(tensor, str(path.parent))
        return array

    def store(name: str, weight: Float, axis: int, limit: int) -> None:
        values, scale = quantize(weight, axis, limit)
        stored.append(numpy_helper.from_array(values, f"{name}.int8"))
        stored.append(numpy_helper.from_array(scale, f"{name}.scale"))

    def take(name: str) -> Float:
        return read(weights.pop(name))

    def fixed_product(product: NodeProto, bias: str, y: str) -> Iterator[NodeProto]:
        """A product whose input has a fixed scale, and the sum with its bias."""
        x, name = product.input
        assert ranges is not None
        weight, (low, high) = take(name), ranges[name.removesuffix(".weight")]
        constants: dict[str, Any] = {}
        divisor = divisors(np.maximum(-low, high))
        if divisor.max() > 1:
            constants["input_factor"] = 1 / divisor
            weight, low, high = weight * divisor[:, None], low / divisor, high / divisor
            yield helper.make_node("Mul", [x, f"{name}.input_factor"], [f"{y}.even"])
            x = f"{y}.even"
        constants["input_scale"], constants["input_zero_point"] = input_scale(float(low.min()), float(high.max()))
        store(name, weight, 0, WEIGHT_RANGE)
        stored.extend(numpy_helper.from_array(np.asarray(value), f"{name}.{key}") for key, value in constants.items())
        scale, zero_point = f"{name}.input_scale", f"{name}.input_zero_point"
        yield helper.make_node("QuantizeLinear", [x, scale, zero_point], [f"{y}.uint8"])
        inputs = [f"{y}.uint8", f"{name}.int8", scale, f"{name}.scale", zero_point, "", bias]
        yield helper.make_node("MatMulIntegerToFloat", inputs, [y], domain="com.microsoft")

    products: dict[str, NodeProto] = {}  # by their output, which one sum with a bias reads
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            if ranges is None:
                store(node.input[1], take(node.input[1]), 0, WEIGHT_RANGE)
                nodes += _product(node)
            else:
                products[node.output[0]] = node
        elif node.op_type == "Add" and node.input[0] in products:
            nodes += fixed_product(products.pop(node.input[0]), node.input[1], node.output[0])
        elif node.op_type == "Gather" and node.input[0].endswith(".weight") and node.input[0] not in _FLOAT_TABLES:
            store(node.input[0], take(node.input[0]), 1, TABLE_RANGE)
            nodes += _lookup(node)
        elif node.op_type == "Softmax":
            nodes += _softmax(node)
        else:
            nodes.append(node)
    assert not products, "every product of a Linear is followed by the sum with its bias"
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([numpy_helper.from_array(read(tensor), name) for name, tensor in weights.items()])
    graph.initializer.extend(stored)
    if "com.microsoft" not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_operatorsetid("com.microsoft", 1))
    onnx.save(model, path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def divisors(largest: Float) -> Float:
    """What to divide the channels of a layer's input by, and multiply the rows of its weight with.

    A few channels of a layer norm, and of the [CLS] token's activations, are many times larger than all others: with
    one scale for all, the others would keep few steps of int8. As in SmoothQuant (Xiao et al., arXiv:2211.10438) the
    difference moves to the weight, but for these channels alone.

    Args:
        largest: Largest absolute value of each channel, shape (inputs,).

    Returns:
        Shape (inputs,); ones where no channel is larger than OUTLIER times the USUAL quantile.
    """
    usual = max(float(np.quantile(largest, USUAL)), SMALLEST)
    ratio: Float = (largest / usual).astype(np.float32)
    return np.maximum(ratio, 1) if ratio.max() > OUTLIER else np.ones_like(ratio)


def input_scale(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 for the numbers from ``low`` to ``high``, which 0 is among."""
    scale = max(high - low, SMALLEST) / 255
    return np.float32(scale), np.uint8(round(-low / scale))


def _product(node: NodeProto) -> list[NodeProto]:
    x, weight, y = node.input[0], node.input[1], node.output[0]
    return [
        helper.make_node("Abs", [x], [f"{y}.abs"]),
        helper.make_node("ReduceMax", [f"{y}.abs", "int8.last_axis"], [f"{y}.absmax"], keepdims=1),
        helper.make_node("Max", [f"{y}.absmax", "int8.smallest"], [f"{y}.max"]),
        helper.make_node("Div", ["int8.range", f"{y}.max"], [f"{y}.steps"]),
        helper.make_node("Mul", [x, f"{y}.steps"], [f"{y}.scaled"]),
        helper.make_node("QuantizeLinear", [f"{y}.scaled", "int8.one", "int8.zero_point"], [f"{y}.uint8"]),
        helper.make_node(
            "MatMulIntegerToFloat",
            [f"{y}.uint8", f"{weight}.int8", "int8.one", f"{weight}.scale", "int8.zero_point"],
            [f"{y}.columns"],
            domain="com.microsoft",
        ),
        helper.make_node("Div", [f"{y}.max", "int8.range"], [f"{y}.step"]),
        helper.make_node("Mul", [f"{y}.columns", f"{y}.step"], [y]),
    ]


def _lookup(node: NodeProto) -> list[NodeProto]:
    table, ids, y = node.input[0], node.input[1], node.output[0]
    return [
        helper.make_node("Gather", [f"{table}.int8", ids], [f"{y}.int8"]),
        helper.make_node("Cast", [f"{y}.int8"], [f"{y}.whole"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}.scale", ids], [f"{y}.scale"]),
        helper.make_node("Mul", [f"{y}.whole", f"{y}.scale"], [y]),
    ]


def _softmax(node: NodeProto) -> list[NodeProto]:
    """A softmax whose sum does not feel where in its row a window lies.

    The usual one adds in the lanes of a vector register: shift a window, and its sum differs in the last bit. That is
    nothing in float32, but rounding to int8 further down makes a step of it, and one document in some thousands got
    another tag for its neighbours' sake. A matrix product adds one after another, and zeros change nothing.
    """
    x, y = node.input[0], node.output[0]
    return [
        helper.make_node("ReduceMax", [x, "int8.last_axis"], [f"{y}.max"], keepdims=1),
        helper.make_node("Sub", [x, f"{y}.max"], [f"{y}.below"]),
        helper.make_node("Exp", [f"{y}.below"], [f"{y}.exp"]),
        helper.make_node("Shape", [f"{y}.exp"], [f"{y}.length"], start=-1),
        helper.make_node("Concat", [f"{y}.length", "int8.columns"], [f"{y}.shape"], axis=0),
        helper.make_node("Expand", ["int8.one", f"{y}.shape"], [f"{y}.ones"]),
        helper.make_node("MatMul", [f"{y}.exp", f"{y}.ones"], [f"{y}.sums"]),
        helper.make_node("ReduceMax", [f"{y}.sums", "int8.last_axis"], [f"{y}.sum"], keepdims=1),
        helper.make_node("Div", [f"{y}.exp", f"{y}.sum"], [y]),
    ]


def read_weights(path: Path) -> dict[str, Float]:
    """The parameters of a graph by their names, int8 ones back in float32."""
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    weights = {name: value for name, value in tensors.items() if name.endswith((".weight", ".bias", "first_type"))}
    for name, values in tensors.items():
        if name.endswith(".weight.int8"):
            owner = name.removesuffix(".int8")
            weights[owner] = values.astype(np.float32) * tensors[f"{owner}.scale"]
            if f"{owner}.input_factor" in tensors:
                weights[owner] *= tensors[f"{owner}.input_factor"][:, None]
    return weights


def quantize_module(model: Encoder) -> None:
    """Replaces every ``Linear`` of a float32 encoder in place.

    Raises:
        UsageError: this torch has no int8 product on the CPU.
    """
    try:
        torch._int_mm(torch.zeros(32, 32, dtype=torch.int8), torch.zeros(32, 32, dtype=torch.int8))
    except (AttributeError, RuntimeError, NotImplementedError):
        raise UsageError(f"--precision int8: torch {torch.__version__} has no int8 product on the CPU") from None
    replace(model, Linear, quantize_linear)


def quantize_linear(linear: Linear) -> Int8Linear:
    """The int8 form of a float32 layer."""
    values, scale = quantize(linear.weight.numpy(), 0, TOKEN_RANGE)
    return Int8Linear(torch.from_numpy(values), torch.from_numpy(scale), linear.bias.detach(), linear.activation)
