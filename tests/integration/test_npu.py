"""The whole worker with ``--devices npu:0`` against the doubles of CANN: killed, hung, resumed, the same table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from nermill.model_build.artifact import Order, compile_artifact
from nermill.model_build.demo.recover import recover
from nermill.worker import Tagger
from nermill.worker.contracts.layout import RunFolder
from tests.doubles import cann
from tests.harness import Harness, rows, texts
from tests.integration.test_worker_command import children

SHAPES = "8x64,8x128"
DOCUMENTS = texts(800)  # more than 15 calls of packed rows, the number after which the double hangs
WORKER = [sys.executable, "-m", "nermill.worker.process.launch"]


@dataclass(frozen=True)
class Machine:
    """A machine with CANN: variables of its processes, and the demo model for its NPU and as an ONNX graph."""

    variables: dict[str, str]
    model: Path
    onnx: Path


@pytest.fixture(scope="module", params=["plain", "packed"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="npu-") as name:
        folder = Path(name)
        variables = cann.environment(folder / "cann")
        recover(folder / "demo")
        order = ["--backend", "om", "--layout", request.param, "--shapes", SHAPES, "--out", str(folder / "om")]
        command = [sys.executable, "-m", "nermill.model_build.cli", "compile", str(folder / "demo"), *order]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ATC run success" in done.stdout
        compile_artifact(
            str(folder / "demo"), folder / "onnx", Order("onnx", layout=request.param, precision="fp32", shapes=SHAPES)
        )
        yield Machine(variables, folder / "om", folder / "onnx")


@contextmanager
def worker(fleet: Harness, machine: Machine, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    settings = {
        "NERMILL_BROKER_URL": fleet.server.url,
        "NERMILL_ALLOWED_ROOTS": str(fleet.out),
        "NERMILL_HANG_SECONDS": "3",
        "NERMILL_LEASE_SECONDS": "2",
        "AIS_DOUBLE_VIOLATIONS": str(fleet.folder / "violations"),
        "AIS_DOUBLE_SECONDS": "0.05",
    }
    command = [*WORKER, "--devices", "npu:0", "--model", str(machine.model)]
    variables = {**os.environ, **machine.variables, **settings, **environment}
    with (
        (fleet.folder / "npu.log").open("ab") as log,
        subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(40)


def found(answer: list[dict[str, Any]]) -> list[list[tuple[int, int, str]]]:
    return [[(e["start"], e["end"], e["label"]) for e in row["entities"]] for row in answer]


@pytest.mark.timeout(900)  # three processes load the model, one of them hangs
@pytest.mark.slow
def test_killed_hung_and_stopped_it_gives_the_table_of_the_onnx_engine(fleet: Harness, machine: Machine) -> None:
    with worker(fleet, machine, AIS_DOUBLE_HANGS=str(fleet.folder / "hung")) as process:
        run, plan = fleet.submit(DOCUMENTS, documents_per_shard=20)
        fleet.until(lambda: run.committed())
        os.kill(children(process)[0], signal.SIGKILL)
        fleet.until((fleet.folder / "hung").exists)
        fleet.until(lambda: "the device has not answered for" in fleet.logs())
    kept = run.committed()
    with worker(fleet, machine) as process:  # what was stopped goes on
        fleet.wait(run, plan)
        process.terminate()
        assert process.wait(40) == 0
    assert len(kept) < len(plan.shards)
    with Tagger.load(machine.onnx, threads=1) as tagger:
        expected = [[(e.start, e.end, e.label) for e in a.entities] for a in tagger.tag(DOCUMENTS)]
    assert found(rows(run)) == expected
    assert sum(map(len, expected)) > len(DOCUMENTS)
    assert not (fleet.folder / "violations").exists(), (fleet.folder / "violations").read_text()


@pytest.mark.slow
def test_dry_run_and_a_machine_that_lacks_something(machine: Machine) -> None:
    def dry_run(**changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **machine.variables, **changes}
        command = [*WORKER, "--dry-run", "--devices", "npu:0", "--model", str(machine.model)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    done = dry_run()
    assert done.returncode == 0, done.stderr
    assert "npu:0: ready in" in done.stdout
    assert "Ada Lovelace (PER" in done.stdout
    bare = machine.variables["PYTHONPATH"].partition(os.pathsep)[2]
    done = dry_run(PYTHONPATH=bare)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "backend om needs ais_bench, which is not installed for Python" in line


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_nermill_run_that_is_killed_goes_on(machine: Machine, tmp_path: Path) -> None:
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), "utf-8")

    def run(model: Path, devices: str, **options: Any) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "nermill.producer.cli",
            "run",
            str(corpus),
            "--out",
            str(tmp_path / model.name),
        ]
        command += ["--model", str(model), "--devices", devices, "--shard-documents", "20", "--json"]
        violations = {"AIS_DOUBLE_VIOLATIONS": str(tmp_path / "violations")}
        environment = {**os.environ, **machine.variables, **violations, **options}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def table(process: subprocess.Popen[str]) -> list[list[tuple[int, int, str]]]:
        out, _ = process.communicate()
        assert process.returncode == 0
        assert json.loads(out)["state"] == "complete"
        return found(rows(RunFolder(json.loads(out)["run"])))

    killed = run(machine.model, "npu:0", AIS_DOUBLE_SECONDS="1")
    parts = tmp_path / machine.model.name
    while not any(parts.glob("run=*/part-*.parquet")):
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)  # with its worker and its broker
    killed.communicate()
    (before,) = parts.glob("run=*")
    assert not (before / "_SUCCESS").exists()
    kept = {part.name: part.stat().st_ino for part in before.glob("part-*.parquet")}
    on_npu = table(run(machine.model, "npu:0"))
    assert {name: (before / name).stat().st_ino for name in kept} == kept
    assert on_npu == table(run(machine.onnx, "cpu"))
    assert not (tmp_path / "violations").exists()
