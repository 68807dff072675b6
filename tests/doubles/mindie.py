"""A strict double of the documented MindIE Torch API: it refuses whatever the documentation does not allow.

It computes in float32 on the CPU. Tensors "on the NPU" are tensors that say so and that cannot be read until
they are copied back; every refusal is also kept in ``violations``, so that an adapter that swallows one is seen.
``install`` puts it into a test's process, ``environment`` into processes that a test starts; those write their
violations into the file ``MINDIE_DOUBLE_VIOLATIONS``.
"""

from __future__ import annotations

import enum
import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

KEYWORDS = {
    "precision_policy",
    "truncate_long_and_double",
    "require_full_compilation",
    "allow_tensor_replace_int",
    "min_block_size",
    "torch_executed_ops",
    "soc_version",
    "optimization_level",
    "default_buffer_size_vec",
}
EXTRA_FILE = "mindie.json"
ROOT = Path(__file__).parents[2]
_LOAD, _TO, _NUMPY = torch.jit.load, torch.Tensor.to, torch.Tensor.numpy


class TensorFormat(enum.Enum):
    ND = 0
    NCHW = 1
    NHWC = 2


class PrecisionPolicy(enum.Enum):
    FP32 = 0
    FP16 = 1
    PREF_FP32 = 2
    PREF_FP16 = 3


