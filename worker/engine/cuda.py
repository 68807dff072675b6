"""What the torch engine has on a CUDA device beside its forward pass: streams, pinned memory, CUDA graphs.

Untried on a card; the tests put a recording of the CPU's operators in the place of the device's graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine.inputs import named_inputs
from nermill.worker.engine.warmup import blank_batch


class Graph:
    """The kernels of one compiled shape, replayed as one: launching them one by one costs the host more.

    Inputs and logits lie in the same memory at every call, so one call at a time.

    Args:
        model: The encoder, on the device.
        inputs: A batch of that shape on the device; taken over.
        pool: Memory shared with graphs that never run at the same time.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], pool: tuple[int, int]) -> None:
        self._inputs = inputs
        model(**inputs)  # the first call loads kernels, which a capture cannot
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=torch.cuda.current_stream()):
            self._logits: Tensor = model(**inputs)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The logits, valid until the next call."""
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._logits


class StreamRunner:
    """One call at a time, on a stream of its own: while one lane copies, another computes.

    Args:
        model: The encoder, on the device.
        manifest: Says which shapes are compiled; each becomes a graph. Free ones run kernel by kernel.
        device: The CUDA device.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[tuple[int, ...], Graph] = {}
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            pool = torch.cuda.graph_pool_handle()
            for shape in sorted(manifest.shapes, key=math.prod, reverse=True):  # the largest makes room for all
                arrays = named_inputs(blank_batch(shape, manifest), manifest)
                inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
                self._graphs[shape] = Graph(model, inputs, pool)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits on the CPU, float32, shape (rows, length, labels)."""
        with torch.cuda.stream(self._stream):
            pinned = {name: tensor.pin_memory() for name, tensor in inputs.items()}  # so that copies do not block
            graph = self._graphs.get(tuple(pinned["input_ids"].shape))
            if graph:
                return graph(**pinned).cpu()
            sent = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            logits: Tensor = self._model(**sent)
            return logits.cpu()
