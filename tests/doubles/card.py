"""A strict double of a CUDA card, for processes that a test starts: torch computes on the CPU and calls it ``cuda:0``.

Tensors get on the card by ``to``; there they say so, are refused in one operation with others, and cannot be read until
they are copied back. Streams, graphs and pinned memory are those of ``tests.doubles.cuda``. torch itself loads the
double, as it loads every backend that an installed package names as an entry point of the group ``torch.backends``.

- ``CUDA_DOUBLE_ELEMENTS``: the most elements of a tensor for which the card has memory.
- ``CUDA_DOUBLE_VIOLATIONS``: the file that every refusal is written to.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.doubles import cuda

ROOT = Path(__file__).parents[2]
CARD = torch.device("cuda", 0)
# a copy, and what Module.to asks of a parameter and its copy
ACROSS_DEVICES = {"copy_", "_has_compatible_shallow_copy_type"}
_TO, _NUMPY = torch.Tensor.to, torch.Tensor.numpy


class CardTensor(torch.Tensor):
    """A tensor on the card; what an operation makes of it is one as well."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        others = [
            leaf
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CardTensor) and leaf.dim() > 0
        ]
        if others and func.__name__ not in ACROSS_DEVICES:
            refuse("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!")
        answer = super().__torch_function__(func, types, args, kwargs or {})
        for leaf in tree_leaves(answer):
            if isinstance(leaf, CardTensor):
                require_memory(leaf)
        return answer


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a process whose torch has such a card; its package is written into ``folder``."""
    package = folder / "card_double-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: card-double\nVersion: 1.0\n", "utf-8")
    (package / "entry_points.txt").write_text("[torch.backends]\ncard_double = tests.doubles.card:install\n", "utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / ".src"), str(ROOT)])}


def install() -> None:
    """Gives this process the card for good."""
    patch = pytest.MonkeyPatch()
    cuda.simulate(patch)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters become tensors of the card
    patch.setattr(torch.Tensor, "to", _to)
    patch.setattr(torch.Tensor, "cpu", lambda tensor: _to(tensor, "cpu"))
    patch.setattr(torch.Tensor, "numpy", _numpy)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")))
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def refuse(message: str) -> None:
    if file := os.environ.get("CUDA_DOUBLE_VIOLATIONS"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(message + "\n")
    raise RuntimeError(message)


def require_memory(tensor: torch.Tensor) -> None:
    most = os.environ.get("CUDA_DOUBLE_ELEMENTS")
    if most and tensor.numel() > int(most):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")  # its right, and no fault of the caller


def _to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """``Tensor.to`` of a device, a type, or both, in any of their forms."""
    given = [*args, options.get("device"), options.get("dtype")]
    dtype = next((entry for entry in given if isinstance(entry, torch.dtype)), tensor.dtype)
    target = next((torch.device(entry).type for entry in given if isinstance(entry, str | torch.device)), "")
    is_there = isinstance(tensor, CardTensor)
    to_card = target == "cuda" or (not target and is_there)
    if not (is_there or to_card):
        return _TO(tensor, *args, **options)
    plain = tensor.as_subclass(torch.Tensor) if is_there else tensor
    moved = _TO(plain, dtype)
    if moved is plain and to_card == is_there:
        return tensor
    if moved is plain:
        moved = plain.detach().clone()
    if not to_card:
        return moved
    require_memory(moved)
    return moved.as_subclass(CardTensor)


def _numpy(tensor: torch.Tensor, **options: Any) -> Any:
    if isinstance(tensor, CardTensor):
        refuse("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory")
    return _NUMPY(tensor, **options)
