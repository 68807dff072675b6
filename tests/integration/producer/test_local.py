"""``nermill run``: a run with the bundled model, and its messages when the worker fails."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nermill.worker.contracts.manifest import load_manifest, resolve_artifact

pytest.importorskip("onnxruntime")

COMMAND = [sys.executable, "-m", "nermill.producer.cli", "run"]


def children_of(pid: int) -> set[int]:
    """All living descendants of a process."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found, front = set(), {pid}
    while front := {child for child, parent in parents.items() if parent in front}:
        found |= front
    return found


def wait_until_gone(pids: set[int], seconds: float = 15.0) -> set[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pids = {pid for pid in pids if Path(f"/proc/{pid}").exists() and _is_alive(pid)}
        if not pids:
            break
        time.sleep(0.1)
    return pids


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def on_a_terminal(command: list[str]) -> tuple[int, str, str]:
    """Runs a command whose standard error is a terminal; answers (exit code, standard output, standard error)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = bytearray()
        with suppress(OSError):  # its last user is gone
            while block := os.read(ours, 4096):
                shown += block
        os.close(ours)
        out, _ = process.communicate(timeout=100)
    return process.returncode, out, shown.decode(errors="replace")


@pytest.mark.slow
def test_run_tags_scores_and_leaves_no_process(tmp_path, sample):
    sentences = [s for s in (sample / "wikigold.conll").read_text().split("\n\n") if not s.startswith("-DOCSTART-")]
    corpus = tmp_path / "in.conll"
    corpus.write_text("\n\n".join(sentences[:12]))
    code, out, shown = on_a_terminal(
        [*COMMAND, str(corpus), "--out", str(tmp_path / "out"), "--devices", "cpu", "--json"]
    )
    assert code == 0, shown
    assert "0 of 1 committed" in shown
    assert "no worker listens" not in shown  # it starts its own
    body = json.loads(out)
    assert (body["state"], body["documents"]) == ("complete", {"total": 12, "ok": 12, "rejected": 0})
    assert body["scores"]["f1"] > 0.3
    assert sorted(os.listdir(body["run"])) == [
        ".huggingface.yaml", "_SUCCESS", "_plan.json", "_report.html", "_report.json", "_shards", "part-00000.parquet",
    ]  # fmt: skip
    again = subprocess.run(
        [*COMMAND, str(corpus), "--out", str(tmp_path / "out"), "--devices", "cpu"], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "read it" in again.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_is_ended_takes_its_children_along(tmp_path, number):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Ada Lovelace met Bob {n}."}) + "\n" for n in range(50_000)))
    process = subprocess.Popen(
        [*COMMAND, str(corpus), "--out", str(tmp_path / "out"), "--devices", "cpu"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(children := children_of(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) >= 4
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 3, err
        assert "To go on: the same command again" in err
    assert wait_until_gone(children, 40.0) == set()


@pytest.mark.slow
def test_an_artifact_that_does_not_load_is_told_with_the_workers_log(tmp_path):
    artifact = tmp_path / "artifact"
    shutil.copytree(resolve_artifact("demo"), artifact)
    (artifact / "model.onnx").write_bytes(b"no model")
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "Ada"}\n')
    command = [*COMMAND, str(corpus), "--out", str(tmp_path / "out"), "--model", str(artifact), "--devices", "cpu"]
    changed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert changed.returncode == 2
    assert "changed since it was built" in changed.stderr
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = hashlib.sha256(b"no model").hexdigest()
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    load_manifest(artifact)
    broken = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert broken.returncode == 1
    assert re.search(r"^nermill: the worker failed: .*model\.onnx.*$", broken.stderr, re.MULTILINE), broken.stderr
    assert "SecurityWarning" not in broken.stderr


@pytest.mark.slow
def test_a_device_that_the_artifact_cannot_use_is_named_in_one_line(tmp_path):
    corpus = tmp_path / "in.jsonl"
    corpus.write_text('{"text": "Ada"}\n')
    command = [*COMMAND, str(corpus), "--out", str(tmp_path / "out"), "--devices", "cuda:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "nermill: the worker failed: minilm-ner-en: its int8 graph runs on a CPU; for cuda:0 compile fp16"
    )
    assert all(line.startswith("nermill: ") for line in done.stderr.splitlines())
