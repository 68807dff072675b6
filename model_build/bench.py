"""How fast an artifact is here: every shape, beside the machine's own matrix product of the model's largest size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from nermill.model_build.advice import describe, window_lengths
from nermill.model_build.corpus import Text, read_texts
from nermill.model_build.shapes import compare, compare_equal
from nermill.worker.contracts.costs import Costs
from nermill.worker.contracts.errors import EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.contracts.processor import processor_name, usable_cores
from nermill.worker.engine import load_engine
from nermill.worker.engine.encoder import Architecture
from nermill.worker.engine.golden import lay_rows

if TYPE_CHECKING:
    from nermill.worker.engine import Engine

REPEATS = 9
MIN_SECONDS = 0.2  # of one measurement: short calls are repeated within it
SAMPLE = Path(__file__).parent / "demo" / "sample" / "wikigold.conll"
FREE_LENGTHS = (16, 32, 64, 128, 256, 512)


def bench(
    artifact: Path, device: str = "cpu", threads: int = 0, repeats: int = REPEATS, texts: Sequence[Text] = ()
) -> dict[str, Any]:
    """Measures every shape of an artifact, and the peak.

    Args:
        artifact: The artifact's folder.
        device: Where it runs.
        threads: Compute threads on a CPU; 0 takes all.
        repeats: Measurements of a shape, of which the median counts.
        texts: What the ways of filling rows are compared on; the bundled sample where there are none.

    Returns:
        A table of costs (``nermill.worker.contracts.costs``); ``shapes`` holds for each shape rows, length, seconds
        (the median of one call), documents_per_second (one document a row), tokens_per_second, gflops and peak_share.
        Where the device computes several calls at once (``at_once``), seconds are those of as many calls over their
        number. A shape that the device refused holds ``refused`` instead. ``ways`` says what padded, bucketed and
        packed rows of these shapes, or rows of equal length, take for the texts, each call as measured here; windows
        are as long as the longest of them.
    """
    engine = load_engine(artifact, device, threads)
    try:
        manifest = engine.manifest
        sizes = Architecture(**manifest.details["architecture"])
        peak = _peak_gflops(engine, (manifest.batch_tokens, sizes.hidden, sizes.intermediate), repeats)
        measured = [_measure(engine, shape, sizes, peak, repeats) for shape in _shapes(engine)]
        texts = texts or read_texts([str(SAMPLE)])
        return {
            "kind": "measured",
            "source": f"nermill-build bench on {_machine(device)}, median of {repeats}",
            "artifact": manifest.name,
            "artifact_sha256": manifest.sha256,
            "backend": manifest.backend,
            "precision": manifest.precision,
            "layout": manifest.layout,
            "is_free": not manifest.shapes,
            "device": device,
            "threads": threads,
            "at_once": engine.at_once,
            "peak_gflops": peak,
            "shapes": measured,
            "documents": len(texts),
            "ways": _ways(manifest, artifact, measured, texts),
        }
    finally:
        engine.close()


def _ways(
    manifest: Manifest, artifact: Path, measured: Sequence[dict[str, Any]], texts: Sequence[Text]
) -> dict[str, Any]:
    seconds = {(entry["rows"], entry["length"]): entry["seconds"] for entry in measured if "seconds" in entry}
    if not seconds:
        return {}
    costs = Costs("", "measured", "", seconds, manifest.layout)
    windows = window_lengths(texts, artifact, min(manifest.max_length, costs.longest))
    if manifest.layout == "equal":
        return describe(compare_equal(windows, costs), len(texts))
    return describe(compare(windows, costs, manifest, len(seconds)), len(texts))


def _machine(device: str) -> str:
    """The device, and for a CPU which one and how much of it."""
    if device != "cpu":
        return device
    return f"{usable_cores()} cores of {processor_name()}"


def _shapes(engine: Engine) -> list[tuple[int, int]]:
    manifest = engine.manifest
    if manifest.shapes:
        return list(manifest.shapes)
    return [(manifest.token_budget // n, n) for n in FREE_LENGTHS if n <= manifest.max_length]


def _measure(
    engine: Engine, shape: tuple[int, int], sizes: Architecture, peak: float | None, repeats: int
) -> dict[str, Any]:
    rows, length = shape
    content = np.random.default_rng(0).integers(0, sizes.vocabulary, (rows, length - 2))
    windows = [[(engine.manifest.cls_id, *ids, engine.manifest.sep_id)] for ids in content.tolist()]
    batch = lay_rows(windows, shape, engine.manifest)
    try:
        seconds = _seconds(lambda: engine.run(batch), repeats, engine.at_once)
    except EngineError as error:
        return {"rows": rows, "length": length, "refused": str(error)}
    gflops = rows * length * sizes.flops_of_token(length) / seconds / 1e9
    return {
        "rows": rows,
        "length": length,
        "seconds": round(seconds, 6),
        "documents_per_second": round(rows / seconds, 2),
        "tokens_per_second": round(rows * length / seconds, 1),
        "gflops": round(gflops, 2),
        "peak_share": round(gflops / peak, 4) if peak else None,
    }


def _seconds(call: Callable[[], object], repeats: int, at_once: int) -> float:
    """Seconds over calls, ``at_once`` of which are under way at any time; the median of ``repeats`` measurements."""
    with ThreadPoolExecutor(at_once) as threads:

        def seconds_of(calls: int) -> float:
            begun = time.perf_counter()
            for done in [threads.submit(call) for _ in range(calls)]:
                done.result()
            return (time.perf_counter() - begun) / calls

        seconds_of(at_once)  # allocations and lazy compilation
        calls = at_once * max(1, round(MIN_SECONDS / (at_once * seconds_of(at_once))))
        return median(seconds_of(calls) for _ in range(repeats))


def _peak_gflops(engine: Engine, shape: tuple[int, int, int], repeats: int) -> float | None:
    """Speed of one product (tokens, hidden) × (hidden, intermediate) in the engine's own library and precision."""
    backend = engine.manifest.backend
    if backend in ("aie", "om"):
        return None  # their packages have no product of their own to compare with
    if backend == "torch":
        product = _torch_product(engine, shape)
    else:
        product = (_onnx_product if backend == "onnx" else _openvino_product)(engine, shape)
    rows, inner, columns = shape
    return round(2 * rows * inner * columns / _seconds(product, repeats, engine.at_once) / 1e9, 2)


