"""Backend ``om`` against strict doubles of atc and InferSession, which refuse nothing that we do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from nermill.model_build import cli
from nermill.model_build.adopt import adopt
from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.bench import bench
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.demo.recover import recover
from nermill.model_build.reference import windows_of
from nermill.model_build.verify import run_batched, run_packed, verify
from nermill.worker.contracts.errors import ArtifactError, EngineError
from nermill.worker.contracts.manifest import load_manifest
from nermill.worker.engine import load_engine
from nermill.worker.engine.golden import lay_rows
from tests.checkpoints import LARGE
from tests.doubles import cann

TEXTS = ["george washington went to washington.", "oslo", "a train left paris at 10.45"]
ONE, THREE = "2x64", "2x32,2x64,2x96"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with CANN and the wheels; returns the module of the ``InferSession`` double."""
    cann.install(monkeypatch, tmp_path / "cann")
    return sys.modules["ais_bench.infer.interface"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs ``nermill-build``, which must refuse with one line and exit code 2; returns the line."""

    def run(*arguments: str, code: int = 2) -> str:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        streams = capsys.readouterr()
        assert (exit_.value.code, streams.out) == (code, "")
        (line,) = streams.err.splitlines()
        return line.removeprefix("nermill-build: ")

    return run


@pytest.mark.parametrize(
    ("layout", "dtype", "shapes"),
    [
        ("packed", "int64", ONE),
        ("packed", "int32", THREE),
        ("plain", "int64", THREE),
        ("plain", "int32", "2x32,4x64"),
    ],
)
@pytest.mark.slow
def test_compiles_and_answers_as_the_onnx_engine(
    machine: Any, bert: Path, tmp_path: Path, layout: str, dtype: str, shapes: str
) -> None:
    order = Order("om", shapes=shapes, index_dtype=dtype, layout=layout)  # type: ignore[arg-type]
    manifest = compile_artifact(str(bert), tmp_path / "om", order)
    assert (manifest.precision, manifest.model_file) == ("fp16", "model.om")
    assert manifest.files.keys() == {"model.om", "atc.log", "golden.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "om").iterdir()} == manifest.files.keys() | {"manifest.json"}
    details = manifest.details
    assert (details["soc"], details["cann"], details["tried"]) == ("Ascend310P3", "8.0.RC1", True)
    assert details["atc"]["log"] == "ATC run success, welcome to the next use."
    assert details["gears"] == ([list(shape) for shape in manifest.shapes] if shapes != ONE else [])

    compile_artifact(str(bert), tmp_path / "onnx", replace(order, backend="onnx", precision="fp32"))
    windows = windows_of(open_checkpoint(str(bert)), TEXTS, max(length for _, length in manifest.shapes))
    run = run_packed if layout == "packed" else run_batched
    onnx = load_engine(tmp_path / "onnx", "cpu", 1)
    expected = run(onnx, windows)
    machine.reset()  # the worker is another process
    npu = load_engine(tmp_path / "om", "npu:0")
    for mine, theirs in zip(run(npu, windows), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    npu.close()
    assert machine.calls[0] == "load(0)"
    assert machine.calls[-2:] == ["free_resource", "finalize"]
    assert machine.violations == []


def test_gears_and_one_shape_as_atc_reads_them(machine: Any, bert: Path, tmp_path: Path) -> None:
    def command(shapes: str) -> str:
        manifest = compile_artifact(str(bert), tmp_path / shapes, Order("om", shapes=shapes, atc=False))
        return str(manifest.details["command"])

    assert "'--input_shape=input_ids:2,64;segments:2,64;position_ids:2,64'" in command("2x64")
    assert "dynamic_dims" not in command("1x64")
    fixed_rows = command("2x32,2x64")
    assert "'--input_shape=input_ids:2,-1;segments:2,-1;position_ids:2,-1'" in fixed_rows
    assert "'--dynamic_dims=32,32,32;64,64,64'" in fixed_rows
    assert "'--dynamic_dims=2,32,2,32,2,32;4,64,4,64,4,64'" in command("2x32,4x64")
    assert "--soc_version=Ascend310P3" in fixed_rows


def test_calls_from_many_threads_meet_one_session_in_one_thread(machine: Any, bert: Path, tmp_path: Path) -> None:
    compile_artifact(str(bert), tmp_path / "om", Order("om", shapes=THREE))
    machine.reset()
    engine = load_engine(tmp_path / "om", "npu:0")
    windows = windows_of(open_checkpoint(str(bert)), TEXTS, 32)
    batches = [lay_rows([[ids]], (2, length), engine.manifest) for ids in windows for length in (32, 64)]
    expected = [engine.run(batch) for batch in batches]
    answers: list[Any] = [None] * len(batches)
    threads = [
        threading.Thread(target=lambda n=n: answers.__setitem__(n, engine.run(batches[n]))) for n in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    for mine, theirs in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert machine.violations == []


@pytest.mark.slow
def test_demo_model_verifies_and_benches(machine: Any, tmp_path: Path) -> None:
    recover(tmp_path / "demo")
    compile_artifact(str(tmp_path / "demo"), tmp_path / "om", Order("om", shapes="4x64,4x128"))
    machine.reset()
    assert all(check.passed for check in verify(tmp_path / "om", device="npu:0"))
    machine.reset()
    measured = bench(tmp_path / "om", "npu:0", repeats=1)
    assert [(s["rows"], s["length"]) for s in measured["shapes"]] == [(4, 64), (4, 128)]
    assert machine.violations == []


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_two_layers_of_the_size_of_bert_large(
    machine: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """All 24 of them: ``tests/acceptance/test_bert_large.py``."""
    checkpoint = make_checkpoint("bert", num_hidden_layers=2, **LARGE)
    manifest = compile_artifact(str(checkpoint), tmp_path / "om", Order("om", shapes="2x64,1x128"))
    assert (tmp_path / "om" / "model.om").stat().st_size > 200e6
    assert manifest.details["tried"]
    assert manifest.shapes == ((2, 64), (1, 128))
    machine.reset()
    assert all(check.passed for check in verify(tmp_path / "om", device="npu:0"))
    assert machine.violations == []


def test_without_atc_here_and_adopted_elsewhere(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    art = tmp_path / "om"
    with monkeypatch.context() as bare:
        bare.setenv("PATH", "/usr/bin:/bin")
        manifest = compile_artifact(str(bert), art, Order("om", shapes=THREE, atc=False))
    assert manifest.files.keys() == {"model.onnx", "convert.sh", "golden.json", "tokenizer.json"}
    with pytest.raises(ArtifactError, match=r"is not converted yet; run .*convert\.sh on a machine with CANN, then"):
        load_engine(art, "npu:0")
    environment = {**os.environ, **cann.environment(tmp_path / "cann")}
    done = subprocess.run([art / "convert.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused" not in done.stdout
    machine = cann.wheels(monkeypatch)
    manifest = adopt(art, art / "model.om")
    assert manifest.details["tried"]
    assert "pending" not in manifest.details
    assert {path.name for path in art.iterdir()} >= manifest.files.keys() | {"manifest.json"}
    assert manifest.files.keys() == {"model.om", "atc.log", "golden.json", "tokenizer.json"}
    machine.reset()
    engine = load_engine(art, "npu:0")
    engine.run(lay_rows([], (2, 96), engine.manifest))
    engine.close()
    assert machine.violations == []
    assert "waits for no model" in refused("adopt", str(art), str(art / "model.om"))


def test_adopting_what_is_not_of_this_graph(
    machine: Any, bert: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    waiting, other = tmp_path / "om", tmp_path / "other"
    compile_artifact(str(bert), waiting, Order("om", shapes=ONE, atc=False))
    before = sorted(path.name for path in waiting.iterdir())
    compile_artifact(str(make_checkpoint("bert", hidden_act="relu")), other, Order("om", shapes=ONE, atc=False))
    subprocess.run([other / "convert.sh"], env=os.environ, check=True, stdout=subprocess.DEVNULL)
    foreign = other / "model.om"
    assert "was converted from another graph than" in refused("adopt", str(waiting), str(foreign))
    (other / "model.om.sha256").unlink()  # the golden answers tell as well
    machine.reset()
    assert "away from the golden answers of" in refused("adopt", str(waiting), str(foreign))
    foreign.write_bytes(foreign.read_bytes().replace(b"[2, 64]", b"[2, 32]"))  # another gear
    machine.reset()
    assert "does not run as" in refused("adopt", str(waiting), str(foreign))
    assert "is no offline model" in refused("adopt", str(waiting), str(waiting / "model.onnx"))
    assert "No such file" in refused("adopt", str(waiting), str(tmp_path / "none.om"))
    assert sorted(path.name for path in waiting.iterdir()) == before
    assert load_manifest(waiting).details["pending"]


def test_adopting_without_a_receipt_where_nothing_can_be_asked(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    art = tmp_path / "om"
    compile_artifact(str(bert), art, Order("om", shapes=ONE, atc=False))
    environment = {**os.environ, **cann.environment(tmp_path / "cann")}
    subprocess.run([art / "convert.sh"], env=environment, check=True, stdout=subprocess.DEVNULL)
    receipt = (art / "model.om.sha256").read_text("utf-8")
    (art / "model.om.sha256").unlink()
    cann.forget(monkeypatch)
    assert "nothing tells of which graph it is" in refused("adopt", str(art), str(art / "model.om"))
    (art / "model.om.sha256").write_text(receipt, "utf-8")
    manifest = adopt(art, art / "model.om")
    assert manifest.details["tried"] is False
    assert "model.om did not run here" in manifest.details["notes"][0]


def test_host_without_a_card_says_that_the_model_was_not_tried(
    machine: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("nermill.model_build.om.OmEngine", no_card)
    monkeypatch.setattr(
        "sys.argv", ["x", "compile", str(bert), "--backend", "om", "--shapes", ONE, "--out", str(tmp_path / "om")]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    streams = capsys.readouterr()
    assert "model.om did not run here (npu:0 does not load it" in streams.err
    assert "ATC run success, welcome to the next use." in streams.out
    assert load_manifest(tmp_path / "om").details["tried"] is False


def no_card(artifact: Path, *_: object) -> None:
    raise ArtifactError(f"{artifact}: npu:0 does not load it (no device)")


def test_atc_that_fails_leaves_its_log_alone(
    machine: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setenv("ATC_DOUBLE_FAILS", "E19014: Op[Clip_3] attribute is invalid")
    order = ("compile", str(bert), "--backend", "om", "--shapes", ONE, "--out", str(tmp_path / "made" / "om"))
    line = refused(*order, code=1)
    log = tmp_path / "made" / "om.atc.log"
    assert line == (f"atc failed (exit code 1): E19014: Op[Clip_3] attribute is invalid; its log is {log}")
    assert "ATC start working now" in log.read_text("utf-8")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["om.atc.log"]


def test_graph_that_the_compiler_spoiled_is_not_kept(
    machine: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer = machine.InferSession.infer
    monkeypatch.setattr(machine.InferSession, "infer", lambda *a, **k: [infer(*a, **k)[0] + 1.0])
    with pytest.raises(EngineError, match=r"the offline model is .* away from the checkpoint's logits"):
        compile_artifact(str(bert), tmp_path / "om", Order("om", shapes=ONE))
    assert not (tmp_path / "om").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--soc", "Ascend999X"), "--soc Ascend999X: this CANN does not know it; it knows Ascend310P3"),
        (("--soc", "310P3"), "--soc 310P3: write the chip with Ascend before the name"),
        (("--precision", "int8"), "--precision int8: backend om takes fp16"),
        (("--shapes", ",".join(f"1x{n}" for n in range(3, 96)) + "," + ",".join(f"2x{n}" for n in range(3, 20))),
         "110 shapes; atc takes at most 100 gears"),
        (("--shapes", "2x128"), "the model reads at most 96 tokens"),
    ],
)  # fmt: skip
def test_orders_that_do_not_fit(
    machine: Any, bert: Path, tmp_path: Path, refused: Callable[..., str], options: tuple[str, ...], message: str
) -> None:
    assert message in refused("compile", str(bert), "--backend", "om", "--out", str(tmp_path / "om"), *options)
    assert not (tmp_path / "om").exists()


def test_plain_rows_of_a_family_without_token_types(
    machine: Any, make_checkpoint: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    order = ("compile", str(make_checkpoint("distilbert")), "--backend", "om", "--shapes", ONE)
    line = refused(*order, "--layout", "plain", "--out", str(tmp_path / "om"))
    assert "has no token types, and atc may drop an input that nothing uses; take --layout packed" in line


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_other_families(machine: Any, make_checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    manifest = compile_artifact(str(make_checkpoint(family)), tmp_path / "om", Order("om", shapes=ONE))
    assert manifest.details["tried"]  # within its tolerance of the checkpoint's golden logits
    assert machine.violations == []


def test_six_dynamic_dimensions_on_older_cann(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    cann.install(monkeypatch, tmp_path / "cann", version="6.0.1")
    order = ("compile", str(bert), "--backend", "om", "--out", str(tmp_path / "om"))
    line = refused(*order, "--shapes", "8x32,4x64")
    assert "are 6 dynamic dimensions, and CANN 6 takes 4" in line
    assert "(--shapes 8x32,8x64); here is CANN 6.0.1" in line
    compile_artifact(str(bert), tmp_path / "om", Order("om", shapes="8x32,8x64"))


def test_machine_without_atc_or_its_environment(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    order = ("compile", str(bert), "--backend", "om", "--shapes", ONE, "--out", str(tmp_path / "om"))
    assert "--backend om needs atc, which comes with CANN and is not on the PATH; source" in refused(*order)
    variables = cann.environment(tmp_path / "cann")
    monkeypatch.setenv("PATH", variables["PATH"])
    assert "CANN's environment is not loaded (ASCEND_TOOLKIT_HOME is not set)" in refused(*order)
    monkeypatch.undo()
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", variables["ASCEND_TOOLKIT_HOME"])
    monkeypatch.setenv("PYTHONPATH", variables["PYTHONPATH"])
    compile_artifact(str(bert), tmp_path / "found", Order("om", shapes=ONE))  # below ASCEND_TOOLKIT_HOME


def test_wheels_that_are_missing_or_do_not_fit(
    machine: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    art = tmp_path / "om"
    compile_artifact(str(bert), art, Order("om", shapes=ONE))
    with pytest.raises(ArtifactError, match="compiled for Ascend NPUs; device 'cpu' cannot run it"):
        load_engine(art, "cpu")
    for missing, message in (
        ({"ais_bench": None}, "backend om needs ais_bench, which is not installed for Python 3"),
        ({"aclruntime": None}, "needs the wheel aclruntime, which is built for one Python: install the one for"),
        ({"ais_bench.infer.interface": None}, r"has no InferSession \(PyPI's ais-bench-benchmark is another tool\)"),
    ):
        with monkeypatch.context() as patch:
            cann.forget(patch)
            hide(patch, next(iter(missing)))
            assert re.search(message, refused("verify", str(art), "--device", "npu:0"))
    broken = tmp_path / "broken"
    shutil.copytree(cann.WHEELS, broken)
    (broken / "aclruntime.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')\n")
    with monkeypatch.context() as patch:
        cann.forget(patch)
        patch.syspath_prepend(str(broken))
        line = refused("verify", str(art), "--device", "npu:0")
    assert re.search(r"ais_bench does not load \(libascendcl\.so: .*source CANN's set_env", line)


def hide(patch: pytest.MonkeyPatch, name: str) -> None:
    """``import name`` fails as if it were not installed."""

    class Hidden:
        def find_spec(self, wanted: str, *_: object) -> None:
            if wanted == name:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    patch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])


def test_device_that_runs_out_of_memory_or_is_lost(
    machine: Any, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_artifact(str(bert), tmp_path / "om", Order("om", shapes=THREE))
    machine.reset()
    engine = load_engine(tmp_path / "om", "npu:0")
    monkeypatch.setenv("AIS_DOUBLE_FAILS_OVER", "100")
    with pytest.raises(EngineError, match=r"ais_bench on npu:0 refuses shape 2x96: .*malloc device memory failed"):
        engine.run(lay_rows([], (2, 96), engine.manifest))
    engine.run(lay_rows([], (2, 32), engine.manifest))
    with pytest.raises(EngineError, match="2x48 was not compiled"):
        engine.run(lay_rows([], (2, 48), engine.manifest))
    engine.close()
    assert machine.violations == []
    machine.reset()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3")
    with pytest.raises(ArtifactError, match=r"npu:1 does not load it \(\[ERROR\] ACL: invalid device 1"):
        load_engine(tmp_path / "om", "npu:1")


def test_offline_model_with_other_inputs(machine: Any, bert: Path, tmp_path: Path) -> None:
    art = tmp_path / "om"
    compile_artifact(str(bert), art, Order("om", shapes=ONE, layout="plain"))
    manifest = json.loads((art / "manifest.json").read_text("utf-8"))
    inputs = [{"name": name, "dtype": "int64"} for name in ("input_ids", "segments", "position_ids")]
    (art / "manifest.json").write_text(json.dumps(manifest | {"layout": "packed", "inputs": inputs}), "utf-8")
    machine.reset()
    with pytest.raises(ArtifactError, match="the offline model takes input_ids, attention_mask, token_type_ids and"):
        load_engine(art, "npu:0")
