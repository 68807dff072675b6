"""Compiling for Ascend NPUs through ``mindietorch`` or ``torch_aie``: documented API alone, untried on hardware."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nermill.model_build.export import example_inputs
from nermill.worker.contracts.errors import EngineError, UsageError
from nermill.worker.contracts.manifest import Precision
from nermill.worker.engine.aie import import_package
from nermill.worker.engine.encoder import Encoder

SOC = "Ascend310P3"
LENGTH_STEP = 64  # AscendIE's transformer operators take lengths that are a multiple of it
MAX_ROWS = 64
MAX_LENGTH = 1536

Shapes = tuple[tuple[int, int], ...]


def default_shapes(max_length: int) -> Shapes:
    """Shapes of about 2,000 to 4,000 tokens: the published 310P3 table is at its best there."""
    longest = min(MAX_LENGTH, max_length) // LENGTH_STEP * LENGTH_STEP
    return tuple((rows, length) for rows, length in ((32, 64), (16, 128), (8, 512)) if length <= longest) or ((32, 64),)


def check_shapes(shapes: Shapes) -> None:
    """Refuses shapes that AscendIE's transformer operators do not take.

    Raises:
        UsageError: with the first such shape.
    """
    for rows, length in shapes:
        if rows > MAX_ROWS or length % LENGTH_STEP or length > MAX_LENGTH:
            raise UsageError(
                f"--shapes {rows}x{length}: AscendIE takes at most {MAX_ROWS} rows and lengths that are "
                f"multiples of {LENGTH_STEP} up to {MAX_LENGTH}"
            )


def compile_module(
    model: Encoder, path: Path, *, shapes: Shapes, dtype: torch.dtype, precision: Precision, soc: str
) -> dict[str, Any]:
    """Compiles a module for fixed shapes (several are gears of one module) and saves it.

    The whole graph goes to the NPU if the compiler can do that; else the parts that it can, and the artifact
    says so.

    Returns:
        What the manifest has to tell: package, soc, precision policy, whether the whole graph was compiled.

    Raises:
        UsageError: neither package is installed.
        EngineError: the compiler failed.
    """
    try:
        package = import_package()
    except ModuleNotFoundError:
        raise UsageError(
            "--backend aie needs mindietorch (or torch_aie), which comes with MindIE and CANN; not installed here"
        ) from None
    package.set_device(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still what this compiler takes
        traced = torch.jit.trace(model, example_inputs(model, dtype, shapes[0]), check_trace=False)
    gears = [
        [package.Input(shape, dtype=dtype, format=package.TensorFormat.ND) for _ in model.inputs] for shape in shapes
    ]
    policies = package.PrecisionPolicy if hasattr(package, "PrecisionPolicy") else package._enums.PrecisionPolicy
    policy = "FP16" if precision == "fp16" else "FP32"
    options = {
        "inputs": gears if len(gears) > 1 else gears[0],
        "precision_policy": getattr(policies, policy),
        "truncate_long_and_double": True,
        "allow_tensor_replace_int": True,
        "min_block_size": 1,
        "torch_executed_ops": [],
        "soc_version": soc,
        "optimization_level": 0,
    }
    whole = True
    try:
        compiled = package.compile(traced, require_full_compilation=True, **options)
    except RuntimeError as refusal:
        whole = False
        try:
            compiled = package.compile(traced, require_full_compilation=False, **options)
        except RuntimeError as error:
            raise EngineError(f"{package.__name__} does not compile it: {_first_line(error)}") from refusal
    except (TypeError, ValueError) as error:
        raise EngineError(f"{package.__name__} refuses its arguments: {_first_line(error)}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled.save(str(path))
    return {
        "package": package.__name__,
        "package_version": _version(package.__name__),
        "soc": soc,
        "precision_policy": policy,
        "whole_graph": whole,
        "graph_inputs": list(model.inputs),
    }


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
