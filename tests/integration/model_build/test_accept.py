"""The acceptance kit whole: on the CPU, against the doubles of CANN, and on a device that is not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from nermill.model_build import accept as kit
from nermill.model_build import cli
from tests.doubles import cann, card, mindie

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DISTURBED = ["run", "lost process", "hung call"]


@pytest.fixture
def accept(bert: Path, tmp_path: Path, capsys, monkeypatch):
    """Runs the command with a small checkpoint and some backends: exit code and report."""

    def run(device: str, *candidates: tuple[str, str]) -> tuple[int, dict[str, Any]]:
        monkeypatch.setitem(kit.CANDIDATES, device.partition(":")[0], candidates)
        arguments = ["accept", str(bert), "--device", device, "--out", str(tmp_path / "report"), "--json"]
        monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        told = json.loads(capsys.readouterr().out)
        report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
        assert told == {"report": str(tmp_path / "report"), **report}
        page = (tmp_path / "report" / "report.html").read_text("utf-8")
        assert all(step["name"] in page for step in report["steps"])
        assert "39.69" in page
        assert "63.31" in page
        return int(exit_.value.code or 0), report

    return run


def states(report: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["state"] for step in report["steps"]}


def of(*models: str) -> list[str]:
    """The steps of backends that serve."""
    return [f"{step} {model}" for model in models for step in ("compile", "verify", "bench")]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Makes the processes of a test those of a machine with a double and a driver; the double must refuse nothing."""

    def make(variables: dict[str, str], driver: str) -> None:
        program = tmp_path / "driver" / driver
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho '| 0  310P3 | OK |'\n", "utf-8")
        program.chmod(0o755)
        path = variables.get("PATH", os.environ["PATH"])
        for name, value in {**variables, "PATH": f"{program.parent}{os.pathsep}{path}"}.items():
            monkeypatch.setenv(name, value)
        for double in ("AIS", "MINDIE", "CUDA"):
            monkeypatch.setenv(f"{double}_DOUBLE_VIOLATIONS", str(tmp_path / "violations"))

    yield make
    assert not (tmp_path / "violations").exists(), (tmp_path / "violations").read_text("utf-8")


def test_the_cpu_passes_whole(accept) -> None:
    code, report = accept("cpu", ("onnx", "int8"), ("torch", "fp32"))
    assert (code, report["passed"]) == (0, True), [s for s in report["steps"] if s["state"] == "failed"]
    names = list(states(report))
    fastest = names[7].removeprefix("compile ").removesuffix(" plain")
    assert fastest in ("onnx int8", "torch fp32")
    both = [*of("onnx int8", "torch fp32"), *of(f"{fastest} plain")]
    assert names == ["runtime", *both, "layouts", "memory", *DISTURBED]
    assert set(states(report).values()) == {"passed"}
    by_name = {step["name"]: step for step in report["steps"]}
    assert "answers as before after it" in by_name["memory"]["detail"]
    assert "SIGKILL to process" in by_name["lost process"]["detail"]
    assert "SIGSTOP to process" in by_name["hung call"]["detail"]
    assert all(by_name[name]["figures"]["documents"]["ok"] > 100 for name in DISTURBED)


def test_an_npu_of_the_doubles_passes(accept, machine, tmp_path: Path) -> None:
    """Through offline models; what is not installed on that machine is skipped."""
    machine(cann.environment(tmp_path / "cann"), "npu-smi")
    code, report = accept("npu:0", ("om", "fp16"), ("aie", "fp16"), ("torch", "fp16"))
    assert states(report) == {
        **dict.fromkeys(["runtime", *of("om fp16", "om fp16 plain"), "compile torch fp16", "layouts"], "passed"),
        **dict.fromkeys(["compile aie fp16", "verify torch fp16", "memory"], "skipped"),
        **dict.fromkeys(DISTURBED, "passed"),
    }
    assert (code, report["passed"]) == (0, True)
    assert report["steps"][0]["figures"]["driver"] == "| 0  310P3 | OK |\n"
    layouts = next(step for step in report["steps"] if step["name"] == "layouts")
    assert list(layouts["figures"]["compared"]) == ["padded", "bucketed", "packed"]
    assert "301 documents, computed from these times, in a second: padded" in layouts["detail"]


def test_an_npu_of_the_double_of_mindietorch_passes(accept, machine, tmp_path: Path) -> None:
    machine(mindie.environment(tmp_path / "mindie"), "npu-smi")
    code, report = accept("npu:0", ("om", "fp16"), ("aie", "fp16"))
    assert states(report) == {
        **dict.fromkeys(["runtime", *of("aie fp16", "aie fp16 plain"), "layouts", *DISTURBED], "passed"),
        **dict.fromkeys(["compile om fp16", "memory"], "skipped"),
    }
    assert (code, report["passed"]) == (0, True)


def test_a_cuda_card_of_the_double_passes(accept, machine, tmp_path: Path) -> None:
    """It refuses a batch for its memory, and answers as before after it."""
    machine(card.environment(tmp_path / "card") | {"CUDA_DOUBLE_ELEMENTS": "3000000"}, "nvidia-smi")
    code, report = accept("cuda:0", ("torch", "fp32"))
    names = ["runtime", *of("torch fp32", "torch fp32 plain"), "layouts", "memory", *DISTURBED]
    assert states(report) == dict.fromkeys(names, "passed")
    assert (code, report["passed"]) == (0, True)
    memory = next(step for step in report["steps"] if step["name"] == "memory")
    assert re.match(r"refuses \d+x96 \(torch on cuda:0 .*CUDA out of memory.*, and answers as before", memory["detail"])


def test_a_device_that_is_not_there_fails_in_the_report(accept) -> None:
    code, report = accept("cuda:0", ("torch", "fp32"), ("onnx", "fp32"))
    assert (code, report["passed"]) == (4, False)
    assert states(report) == {
        "runtime": "failed",
        "compile torch fp32": "passed",
        "verify torch fp32": "failed",
        "compile onnx fp32": "passed",
        "verify onnx fp32": "skipped",
        "run": "failed",
    }
    by_name = {step["name"]: step["detail"] for step in report["steps"]}
    assert "sees 0 CUDA devices" in by_name["verify torch fp32"]
    assert by_name["run"] == "no backend serves this device"


def test_a_report_that_exists_and_a_wrong_device_are_one_line(bert: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "report").mkdir()
    for out, device, told in (("report", "cpu", "is there already"), ("other", "tpu:0", "say cpu, cuda:N or npu:N")):
        arguments = ["accept", str(bert), "--device", device, "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["nermill-build", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2
        assert told in line
    assert not (tmp_path / "other").exists()
