"""A device's acceptance: everything that a worker needs of it, done on it once, and one report of what came of it.

    nermill-build accept CHECKPOINT --device npu:0 --out REPORT

Every step runs in a process of its own, so that a device that hangs or takes its process with it costs that step.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from nermill.worker.contracts.command import python_command
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.processor import processor_flags, processor_name, usable_cores

# What the public recipe reports for BERT-large-NER on one 310P3: rows of 512 tokens, one a batch, in a second.
RECIPE = {"torch_aie": 39.69, "om": 63.31}
CANDIDATES = {
    "cpu": (
        ("onnx", "fp32"),
        ("onnx", "int8"),
        ("openvino", "fp32"),
        ("openvino", "bf16"),
        ("openvino", "int8"),
        ("torch", "fp32"),
        ("torch", "bf16"),
        ("torch", "int8"),
    ),
    "cuda": (("torch", "fp32"), ("torch", "fp16"), ("torch", "bf16"), ("onnx", "fp32"), ("onnx", "fp16")),
    "npu": (("om", "fp16"), ("aie", "fp16"), ("onnx", "fp16"), ("torch", "fp16")),
}
# words of the refusals that say that a backend is not installed, or that this processor does not have what it takes
ABSENT = ("not installed", "this onnxruntime has no ", "needs atc, which", "computes no bf16", "has no token types")
PACKAGES = ("torch", "torch-npu", "onnxruntime", "onnxruntime-gpu", "onnxruntime-cann", "openvino", "mindietorch")
TOOLS = {"npu": ("npu-smi", "info"), "cuda": ("nvidia-smi",)}
STEP_SECONDS = 3600.0
HANG_SECONDS = 10.0  # of a call, after which a worker replaces its process; longer where the device is slower:
HANG_CALLS = 20  # as long as so many calls of the slowest shape
MOST_TOKENS = {"cpu": 1 << 15}  # of one batch, where memory is not asked for more
COPIES = 12  # of the bundled sample's documents, in the run from end to end

State = Literal["passed", "failed", "skipped"]


@dataclass
class Step:
    """What was tried and what came of it.

    Attributes:
        name: What was tried.
        state: What came of it; ``skipped`` where this machine or device does not offer it.
        seconds: How long it took.
        detail: One line for a person.
        figures: For a program.
    """

    name: str
    state: State
    seconds: float
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


def accept(checkpoint: str, device: str, on_step: Callable[[Step], None]) -> dict[str, Any]:
    """Tries a device with a checkpoint, and tells of each step as it ends.

    Returns:
        The report: ``passed``, ``device``, ``checkpoint``, ``machine``, ``recipe``, ``steps``.

    Raises:
        UsageError: there is no such kind of device.
    """
    kind = device.partition(":")[0]
    if kind not in CANDIDATES:
        raise UsageError(f"--device {device}: say cpu, cuda:N or npu:N")
    steps: list[Step] = []

    def done(step: Step) -> Step:
        steps.append(step)
        on_step(step)
        return step

    done(_runtime(kind))
    with tempfile.TemporaryDirectory(prefix="nermill-accept-") as name:
        folder = Path(name)

        def tried(backend: str, precision: str, layout: str = "") -> tuple[dict[str, Any], Path]:
            """What ``bench`` says of an artifact that was compiled and verified; empty where it does not serve."""
            artifact = folder / "-".join([backend, precision, *([layout] if layout else [])])
            if done(_compile(checkpoint, artifact, backend, precision, layout)).state != "passed":
                return {}, artifact
            verified = done(_verify(artifact, device))
            if not verified.figures:  # it does not load, and bench would say the same
                return {}, artifact
            measured = done(_bench(artifact, device)).figures
            return (measured if verified.state == "passed" else {}), artifact

        serving = [
            made for made in (tried(*candidate) for candidate in CANDIDATES[kind]) if "tokens_per_second" in made[0]
        ]
        if not serving:
            done(Step("run", "failed", 0.0, "no backend serves this device"))
        else:
            best, artifact = max(serving, key=lambda made: float(made[0]["tokens_per_second"]))
            plain, _ = tried(best["backend"], best["precision"], "plain")
            if "tokens_per_second" in plain:
                done(_layouts(best, plain))
            done(_memory(artifact, device))
            slowest = best["at_once"] * max(shape["seconds"] for shape in best["shapes"] if "seconds" in shape)
            for step in _runs(artifact, device, folder, max(HANG_SECONDS, HANG_CALLS * slowest)):
                done(step)
    return {
        "passed": all(step.state != "failed" for step in steps),
        "device": device,
        "checkpoint": checkpoint,
        "machine": {
            "processor": processor_name(),
            "cores": usable_cores(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "recipe": {"source": "Ascend/ModelZoo-PyTorch, BERT-large-NER, one 310P3, rows of 512", **RECIPE},
        "steps": [vars(step) for step in steps],
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes ``report.json`` and ``report.html`` into a folder."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("nermill.model_build").joinpath("acceptance.html.jinja").read_text("utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "report.html").write_text(environment.from_string(template).render(report=report), "utf-8")


def _runtime(kind: str) -> Step:
    begun = time.monotonic()
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    figures: dict[str, Any] = {"packages": installed, "flags": sorted(processor_flags())}
    told = ", ".join(f"{name} {number}" for name, number in installed.items())
    tool = TOOLS.get(kind)
    if tool is not None:
        if shutil.which(tool[0]) is None:
            return Step("runtime", "failed", 0.0, f"{tool[0]} is not here: no driver; {told}", figures)
        answer = _call(tool, 60.0)
        figures["driver"] = answer.output
        if answer.code:
            return Step("runtime", "failed", time.monotonic() - begun, f"{tool[0]}: {answer.last_line}", figures)
    return Step("runtime", "passed", time.monotonic() - begun, told, figures)


def _compile(checkpoint: str, artifact: Path, backend: str, precision: str, layout: str) -> Step:
    options = ["--backend", backend, "--precision", precision, *(["--layout", layout] if layout else [])]
    name, answer = _ask("compile", artifact, checkpoint, *options, "--out", str(artifact))
    if answer.code == 0:
        size = answer.body["bytes"]
        return Step(name, "passed", answer.seconds, f"{size / 1e6:,.1f} MB", {"bytes": size})
    return _refused(name, answer)


def _verify(artifact: Path, device: str) -> Step:
    name, answer = _ask("verify", artifact, str(artifact), "--device", device)
    if not answer.body:
        return _refused(name, answer)
    checks = answer.body["checks"]
    wrong = [check["name"] for check in checks if not check["passed"]]
    detail = f"beyond tolerance: {', '.join(wrong)}" if wrong else f"{len(checks)} checks"
    return Step(name, "failed" if wrong else "passed", answer.seconds, detail, {"checks": checks})


def _bench(artifact: Path, device: str) -> Step:
    name, answer = _ask("bench", artifact, str(artifact), "--device", device)
    if not answer.body:
        return _refused(name, answer)
    measured = [shape for shape in answer.body["shapes"] if "seconds" in shape]
    if not measured:
        return Step(name, "failed", answer.seconds, "the device refuses every shape", answer.body)
    best = max(measured, key=lambda shape: float(shape["tokens_per_second"]))
    longest = max(measured, key=lambda shape: int(shape["length"]))
    detail = (
        f"{best['tokens_per_second']:,.0f} tokens/s in {best['rows']}x{best['length']}; "
        f"rows of {longest['length']}: {longest['documents_per_second']:,.1f}/s"
    )
    refused = [f"{shape['rows']}x{shape['length']}" for shape in answer.body["shapes"] if "refused" in shape]
    detail += f"; refused: {', '.join(refused)}" if refused else ""
    figures = {**answer.body, "tokens_per_second": best["tokens_per_second"]}
    return Step(name, "failed" if refused else "passed", answer.seconds, detail, figures)


def _ask(command: str, artifact: Path, *arguments: str) -> tuple[str, _Answer]:
    """What the step is called, and what ``nermill-build COMMAND ARGUMENTS --json`` answers."""
    line = python_command("nermill.model_build.cli", command, *arguments, "--json")
    return f"{command} {artifact.name.replace('-', ' ')}", _call(line, STEP_SECONDS)


def _refused(name: str, answer: _Answer) -> Step:
    absent = any(words in answer.last_line for words in ABSENT)
    return Step(name, "skipped" if absent else "failed", answer.seconds, answer.last_line)


def _layouts(best: dict[str, Any], plain: dict[str, Any]) -> Step:
    """The sample in three ways, by what was measured of each layout's graph."""
    layout = best["layout"]  # packed or equal, and what its way of filling rows is called
    ways = {"padded": plain["ways"]["padded"], "bucketed": plain["ways"]["bucketed"], layout: best["ways"][layout]}
    told = ", ".join(f"{way} {about['documents_per_second']:,.1f}" for way, about in ways.items())
    faster = "plain" if ways["bucketed"]["device_seconds"] < ways[layout]["device_seconds"] else layout
    detail = f"{best['documents']} documents, computed from these times, in a second: {told}; build --layout {faster}"
    return Step("layouts", "passed", 0.0, detail, {"compared": ways})


