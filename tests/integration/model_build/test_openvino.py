"""Artifacts for OpenVINO: the checkpoint's answers, scales from texts, and not one bit from a window's neighbours."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")
pytest.importorskip("nncf")
pytest.importorskip("transformers")


from nermill.model_build import cli
from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.bench import bench
from nermill.model_build.calibration import MOST_WINDOWS
from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.corpus import read_texts
from nermill.model_build.reference import reference_logits, windows_of
from nermill.model_build.verify import run_batched, run_packed, verify
from nermill.producer import doctor
from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import load_manifest
from nermill.worker.engine import load_engine
from nermill.worker.engine import openvino as engine_module
from nermill.worker.engine.golden import run_alone
from tests.bits import batched, same_bits, sample_windows, shuffled
from tests.checkpoints import FAMILIES, MAX_LENGTH

TEXTS = ["george washington went to washington.", "oslo", "a very long train (of thought) left paris at 10.45"]
SENTENCES = 3000
ALONE = 300


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=[] if (family, layout) == ("bert", "packed") else pytest.mark.slow)
        for family in FAMILIES
        for layout in ("equal", "packed", "plain")
    ],
)
def test_every_family_answers_as_its_checkpoint(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, layout: str
) -> None:
    folder = make_checkpoint(family)
    manifest = compile_artifact(str(folder), tmp_path / "art", Order("openvino", layout))  # type: ignore[arg-type]
    assert manifest.files.keys() == {"model.xml", "model.bin", "golden.json", "tokenizer.json"}
    assert "openvino" in manifest.libraries
    checkpoint = open_checkpoint(str(folder))
    windows = windows_of(checkpoint, TEXTS, MAX_LENGTH)
    engine = load_engine(tmp_path / "art", "cpu", 1)
    mine = run_packed(engine, windows) if layout == "packed" else run_alone(engine, windows)
    for logits, theirs in zip(mine, reference_logits(checkpoint, windows), strict=True):
        np.testing.assert_allclose(logits, theirs, atol=1e-4)
    engine.close()
    assert all(check.passed for check in verify(tmp_path / "art"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The shipped model for OpenVINO, in int8 with scales from the sample, by commands of the builder's page."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "model_build").symlink_to(root / "model_build")
    page = (root / "model_build" / "README.md").read_text("utf-8")
    commands = re.findall(
        r"^(?:python -m \S+demo\.recover|nermill-build compile demo-checkpoint) .*$", page, re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("nermill-build", "python -m nermill.model_build.cli"))
        subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    manifest = load_manifest(folder / "demo-openvino")
    assert manifest.details["calibration"]["texts"].endswith(" texts of wikigold.conll")
    assert 50 <= manifest.details["calibration"]["windows"] <= MOST_WINDOWS
    return folder / "demo-openvino"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_bit_of_int8_comes_from_a_windows_neighbours(demo: Path, sample: Path) -> None:
    windows = sample_windows(demo, sample, SENTENCES)
    engine = load_engine(demo)
    windows, expected = shuffled(windows, run_batched(engine, windows))
    for budget, shapes in ((512, ()), (1024, ((16, 64), (8, 128), (2, 512)))):
        same_bits(batched(engine, windows, budget, shapes), expected)
    same_bits(run_alone(engine, windows[:ALONE]), expected[:ALONE])
    engine.close()
    few = load_engine(demo, threads=1)
    same_bits(batched(few, windows[:ALONE], 2048), expected[:ALONE])
    few.close()


@pytest.mark.slow
def test_int8_loses_little_against_its_checkpoint(demo: Path, sample: Path) -> None:
    texts = read_texts([str(sample / "wikigold.conll")])
    checks = {c.name: c for c in verify(demo, checkpoint=str(demo.parent / "demo-checkpoint"), texts=texts)}
    assert checks["texts F1 lost"].value < 0.01, checks["texts F1 lost"].note
    assert checks["texts tags"].value < 0.02
    assert checks["packing"].value == checks["padding"].value == 0


@pytest.mark.slow
def test_bench_and_inspect_know_it(demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    body = bench(demo, repeats=1)
    assert (body["backend"], body["precision"]) == ("openvino", "int8")
    assert all(0.01 < shape["peak_share"] < 2 for shape in body["shapes"])
    monkeypatch.setattr("sys.argv", ["nermill-build", "inspect", str(demo)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    assert "openvino int8 packed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8", "--calibrate", "{}/none.txt"), "none.txt: cannot be read (No such file"),
        (("--precision", "int8", "--calibrate", "{}/empty.txt"), "empty.txt: holds no text"),
        (("--precision", "int8", "--calibrate", "{}/no.jsonl"), "no.jsonl:1: no JSON object with a text"),
        (("--precision", "int8", "--calibrate", "{}/t.parquet"), "t.parquet: CoNLL, JSONL or plain lines are read"),
        (("--precision", "int8", "--calibrate", "{}/bytes.txt"), "bytes.txt: cannot be read"),
        (("--precision", "fp32", "--calibrate", "{}/empty.txt"), "--calibrate: openvino fp32 has no scales to find"),
        (
            (
                "--precision",
                "fp16",
            ),
            "--precision fp16: backend openvino takes fp32, bf16, int8",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    bert: Path, tmp_path: Path, capsys, monkeypatch, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n", "utf-8")
    (tmp_path / "no.jsonl").write_text('{"txt": 1}\n', "utf-8")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    given = [option.format(tmp_path) for option in options]
    arguments = ["compile", str(bert), "--out", str(tmp_path / "art"), "--backend", "openvino", *given]
    assert message in refused(arguments, capsys, monkeypatch)
    assert not (tmp_path / "art").exists()
    assert not list(tmp_path.glob(".art*"))


def refused(arguments: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bf16_is_refused_where_the_cpu_computes_none(bert: Path, compiled, tmp_path, capsys, monkeypatch) -> None:
    class Without:
        def get_property(self, device: str, name: str) -> object:
            return {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"], "FULL_DEVICE_NAME": "Some CPU"}[name]

    art = compiled("openvino")
    monkeypatch.setattr("openvino.Core", Without)
    arguments = ["compile", str(bert), "--out", str(tmp_path / "art"), "--backend", "openvino", "--precision", "bf16"]
    told = "this CPU (Some CPU) computes no bf16; compile with --precision int8 or fp32"
    assert f"--precision bf16: {told}" in refused(arguments, capsys, monkeypatch)
    manifest = replace(load_manifest(art), precision="bf16")
    with pytest.raises(ArtifactError, match="computes no bf16"):
        engine_module.OpenvinoEngine(art, manifest)
    monkeypatch.setattr(doctor, "has_bf16", lambda: False)
    finding = doctor._runtime(manifest)
    assert not finding.ok
    assert "computes no bf16" in finding.detail


def test_another_device_and_a_machine_without_openvino_are_named(compiled: Callable[..., Path]) -> None:
    art = compiled("openvino")
    with pytest.raises(ArtifactError, match="runs on CPUs; for cuda:0 compile with --backend torch"):
        load_engine(art, "cuda:0")
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from pathlib import Path; from nermill.worker.engine import load_engine\n"
        f"load_engine(Path({str(art)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "backend openvino needs openvino, which is not installed; pip install nermill[openvino]" in done.stderr


def test_a_graph_that_is_damaged_is_named(compiled: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    art = shutil.copytree(compiled("openvino"), tmp_path / "art")
    (art / "model.xml").write_text("<net", "utf-8")
    with pytest.raises(ArtifactError, match=r"openvino .* does not load it"):
        engine_module.OpenvinoEngine(art, load_manifest(compiled("openvino")))
    with pytest.raises(ArtifactError, match=r"model\.xml: changed since it was built"):
        load_engine(art)