def _onnx_product(engine: Engine, shape: tuple[int, int, int]) -> Callable[[], object]:
    from onnx import TensorProto, helper, numpy_helper

    from nermill.worker.engine.onnx import open_session

    rows, inner, columns = shape
    precision = engine.manifest.precision
    x_type = {"int8": TensorProto.UINT8, "fp16": TensorProto.FLOAT16}.get(precision, TensorProto.FLOAT)
    x = np.ones((rows, inner), helper.tensor_dtype_to_np_dtype(x_type))
    weight = np.ones((inner, columns), np.int8 if precision == "int8" else x.dtype)
    y_type = TensorProto.INT32 if precision == "int8" else x_type
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if precision == "int8" else "MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", x_type, x.shape)],
        [helper.make_tensor_value_info("y", y_type, (rows, columns))],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = open_session(model.SerializeToString(), engine.device, engine.manifest)
    return lambda: session.run(None, {"x": x})


def _openvino_product(engine: Engine, shape: tuple[int, int, int]) -> Callable[[], object]:
    import openvino
    from openvino import opset13 as op

    from nermill.worker.engine.openvino import settings

    rows, inner, columns = shape
    x = np.ones((rows, inner), np.float32)
    entry, weight = op.parameter(x.shape, np.float32), op.constant(np.ones((inner, columns), np.float32))
    factors = [entry, weight]
    if engine.manifest.precision == "int8":
        factors = [op.fake_quantize(factor, -1.28, 1.27, -1.28, 1.27, 256) for factor in factors]
    model = openvino.Model([op.matmul(*factors, False, False)], [entry])
    compiled = openvino.Core().compile_model(model, "CPU", settings(engine.manifest, engine.at_once))
    requests = [compiled.create_infer_request() for _ in range(engine.at_once)]

    def product() -> None:
        request = requests.pop()
        request.infer([x], share_inputs=True, share_outputs=True)
        requests.append(request)

    return product


def _torch_product(engine: Engine, shape: tuple[int, int, int]) -> Callable[[], object]:
    import torch

    from nermill.worker.engine.layers import Linear, fuse

    rows, inner, columns = shape
    device = torch.device(engine.device)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
    dtype = dtypes[engine.manifest.precision]
    x = torch.ones(rows, inner, dtype=dtype).to(device)
    weight = torch.ones(inner, columns, dtype=dtype).to(device)

    def product() -> object:
        return torch._int_mm(x, weight) if dtype == torch.int8 else model(x)

    model = torch.nn.Sequential(Linear(inner, columns)).requires_grad_(False)
    model.load_state_dict({"0.weight": weight, "0.bias": weight[0]}, assign=True)
    fuse(model, device)
    if device.type != "cuda":
        return product
    return lambda: (product(), torch.cuda.synchronize(device))