def _memory(artifact: Path, device: str) -> Step:
    answer = _call(python_command("nermill.model_build.accept", str(artifact), device), STEP_SECONDS)
    if not answer.body:
        return Step("memory", "failed", answer.seconds, answer.last_line)
    return Step("memory", answer.body["state"], answer.seconds, answer.body["detail"], answer.body)


def exhaust(artifact: Path, device: str) -> dict[str, Any]:
    """Gives a device batches of twice the size until it refuses one, then looks whether it still answers right."""
    from nermill.worker.contracts.errors import EngineError
    from nermill.worker.engine import load_engine
    from nermill.worker.engine.golden import golden_difference, load_golden
    from nermill.worker.engine.warmup import blank_batch

    engine = load_engine(artifact, device)
    manifest = engine.manifest
    if manifest.shapes:
        engine.close()
        return {"state": "skipped", "detail": "its shapes are compiled: no batch is larger than those of bench"}
    length, most, refusal = manifest.max_length, MOST_TOKENS.get(device, 1 << 22), ""
    rows = max(1, manifest.token_budget // length)
    while rows * length < most and not refusal:
        rows *= 2
        try:
            engine.run(blank_batch((rows, length), manifest))
        except EngineError as error:
            refusal = str(error)
    difference = golden_difference(engine, load_golden(artifact))
    engine.close()
    said = f"refuses {rows}x{length} ({refusal})" if refusal else f"takes {rows}x{length}"
    right = difference <= manifest.tolerance
    return {
        "state": "passed" if right else "failed",
        "detail": f"{said}, and answers {'as before' if right else f'{difference:.3g} off the golden logits'} after it",
        "rows": rows,
        "length": length,
        "refusal": refusal or None,
        "difference": difference,
    }


def _runs(artifact: Path, device: str, folder: Path, hang_seconds: float) -> list[Step]:
    """The whole worker: undisturbed, with its process killed, and with its process stopped as by a device that hangs.

    All three give the same table.
    """
    corpus = folder / "sample.jsonl"
    sample = Path(__file__).parent / "demo" / "sample" / "wikigold.jsonl"
    texts = [json.loads(line)["text"] for line in sample.read_text("utf-8").splitlines()] * COPIES
    corpus.write_text("".join(json.dumps({"id": str(n), "text": t}) + "\n" for n, t in enumerate(texts)), "utf-8")
    steps: list[Step] = []
    tables: list[Any] = []
    for name, signal_ in (("run", None), ("lost process", signal.SIGKILL), ("hung call", signal.SIGSTOP)):
        out = folder / name.replace(" ", "-")
        options = ("--model", str(artifact), "--devices", device, "--out", str(out), "--shard-documents", "8")
        command = python_command("nermill.producer.cli", "run", str(corpus), *options, "--json")
        hits: list[int] = []
        watch = partial(_disturb, out=out, signal_=signal_, hits=hits)
        answer = _call(command, STEP_SECONDS, watch, hang_seconds)
        if answer.code or answer.body.get("state") != "complete":
            steps.append(Step(name, "failed", answer.seconds, answer.last_line))
            continue
        tables.append(_table(answer.body["run"]))
        rate = answer.body["documents_per_second"]
        if signal_ is not None and not hits:
            steps.append(Step(name, "skipped", answer.seconds, "the run ended before its process could be reached"))
        elif tables[-1] != tables[0]:
            steps.append(Step(name, "failed", answer.seconds, "the table differs from that of the undisturbed run"))
        else:
            told = f"{artifact.name}: {len(texts)} documents, {rate:,.1f} a second"
            told += "" if signal_ is None else f", the same table; {signal_.name} to process {hits[0]} on the way"
            steps.append(Step(name, "passed", answer.seconds, told, answer.body))
    return steps


def _table(run: str) -> list[tuple[Any, ...]]:
    from pyarrow import parquet

    rows = [row for part in sorted(Path(run).glob("part-*.parquet")) for row in parquet.read_table(part).to_pylist()]
    return [(r["doc_id"], r["status"], [(e["start"], e["end"], e["label"]) for e in r["entities"]]) for r in rows]


def _disturb(run: int, out: Path, signal_: signal.Signals | None, hits: list[int]) -> None:
    """Sends a signal, once, to the process that holds the device, when the run has its first part."""
    if signal_ is None or hits or not any(out.glob("run=*/part-*.parquet")):
        return
    for supervisor in _children(run):
        try:
            command = Path(f"/proc/{supervisor}/cmdline").read_text("utf-8")
        except OSError:
            continue
        if "nermill.worker.process.launch" in command:
            for process in _children(supervisor)[:1]:
                os.kill(process, signal_)
                hits.append(process)


def _children(process: int) -> list[int]:
    """Processes that a process has started, whichever of its threads did."""
    found: list[int] = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, listed.read_text("utf-8").split())
        except OSError:
            continue
    return found


