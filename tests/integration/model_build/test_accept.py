"""The acceptance kit whole: on the CPU, against the doubles of CANN, and on a device that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from nermill.model_build import accept as kit
from nermill.model_build import cli
from tests.doubles import cann

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
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


def test_the_cpu_passes_whole(accept) -> None:
    code, report = accept("cpu", ("onnx", "int8"), ("torch", "fp32"))
    assert (code, report["passed"]) == (0, True), [s for s in report["steps"] if s["state"] == "failed"]
    of_a_backend = ["compile", "verify", "bench"]
    names = [f"{step} {model}" for model in ("onnx int8", "torch fp32") for step in of_a_backend]
    assert list(states(report)) == ["runtime", *names, "memory", *DISTURBED]
    assert set(states(report).values()) == {"passed"}
    by_name = {step["name"]: step for step in report["steps"]}
    assert "answers as before after it" in by_name["memory"]["detail"]
    assert "SIGKILL to process" in by_name["lost process"]["detail"]
    assert "SIGSTOP to process" in by_name["hung call"]["detail"]
    assert all(by_name[name]["figures"]["documents"]["ok"] > 100 for name in DISTURBED)


def test_an_npu_of_the_doubles_passes(accept, tmp_path: Path, monkeypatch) -> None:
    variables = cann.install(monkeypatch, tmp_path / "cann")
    driver = Path(variables["ASCEND_TOOLKIT_HOME"]) / "bin" / "npu-smi"
    driver.write_text("#!/bin/sh\necho '| 0  310P3 | OK |'\n", "utf-8")
    driver.chmod(0o755)
    monkeypatch.setenv("AIS_DOUBLE_VIOLATIONS", str(tmp_path / "violations"))
    code, report = accept("npu:0", ("om", "fp16"))
    assert (code, report["passed"]) == (0, True), [s for s in report["steps"] if s["state"] == "failed"]
    assert report["steps"][0]["figures"]["driver"] == "| 0  310P3 | OK |\n"
    assert states(report)["memory"] == "skipped"
    assert not (tmp_path / "violations").exists()


def test_a_device_that_is_not_there_fails_in_the_report(accept) -> None:
    code, report = accept("cuda:0", ("torch", "fp32"))
    assert (code, report["passed"]) == (4, False)
    assert states(report) == {
        "runtime": "failed",
        "compile torch fp32": "passed",
        "verify torch fp32": "failed",
        "bench torch fp32": "failed",
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
