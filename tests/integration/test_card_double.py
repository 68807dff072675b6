"""The double of a CUDA card itself refuses what a card refuses; torch's own modules run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.doubles import card

PROGRAM = """
import torch

card = torch.device("cuda:0")
layer = torch.nn.Linear(2, 3).to(card)
answer = layer(torch.ones(1, 2).to(card))
assert str(answer.device) == "cuda:0" and answer.cpu().device.type == "cpu"
assert torch.allclose(answer.cpu(), layer.to("cpu")(torch.ones(1, 2)))
layer.to(card)

def refused(call):
    try:
        call()
    except (RuntimeError, AssertionError) as error:
        print(type(error).__name__, error)

refused(lambda: layer(torch.ones(1, 2)))
refused(lambda: answer.numpy())
refused(lambda: torch.ones(2, device=card))
refused(lambda: torch.ones(100).to(card))
refused(lambda: (torch.ones(10, 1).to(card) @ torch.ones(1, 10).to(card)))
"""


def test_the_double_of_a_card_refuses_what_a_card_refuses(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **card.environment(tmp_path / "card"),
        "CUDA_DOUBLE_ELEMENTS": "50",
        "CUDA_DOUBLE_VIOLATIONS": str(tmp_path / "violations"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0].startswith("RuntimeError Expected all tensors to be on the same device")
    assert told[1].startswith("RuntimeError can't convert cuda:0 device type tensor to numpy")
    assert "Torch not compiled with CUDA enabled" in told[2] or "no NVIDIA driver" in told[2], "by the build of torch"
    assert told[3:] == ["OutOfMemoryError CUDA out of memory."] * 2
    assert len((tmp_path / "violations").read_text("utf-8").splitlines()) == 2
