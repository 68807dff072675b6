"""A strict double of CANN's ``atc``: ``python -m tests.doubles.atc --model=… …``.

It takes the documented options in the documented forms and refuses everything else with exit code 1 and a line that
begins with an error number, as atc does. Its offline model is ``IMOD``, a line of JSON, and the graph itself, which
the double of ``InferSession`` runs through onnxruntime. ``ATC_DOUBLE_FAILS``: an error line to fail with.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import onnx

MAGIC = b"IMOD"
REQUIRED = ("model", "framework", "output", "soc_version")
OPTIONS = {
    *REQUIRED,
    "input_format", "input_shape", "input_shape_range", "dynamic_dims", "dynamic_batch_size", "dynamic_image_size",
    "insert_op_conf", "precision_mode", "op_select_implmode", "optypelist_for_implmode", "log", "output_type",
    "input_fp16_nodes", "out_nodes",
}  # fmt: skip
CHOICES = {
    "framework": {"0", "1", "3", "5"},
    "input_format": {"NCHW", "NHWC", "ND", "NCDHW", "NDHWC"},
    "log": {"debug", "info", "warning", "error", "null"},
    "precision_mode": {
        "force_fp16", "force_fp32", "cube_fp16in_fp32out", "allow_mix_precision", "allow_fp32_to_fp16",
        "must_keep_origin_dtype", "allow_mix_precision_fp16",
    },
    "op_select_implmode": {"high_precision", "high_performance", "high_precision_for_all", "high_performance_for_all"},
    "output_type": {"FP32", "FP16", "UINT8", "INT8"},
}  # fmt: skip
NOT_WITH_GEARS = ("dynamic_batch_size", "dynamic_image_size", "input_shape_range", "insert_op_conf")
TYPES = {onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}


def refuse(number: str, message: str) -> NoReturn:
    print(f"{number}: {message}")
    print("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
    sys.exit(1)


def invalid(name: str, value: str, reason: str) -> NoReturn:
    refuse("E10001", f"Value [{value}] for parameter [--{name}] is invalid. Reason: {reason}")


def main(arguments: Sequence[str]) -> None:
    print("ATC start working now, please wait for a moment.")
    if not os.environ.get("ASCEND_TOOLKIT_HOME") and not os.environ.get("ASCEND_OPP_PATH"):
        refuse("E10000", "ASCEND_OPP_PATH is not set")
    options = parse(arguments)
    graph_bytes = read(options)
    graph = onnx.load_from_string(graph_bytes).graph
    inputs = {entry.name: entry.type.tensor_type for entry in graph.input}
    shapes = input_shapes(options, inputs)
    gears = dynamic_dims(options, shapes)
    if fails := os.environ.get("ATC_DOUBLE_FAILS"):
        print(fails)
        sys.exit(1)
    about = {
        "soc": options["soc_version"],
        "inputs": [[name, TYPES[inputs[name].elem_type]] for name in inputs],
        "gears": gears,
        "is_dynamic": "dynamic_dims" in options,
    }
    ending = f"_linux_{platform.machine()}.om" if "dynamic_dims" in options else ".om"
    Path(options["output"] + ending).write_bytes(MAGIC + json.dumps(about).encode() + b"\n" + graph_bytes)
    Path("fusion_result.json").write_text("[]\n", "utf-8")  # atc leaves it where it is started
    print("ATC run success, welcome to the next use.")


def parse(arguments: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for argument in arguments:
        match = re.fullmatch(r"--([a-z0-9_]+)=(.+)", argument, re.DOTALL)
        if not match:
            refuse("E10003", f"argument {argument!r} is not --name=value")
        name, value = match.groups()
        if name not in OPTIONS:
            refuse("E10003", f"unknown command line flag '{name}'")
        if name in options:
            refuse("E10003", f"--{name} is given twice")
        if name in CHOICES and value not in CHOICES[name]:
            invalid(name, value, f"it must be one of {sorted(CHOICES[name])}")
        options[name] = value
    for name in REQUIRED:
        if name not in options:
            refuse("E10004", f"Value for parameter [--{name}] is empty")
    home = Path(os.environ.get("ASCEND_TOOLKIT_HOME", "/nowhere")) / f"{platform.machine()}-linux"
    known = {path.stem for path in home.glob("data/platform_config/*.ini")} or {"Ascend310P3", "Ascend910B"}
    if options["soc_version"] not in known:
        invalid("soc_version", options["soc_version"], f"the supported ones are {sorted(known)}")
    if ("optypelist_for_implmode" in options) and ("op_select_implmode" not in options):
        invalid("optypelist_for_implmode", options["optypelist_for_implmode"], "it needs --op_select_implmode")
    return options


def read(options: dict[str, str]) -> bytes:
    if options["framework"] != "5":
        invalid("framework", options["framework"], "an ONNX graph is framework 5")
    try:
        graph = Path(options["model"]).read_bytes()
        onnx.checker.check_model(onnx.load_from_string(graph))
    except (OSError, onnx.checker.ValidationError) as error:
        invalid("model", options["model"], str(error).splitlines()[0])
    return graph


def input_shapes(options: dict[str, str], inputs: dict[str, onnx.TypeProto.Tensor]) -> dict[str, list[int]]:
    """Sizes of each input, -1 where a gear says them; those that the graph fixes must be the same."""
    text = options.get("input_shape", "")
    shapes: dict[str, list[int]] = {}
    for entry in text.split(";"):
        name, _, sizes = entry.rpartition(":")
        if name not in inputs:
            invalid("input_shape", text, f"the graph has no input {name!r}; it has {list(inputs)}")
        if not re.fullmatch(r"(-1|[1-9]\d*)(,(-1|[1-9]\d*))*", sizes):
            invalid("input_shape", text, f"{sizes!r} is no list of sizes")
        shapes[name] = [int(size) for size in sizes.split(",")]
        dims = inputs[name].shape.dim
        if len(dims) != len(shapes[name]):
            invalid("input_shape", text, f"{name} has {len(dims)} dimensions")
        for size, dim in zip(shapes[name], dims, strict=True):
            if dim.HasField("dim_value") and dim.dim_value != size:
                invalid("input_shape", text, f"{name} is fixed to {dim.dim_value} in the graph")
    if missing := inputs.keys() - shapes.keys():
        invalid("input_shape", text, f"{sorted(missing)} has free dimensions and is not named")
    for name in filter(None, options.get("input_fp16_nodes", "").split(";")):
        if name not in inputs or inputs[name].elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            invalid("input_fp16_nodes", name, "the graph has no such input of a floating type")
    return shapes


def dynamic_dims(options: dict[str, str], shapes: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The shapes of all inputs in each gear."""
    free = sum(sizes.count(-1) for sizes in shapes.values())
    text = options.get("dynamic_dims")
    if text is None:
        if free:
            invalid("input_shape", options["input_shape"], "-1 needs --dynamic_dims")
        return [shapes]
    for other in NOT_WITH_GEARS:
        if other in options:
            refuse("E10009", f"--dynamic_dims and --{other} cannot be used together")
    if options.get("input_format") != "ND":
        invalid("input_format", options.get("input_format", ""), "--dynamic_dims needs ND")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*(;[1-9]\d*(,[1-9]\d*)*)*", text):
        invalid("dynamic_dims", text, "gears are positive numbers, ',' between sizes and ';' between gears")
    gears = [[int(size) for size in gear.split(",")] for gear in text.split(";")]
    if not 2 <= len(gears) <= 100:
        invalid("dynamic_dims", text, f"there are {len(gears)} gears; 2 to 100 are allowed")
    if any(len(gear) != free for gear in gears) or not free:
        invalid("dynamic_dims", text, f"every gear needs {free} sizes, one for each -1 of --input_shape")
    if len({tuple(gear) for gear in gears}) < len(gears):
        invalid("dynamic_dims", text, "a gear is there twice")
    if free > 4 and (version := cann_version()) < 7:
        invalid("dynamic_dims", text, f"CANN {version} takes at most 4 dynamic dimensions")
    made = []
    for gear in gears:
        sizes = iter(gear)
        made.append({name: [next(sizes) if n == -1 else n for n in shape] for name, shape in shapes.items()})
    return made


def cann_version() -> int:
    info = Path(os.environ["ASCEND_TOOLKIT_HOME"]) / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
    match = re.search(r"^version=(\d+)", info.read_text("utf-8"), re.MULTILINE)
    return int(match[1]) if match else 99


if __name__ == "__main__":
    main(sys.argv[1:])
