"""CUDA graphs without CUDA: a capture records operators on the CPU, a replay runs them again on the same memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS_FOR_THE_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class RecordedGraph(TorchDispatchMode):
    """What ``torch.cuda.CUDAGraph`` promises: the operators of a capture, on the tensors that they had then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS_FOR_THE_HOST, f"{func} cannot be captured"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        assert self.calls, "replayed before it was captured"
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for there, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(there, torch.Tensor) and there.data_ptr() != new.data_ptr():  # else a view
                    there.copy_(new)


class Stream:
    """A stream of a device; a class, since libraries name it in their annotations."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


def simulate(patch: pytest.MonkeyPatch) -> None:
    """Puts recordings on the CPU in the place of torch's streams, graphs and pinned memory."""

    @contextmanager
    def capture(graph: RecordedGraph, *, pool: object, stream: object) -> Any:
        assert stream is not None, "captures are not allowed on the default stream"
        with graph:
            yield

    current: list[object] = []

    @contextmanager
    def on(stream: object) -> Any:
        current.append(stream)
        yield
        current.pop()

    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", on)
    patch.setattr(torch.cuda, "current_stream", lambda: current[-1] if current else None)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    patch.setattr(torch.cuda, "graph", capture)
    patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
