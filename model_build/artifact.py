"""A checkpoint becomes an artifact: compiled, described, checked against its golden answers, and only then there."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nermill.model_build import aie, export, int8, om, openvino
from nermill.model_build.calibration import Windows, calibration_windows, input_ranges
from nermill.model_build.checkpoint import Checkpoint, open_checkpoint
from nermill.model_build.reference import check_graph, golden
from nermill.model_build.shapes import parse_shapes
from nermill.worker.contracts.errors import EngineError, StoreError, UsageError
from nermill.worker.contracts.manifest import (
    TOKENIZER_FILE,
    Backend,
    GraphInput,
    Layout,
    Manifest,
    Precision,
    file_sha256,
    load_manifest,
)
from nermill.worker.engine import load_engine
from nermill.worker.engine.encoder import Encoder, build
from nermill.worker.engine.golden import Golden, golden_difference, load_golden
from nermill.worker.engine.onnx import OnnxEngine

TOKEN_BUDGET = 1024  # padded tokens of a batch where shapes are free
EQUAL_TOKEN_BUDGET = 512  # where rows have equal length: larger batches are no faster on a core, and want more memory
PRECISIONS: dict[Backend, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16", "int8"),
    "torch": ("fp32", "fp16", "bf16", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "aie": ("fp16", "fp32"),
    "om": ("fp16",),
}
# accepted difference of a golden logit, relative to the largest one (or to 1 where all are small)
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.15, "int8": 0.1}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "mindietorch",
    "torch_aie",
    "aclruntime",
    "ais_bench",
)


@dataclass(frozen=True)
class Order:
    """What to build.

    Attributes:
        backend: Who runs it.
        layout: What rows are (``Manifest.layout``); where it is None, ``equal`` for ``onnx`` in int8 with free shapes,
            which runs on CPUs alone, else ``packed``: ``openvino`` compiles each new shape, and ``equal`` has hundreds.
        precision: Of the weights and products; the backend's first one where it is None.
        shapes: ``auto`` or ``BxL,...``.
        index_dtype: ``int64`` or ``int32``: type of the graph's inputs.
        soc: Name of the Ascend chip, for the backends ``aie`` and ``om``.
        name: What people will call it; the checkpoint's own name where it is empty.
        atc: Whether ``om`` is compiled here; else the artifact waits for ``nermill-build adopt``.
        calibrate: File of texts to find the scales of int8 with. Where it is None, ``openvino`` takes the golden ones,
            and ``onnx`` a scale for each token.
    """

    backend: Backend
    layout: Layout | None = None
    precision: Precision | None = None
    shapes: str = "auto"
    index_dtype: str = "int64"
    soc: str = aie.SOC
    name: str = ""
    atc: bool = True
    calibrate: str | None = None


def compile_artifact(where: str, out: Path, order: Order) -> Manifest:
    """Builds the artifact ``out`` from the checkpoint ``where``; nothing is there until all of it is.

    Raises:
        UsageError: the checkpoint, an option or the output folder does not fit.
        EngineError: the compiled graph does not give the checkpoint's logits.
    """
    layout, precision = check_order(order)
    checkpoint = open_checkpoint(where)
    shapes = parse_shapes(order.shapes, checkpoint.max_length, order.backend)
    if order.backend == "openvino":
        openvino.check_machine(precision)
    if order.backend == "om":
        shapes = shapes or om.default_shapes(checkpoint.max_length)
        om.check_order(shapes, order.soc)
        if layout == "plain" and not checkpoint.architecture.types:
            raise UsageError(
                f"--layout plain: {where} has no token types, and atc may drop an input that nothing uses; "
                "take --layout packed"
            )
        if order.atc:
            om.find_atc()
    with folder_at_once(out) as folder:
        max_length = min(checkpoint.max_length, max((length for _, length in shapes), default=checkpoint.max_length))
        checkpoint.weights()  # refuses by name what cannot be read, before transformers opens it
        answers = golden(checkpoint, max_length)
        answers.write(folder)
        model = build(checkpoint.architecture, checkpoint.weights(), layout=layout)
        manifest = describe(checkpoint, order, layout, precision, shapes, answers, model.inputs)
        (folder / TOKENIZER_FILE).write_text(checkpoint.tokenizer, "utf-8")
        if order.backend == "om":
            export.trace_onnx(model, folder / om.GRAPH_FILE, getattr(torch, order.index_dtype), shapes)
            graph = describe(checkpoint, order, layout, "fp32", shapes, answers, model.inputs)
            check_graph(OnnxEngine(folder, replace(graph, model_file=om.GRAPH_FILE)), answers)
            manifest = om.finish(folder, manifest, out, soc=order.soc, has_atc=order.atc)
        else:
            model_file, details = _compile(model, order, manifest, answers, folder)
            manifest = replace(manifest, model_file=model_file, details={**manifest.details, **details})
        del model
        gc.collect()
        _swear(manifest, folder)
        if order.backend != "om":
            _try(folder, "npu:0" if order.backend == "aie" else "cpu")
    return load_manifest(out)


def describe(
    checkpoint: Checkpoint,
    order: Order,
    layout: Layout,
    precision: Precision,
    shapes: tuple[tuple[int, int], ...],
    answers: Golden,
    inputs: Sequence[str],
) -> Manifest:
    """The manifest of what is being built, as far as it is known before it is: without files and model."""
    scale = max(1.0, max(float(abs(logits).max()) for logits in answers.logits))
    return Manifest(
        name=order.name or checkpoint.name,
        backend=order.backend,
        model_file="",
        layout=layout,
        precision=precision,
        inputs=tuple(GraphInput(name, order.index_dtype) for name in inputs),
        shapes=shapes,
        token_budget=EQUAL_TOKEN_BUDGET if layout == "equal" else TOKEN_BUDGET,
        max_length=min(checkpoint.max_length, max((length for _, length in shapes), default=checkpoint.max_length)),
        labels=checkpoint.labels,
        scheme=checkpoint.scheme,
        lowercase=checkpoint.lowercase,
        cls_id=checkpoint.cls_id,
        sep_id=checkpoint.sep_id,
        pad_id=checkpoint.pad_id,
        position_offset=checkpoint.architecture.position_offset,
        source=checkpoint.source,
        libraries=_libraries(),
        files={},
        tolerance=round(TOLERANCE[precision] * scale, 6),
        details={"architecture": asdict(checkpoint.architecture)},
    )


def _swear(manifest: Manifest, folder: Path) -> None:
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    replace(manifest, files=files).write(folder)


@contextmanager
def folder_at_once(out: Path) -> Iterator[Path]:
    """A folder to write into that takes its name when all is written, or vanishes.

    Raises:
        UsageError: ``out`` is there already, or its parent cannot be written.
        StoreError: the disk gave up on the way.
    """
    if out.exists():
        raise UsageError(f"{out}: is there already; name a new folder or remove it")
    aside = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex}"
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield aside
        os.replace(aside, out)
    except OSError as error:
        raise StoreError(f"{out}: cannot be written ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_order(order: Order) -> tuple[Layout, Precision]:
    """The layout and the precision that are built.

    Raises:
        UsageError: nermill builds no such backend, layout, index dtype or precision.
    """
    if order.backend not in get_args(Backend):
        raise UsageError(f"--backend {order.backend}: nermill builds {', '.join(get_args(Backend))}")
    if order.layout is not None and order.layout not in get_args(Layout):
        raise UsageError(f"--layout {order.layout}: nermill builds {', '.join(get_args(Layout))}")
    if order.index_dtype not in ("int64", "int32"):
        raise UsageError(f"--index-dtype {order.index_dtype}: nermill builds int64, int32")
    offered = PRECISIONS[order.backend]
    precision = order.precision or offered[0]
    if precision not in offered:
        raise UsageError(f"--precision {precision}: backend {order.backend} takes {', '.join(offered)}")
    if order.calibrate is not None and (precision != "int8" or order.backend not in ("onnx", "openvino")):
        raise UsageError(
            f"--calibrate: {order.backend} {precision} has no scales to find; it is for --backend onnx or openvino and "
            "--precision int8"
        )
    has_free_shapes = order.shapes == "auto" and order.backend not in ("aie", "om")
    is_for_cpus = (order.backend, precision) == ("onnx", "int8") and has_free_shapes and export.HAS_OPERATORS
    layout = order.layout or ("equal" if is_for_cpus else "packed")
    if layout == "equal" and (not has_free_shapes or precision == "fp16"):
        raise UsageError(
            "--layout equal: is for CPUs and free shapes; take --backend onnx, torch or openvino, --shapes auto, and "
            "another precision than fp16"
        )
    return layout, precision


def _compile(
    model: Encoder, order: Order, manifest: Manifest, answers: Golden, folder: Path
) -> tuple[str, dict[str, Any]]:
    dtype, precision = getattr(torch, order.index_dtype), manifest.precision
    if order.backend == "aie":
        return "model.pt", aie.compile_module(
            model, folder / "model.pt", shapes=manifest.shapes, dtype=dtype, precision=precision, soc=order.soc
        )
    windows: Windows = ()
    details: dict[str, Any] = {}
    if precision == "int8" and (order.backend == "openvino" or order.calibrate is not None):
        windows, details = calibration_windows(order.calibrate, folder, manifest, answers.windows)
    if order.backend == "openvino":
        openvino.to_openvino(model, folder, dtype, manifest, windows)
        return openvino.MODEL_FILE, details
    model = model.to(_DTYPES[precision])
    if order.backend == "onnx":
        ranges = input_ranges(model, windows, manifest) if windows else None
        export.to_onnx(model, folder / "model.onnx", dtype, fused=manifest.layout == "equal")
        if precision == "int8":
            int8.quantize_onnx(folder / "model.onnx", ranges)
        return "model.onnx", details
    if precision == "int8":
        int8.quantize_module(model)
    try:
        save_file(model.state_dict(), folder / "model.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from None
    shutil.copymode(folder / TOKENIZER_FILE, folder / "model.safetensors")  # safetensors keeps others out
    return "model.safetensors", {}


def _try(folder: Path, device: str) -> None:
    engine = load_engine(folder, device)
    try:
        difference = golden_difference(engine, load_golden(folder))
        if difference > engine.manifest.tolerance:
            raise EngineError(
                f"{engine.manifest.name}: the compiled graph is {difference:.3g} away from the checkpoint's logits "
                f"(tolerance {engine.manifest.tolerance:.3g}); nothing was written"
            )
    finally:
        engine.close()


def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
