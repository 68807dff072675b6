"""The doubles of atc and InferSession themselves refuse what the documentation does not allow."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from nermill.model_build.artifact import Order, compile_artifact
from tests.doubles import atc, cann


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with CANN and the wheels; returns the module of the ``InferSession`` double."""
    cann.install(monkeypatch, tmp_path / "cann")
    return sys.modules["ais_bench.infer.interface"]


@pytest.fixture(scope="module")
def waits(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits") / "art"
    compile_artifact(str(bert), folder, Order("om", shapes="2x32,2x64", atc=False))
    return folder


@pytest.fixture
def art(machine: Any, waits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(waits, tmp_path / "waits")


@pytest.fixture
def convert(art: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the double of atc on the graph, with changes; returns what it said."""
    free = "input_ids:2,-1;segments:2,-1;position_ids:2,-1"
    right = {
        "model": "model.onnx", "framework": "5", "output": "model", "soc_version": "Ascend310P3",
        "input_format": "ND", "input_shape": free, "dynamic_dims": "32,32,32;64,64,64",
    }  # fmt: skip

    def run(**changes: str | None) -> str:
        monkeypatch.chdir(art)
        options = {**right, **changes}
        with contextlib.suppress(SystemExit):
            atc.main([f"--{name}={value}" for name, value in options.items() if value is not None])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "ATC run success"),
        ({"out_node": "logits"}, "E10003: unknown command line flag 'out_node'"),
        ({"soc_version": None}, "E10004: Value for parameter [--soc_version]"),
        ({"soc_version": "Ascend310P9"}, "E10001: Value [Ascend310P9] for parameter [--soc_version]"),
        ({"framework": "3"}, "an ONNX graph is framework 5"),
        ({"model": "none.onnx"}, "No such file"),
        ({"dynamic_dims": "32,32,32"}, "there are 1 gears; 2 to 100 are allowed"),
        ({"dynamic_dims": ";".join(f"{n},{n},{n}" for n in range(1, 102))}, "there are 101 gears"),
        ({"dynamic_dims": "32,32,32;64,64"}, "every gear needs 3 sizes"),
        ({"dynamic_dims": "32,32,32;0,0,0"}, "gears are positive numbers"),
        ({"dynamic_dims": "32,32,32;32,32,32"}, "a gear is there twice"),
        ({"dynamic_dims": None}, "-1 needs --dynamic_dims"),
        ({"dynamic_batch_size": "1,2"}, "--dynamic_dims and --dynamic_batch_size cannot be used together"),
        ({"input_shape_range": "x"}, "--dynamic_dims and --input_shape_range cannot be used together"),
        ({"input_format": "NCHW"}, "--dynamic_dims needs ND"),
        ({"input_shape": "input_ids:2,-1;segments:2,-1"}, "['position_ids'] has free dimensions and is not named"),
        ({"input_shape": "ids:2,-1"}, "the graph has no input 'ids'"),
        ({"input_shape": "input_ids:-1;segments:2,-1;position_ids:2,-1"}, "input_ids has 2 dimensions"),
        ({"input_fp16_nodes": "input_ids"}, "the graph has no such input of a floating type"),
        ({"precision_mode": "fp16"}, "Value [fp16] for parameter [--precision_mode]"),
        ({"optypelist_for_implmode": "Gelu"}, "it needs --op_select_implmode"),
    ],
)
def test_atc(convert: Callable[..., str], changes: dict[str, str | None], message: str) -> None:
    assert message in convert(**changes)


def test_atc_without_its_environment(convert: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME")
    assert "E10000: ASCEND_OPP_PATH is not set" in convert()


def test_session(machine: Any, art: Path, convert: Callable[..., str]) -> None:
    convert()
    machine.reset()
    session = machine.InferSession(0, str(next(art.glob("model*.om"))))
    ones = np.ones((2, 32), np.int64)
    ids = np.tile(np.array([5, 9] * 16), (2, 1))
    right = [ids, ones, ones]

    def refuses(message: str, feeds: Any, mode: str = "dymdims") -> None:
        with pytest.raises(RuntimeError, match=message):
            session.infer(feeds, mode=mode)

    assert session.infer(right, mode="dymdims")[0].shape == (2, 32, 5)
    refuses("mode 'static' on a model of mode 'dymdims'", right, "static")
    refuses("feeds is a list", tuple(right))
    refuses("feeds is a list", right[:2])
    refuses("is int64, and int32 came", [ids.astype(np.int32), ones, ones])
    refuses("is not contiguous", [np.asfortranarray(ids), ones, ones])
    refuses("not among the gears", [x[:1] for x in right])
    refuses("segments is none: the feeds come in another order", [ones, ids, ones])
    elsewhere: list[BaseException] = []

    def call() -> None:
        try:
            session.infer(right, mode="dymdims")
        except RuntimeError as error:
            elsewhere.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "infer from another thread" in str(elsewhere[0])
    session.free_resource()
    refuses("after it was freed", right)
    session.finalize()
    with pytest.raises(RuntimeError, match="a session after finalize"):
        machine.InferSession(0, "x")
    with pytest.raises(RuntimeError, match="finalize twice"):
        session.finalize()
    assert len(machine.violations) == 11