@dataclass(frozen=True)
class _Answer:
    code: int
    seconds: float
    output: str
    body: dict[str, Any]
    last_line: str


def _call(
    command: Sequence[str],
    limit: float,
    watch: Callable[[int], None] | None = None,
    hang_seconds: float = HANG_SECONDS,
) -> _Answer:
    """Runs a command for at most ``limit`` seconds; ``watch`` is called with its process id now and then."""
    begun = time.monotonic()
    environment = {**os.environ, "NERMILL_HANG_SECONDS": str(hang_seconds), "NERMILL_LEASE_SECONDS": "5"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        ) as process:
            while process.poll() is None and time.monotonic() - begun < limit:
                if watch is not None:
                    watch(process.pid)
                time.sleep(0.02)
            is_late = process.poll() is None
            if is_late:
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.monotonic() - begun
        out.seek(0)
        err.seek(0)
        output, lines = out.read(), err.read().strip().splitlines()
    said = lines[-1].partition(": ")[2] or lines[-1] if lines else f"exit code {process.returncode}"
    last = f"no answer in {limit:g} s" if is_late else said
    try:
        body = json.loads(output)
    except ValueError:
        body = {}
    return _Answer(process.returncode, round(seconds, 3), output, body if isinstance(body, dict) else {}, last)


if __name__ == "__main__":
    print(json.dumps(exhaust(Path(sys.argv[1]), sys.argv[2])))
