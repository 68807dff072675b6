"""Compiled shapes as CUDA graphs, on a double of CUDA graphs; not tested on a real card."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from nermill.worker.engine import Batch
from nermill.worker.engine.cuda import StreamRunner
from nermill.worker.engine.encoder import Architecture, Encoder
from nermill.worker.engine.inputs import named_inputs
from nermill.worker.engine.layers import Attention, FusedAttention, replace
from tests.doubles import cuda as double
from tests.doubles.engine import LABELS, manifest

SHAPES = ((2, 16), (1, 32))
SIZES = Architecture(150, 64, 2, 16, 16, 2, 4, 32, len(LABELS), "gelu", 1e-12)
CPU = torch.device("cpu")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    double.simulate(monkeypatch)
    torch.manual_seed(5)
    made = Encoder(SIZES).eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    replace(made, Attention, lambda plain: FusedAttention(plain.heads, plain.scale))
    return made


def inputs(shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """A packed batch: two windows a row, then padding."""
    chance = np.random.default_rng(seed)
    segments = np.sort(chance.integers(0, 3, shape))[:, ::-1]
    batch = Batch(chance.integers(1, 150, shape), segments, chance.integers(0, 64, shape))
    return {name: torch.from_numpy(array) for name, array in named_inputs(batch, manifest()).items()}


def test_a_graph_answers_as_the_model(model: Encoder) -> None:
    runner = StreamRunner(model, manifest(SHAPES), CPU)
    with torch.inference_mode():
        for seed in range(3):
            for shape in SHAPES:
                fed = inputs(shape, seed)
                torch.testing.assert_close(runner(fed), model(**fed))


def test_compiled_shapes_are_not_launched_kernel_by_kernel(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = StreamRunner(model, manifest(SHAPES), CPU)
    monkeypatch.delattr(Encoder, "forward")
    with torch.inference_mode():
        assert runner(inputs(SHAPES[0], 1)).shape == (*SHAPES[0], len(LABELS))


def test_free_shapes_have_no_graph(model: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "CUDAGraph")
    runner = StreamRunner(model, manifest(), CPU)
    with torch.inference_mode():
        fed = inputs((3, 20), 2)
        torch.testing.assert_close(runner(fed), model(**fed))
