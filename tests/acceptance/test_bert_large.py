"""A checkpoint of BERT-large's true size, with random weights, through the doubles of atc and InferSession."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.checkpoints import LARGE, write_checkpoint
from tests.doubles import cann


@pytest.mark.timeout(3600)
def test_bert_large_becomes_an_offline_model_and_answers_as_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=24, **LARGE)
    assert (checkpoint / "model.safetensors").stat().st_size > 1.3e9
    environment = {
        **os.environ,
        **cann.environment(tmp_path / "cann"),
        "AIS_DOUBLE_VIOLATIONS": str(tmp_path / "violations"),
    }

    def build(*arguments: str) -> dict[str, object]:
        command = [sys.executable, "-m", "nermill.model_build.cli", *arguments, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    om = tmp_path / "om"
    order = ("--backend", "om", "--shapes", "4x64,4x128", "--out", str(om))
    assert build("compile", str(checkpoint), *order)["tried"] is True
    assert (om / "model.om").stat().st_size > 1.3e9
    assert build("verify", str(om), "--device", "npu:0")["passed"] is True
    assert not (tmp_path / "violations").exists()