class NpuTensor(torch.Tensor):
    """A tensor on NPU ``index``; ``ready`` once its stream was synchronized."""

    index: int = 0
    ready: bool = True

    @property
    def device(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(type="npu", index=self.index)


class Double:
    """State of one process: its device, its streams, what it was asked that it must not be asked.

    Args:
        partial: The compiler cannot take the whole graph; its modules then answer on the CPU.
        broken: The compiler cannot take the graph at all.
    """

    def __init__(self, *, partial: bool = False, broken: bool = False) -> None:
        self.partial = partial
        self.broken = broken
        self.violations: list[str] = []
        self.calls: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.index: int | None = None
        self.finalized = False
        self._of_thread = threading.local()

    @property
    def stream(self) -> Stream | None:
        """The stream of this thread."""
        return getattr(self._of_thread, "stream", None)

    @stream.setter
    def stream(self, chosen: Stream | None) -> None:
        self._of_thread.stream = chosen

    def refuse(self, message: str) -> None:
        self._note(message)
        raise RuntimeError(message)

    def _note(self, message: str) -> None:
        self.violations.append(message)
        if file := os.environ.get("MINDIE_DOUBLE_VIOLATIONS"):
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(message + "\n")

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.refuse(message)

    def require_device(self, what: str) -> int:
        self.require(not self.finalized, f"{what} after finalize")
        if self.index is None:
            self.refuse(f"{what} before set_device")
        assert self.index is not None
        return self.index

    def set_device(self, index: int) -> None:
        self.require(not self.finalized, "set_device after finalize")
        self.require(type(index) is int and index >= 0, f"set_device({index!r})")
        self.calls.append(f"set_device({index})")
        self.index = index

    def finalize(self) -> None:
        self.require(not self.finalized, "finalize twice")
        self.calls.append("finalize")
        self.finalized = True

    def compile(self, module: Any, ir: str = "default", inputs: Any = None, **options: Any) -> Compiled:
        self.require_device("compile")
        if unknown := options.keys() - KEYWORDS:
            self._note(f"unknown keyword {', '.join(sorted(unknown))}")
            raise TypeError(self.violations[-1])
        self.require(isinstance(module, torch.jit.ScriptModule), "compile takes a TorchScript module")
        self.require(ir in ("default", "ts", "dynamo", "torch_export"), f"ir {ir!r}")
        self.require(options.get("precision_policy", PrecisionPolicy.PREF_FP32) in PrecisionPolicy, "precision_policy")
        self.require(0 <= options.get("min_block_size", 1) <= 1000, "min_block_size")
        self.require(options.get("optimization_level", 0) in (0, 1, 2), "optimization_level")
        operators = options.get("torch_executed_ops", [])
        self.require(all(name.startswith("aten::") for name in operators), "torch_executed_ops")
        self.require(isinstance(options.get("soc_version", ""), str), "soc_version")
        self.require(isinstance(inputs, list) and len(inputs) > 0, "inputs is a list")
        gears = inputs if isinstance(inputs[0], list) else [inputs]
        arguments = module.forward.schema.arguments[1:]
        for gear in gears:
            self.require(len(gear) == len(arguments), "as many inputs as the module takes")
            for entry in gear:
                self.require(isinstance(entry, Input), "inputs are Input")
                self.require(entry.dtype in (torch.int32, torch.int64), f"an id is declared as {entry.dtype}")
                self.require(entry.format is TensorFormat.ND, f"format {entry.format}: ids are ND")
        self.calls.append("compile")
        self.options.append({**options, "gears": [gear[0].shape for gear in gears]})
        if self.broken or (self.partial and options.get("require_full_compilation")):
            raise RuntimeError("aten::clamp is not supported")  # its right, and no fault of the caller
        about = {
            "gears": [[list(entry.shape) for entry in gear] for gear in gears],
            "dtype": str(gears[0][0].dtype),
            "partial": self.partial,
        }
        return Compiled(self, module, about)

    def jit_load(self, path: str, map_location: Any = None, **options: Any) -> Any:
        extra = {EXTRA_FILE: ""}
        module = _LOAD(path, map_location=map_location, _extra_files=extra, **options)
        if not extra[EXTRA_FILE]:
            return module
        self.require_device("load")
        self.calls.append("load")
        return Compiled(self, module, json.loads(extra[EXTRA_FILE]))

    def tensor_to(self, tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        target = args[0] if args else options.get("device")
        if isinstance(target, str) and target.startswith("npu"):
            index = self.require_device("a copy to the NPU")
            wanted = int(target.partition(":")[2] or 0)
            self.require(wanted == index, f"a copy to {target} in a process of npu:{index}")
            return _on_npu(tensor, index)
        if isinstance(tensor, NpuTensor):
            self.require(tensor.ready, "a copy from the NPU before its stream was synchronized")
            self.require(target == "cpu", f"an NPU tensor to {target!r}")
            return tensor.as_subclass(torch.Tensor)
        return _TO(tensor, *args, **options)

    def tensor_numpy(self, tensor: torch.Tensor, **options: Any) -> Any:
        self.require(not isinstance(tensor, NpuTensor), "numpy of a tensor on the NPU")
        return _NUMPY(tensor, **options)


class Input:
    """Shape, dtype (FLOAT unless said) and format (NCHW unless said, since 1.0.0) of one input."""

    def __init__(
        self,
        shape: Any = None,
        *,
        min_shape: Any = None,
        max_shape: Any = None,
        dtype: torch.dtype = torch.float32,
        format: TensorFormat = TensorFormat.NCHW,
    ) -> None:
        if (shape is None) == (min_shape is None or max_shape is None):
            raise RuntimeError("Input takes a shape, or min_shape and max_shape")
        self.shape = tuple(shape or max_shape)
        if len(self.shape) > 8:
            raise RuntimeError("rank over 8")
        self.dtype = dtype
        self.format = format


class Compiled:
    """A compiled module: fixed gears, tensors on the NPU, an answer that is not there before its stream is."""

    def __init__(self, double: Double, module: Any, about: dict[str, Any]) -> None:
        self._double = double
        self._module = module
        self._about = about

    def eval(self) -> Compiled:
        return self

    def save(self, path: str) -> None:
        self._double.require(isinstance(path, str), "save takes a str")
        self._double.calls.append("save")
        torch.jit.save(self._module, path, _extra_files={EXTRA_FILE: json.dumps(self._about)})

    def __call__(self, *inputs: Any) -> torch.Tensor:
        double = self._double
        index = double.require_device("forward")
        for tensor in inputs:
            double.require(isinstance(tensor, NpuTensor) and tensor.index == index, "an input is on the wrong device")
            double.require(str(tensor.dtype) == self._about["dtype"], f"{tensor.dtype} was compiled as another type")
        shapes = [list(tensor.shape) for tensor in inputs]
        double.require(shapes in self._about["gears"], f"shape {shapes[0]} is not among the gears")
        double.require(double.stream is not None, "forward outside of a stream that can be synchronized")
        double.calls.append("forward")
        answer = self._module(*(tensor.as_subclass(torch.Tensor) for tensor in inputs))
        if self._about["partial"]:
            return answer
        pending = _on_npu(answer, index)
        pending.ready = False
        assert double.stream is not None
        double.stream.pending.append(pending)
        return pending


class Stream:
    def __init__(self, double: Double, device: str) -> None:
        index = double.require_device("a stream")
        double.require(device == f"npu:{index}", f"a stream on {device!r} in a process of npu:{index}")
        self.pending: list[NpuTensor] = []
        self._double = double

    def synchronize(self) -> None:
        self._double.calls.append("synchronize")
        for tensor in self.pending:
            tensor.ready = True
        self.pending.clear()


def _on_npu(tensor: torch.Tensor, index: int) -> NpuTensor:
    moved: NpuTensor = tensor.detach().clone().as_subclass(NpuTensor)  # type: ignore[assignment]
    moved.index = index
    moved.ready = True
    return moved


def install(
    monkeypatch: pytest.MonkeyPatch, name: str = "mindietorch", *, partial: bool = False, broken: bool = False
) -> Double:
    """Puts the double where ``import name`` finds it; the old package keeps its enums in ``_enums``."""
    double = Double(partial=partial, broken=broken)

    @contextmanager
    def stream(chosen: Stream) -> Any:
        double.stream = chosen
        try:
            yield
        finally:
            double.stream = None

    package = ModuleType(name)
    vars(package).update(
        Input=Input,
        TensorFormat=TensorFormat,
        compile=double.compile,
        set_device=double.set_device,
        finalize=double.finalize,
        npu=SimpleNamespace(Stream=lambda device: Stream(double, device), stream=stream),
    )
    if name == "mindietorch":
        vars(package).update(PrecisionPolicy=PrecisionPolicy)
    vars(package).update(_enums=SimpleNamespace(PrecisionPolicy=PrecisionPolicy))
    for other in ("mindietorch", "torch_aie"):
        monkeypatch.setitem(sys.modules, other, package if other == name else None)
    monkeypatch.setattr(torch.jit, "load", double.jit_load)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: double.tensor_to(tensor, *args, **options))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor, **options: double.tensor_numpy(tensor, **options))
    return double


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a process in which ``import mindietorch`` finds the double, in a folder that is made."""
    folder.mkdir()
    text = "import pytest\nfrom tests.doubles import mindie\nmindie.install(pytest.MonkeyPatch())\n"
    (folder / "mindietorch.py").write_text(text, "utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / ".src"), str(ROOT)])}
