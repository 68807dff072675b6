"""``python -m tests.benchmarks.cpu``: CPU engines side by side in one model, in useful GFLOP/s and in F1.

Each round runs ``nermill-build bench`` on every artifact in turn, in full rows of 64, 128 and 512 tokens, 1,024 tokens
a batch. Peaks are the fastest matrix products in fp32 and in int8 of all engines in the same round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from seqeval.metrics import f1_score

from nermill.model_build.bench import bench
from nermill.model_build.corpus import read_texts
from nermill.worker import Tagger
from tests.benchmarks.corpora import CONLL, SAMPLE, default_data

LENGTHS = (64, 128, 512)
BASE = "onnx int8 packed"  # with a scale a token: what was shipped until layout equal
ENGINES = (
    BASE,
    "onnx int8",
    "openvino int8",
    "openvino bf16",
    "openvino fp32",
    "torch bf16",
    "torch int8",
    "torch fp32",
    "onnx fp32",
)
WIKIGOLD = CONLL.parents[1] / "wikigold" / "wikigold.conll.txt"
TRAIN = CONLL.with_name("train.txt")

Body = Mapping[str, Any]  # of ``nermill-build bench --json``


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; engines that cannot run here are named with the reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face folder; default: the demo model's")
    parser.add_argument("--large", action="store_true", help="a model of BERT-large's size with random weights, no F1")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES, metavar="ENGINE", help="of all: "
                        + ", ".join(ENGINES))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=LENGTHS,
        help="of rows, of those that bench measures; default %(default)s",
    )
    gold = [path for path in (default_data(), WIKIGOLD) if path.exists()]
    parser.add_argument("--gold", nargs="*", type=Path, default=gold, help="CoNLL files for F1; default %(default)s")
    calibrate = TRAIN if TRAIN.exists() else SAMPLE
    parser.add_argument(
        "--calibrate", type=Path, default=calibrate, help="for int8 of onnx and openvino; default %(default)s"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or _checkpoint(Path(folder), options.large)
        artifacts = _compiled(checkpoint, Path(folder), options.engines, options.calibrate)
        if not artifacts:
            raise SystemExit("no engine can be measured here; the lines above say why")
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append({n: bench(art, repeats=1) for n, art in artifacts.items()})
        scores = {
            n: [_f1(art, path) for path in ([] if options.large else options.gold)] for n, art in artifacts.items()
        }
    print(_table(rounds, options.lengths, scores, [path.name for path in options.gold]))


def _checkpoint(folder: Path, large: bool) -> Path:
    if large:
        from tests.benchmarks.large import write

        return write(folder)[0]
    from nermill.model_build.demo.recover import recover

    recover(folder / "checkpoint")
    return folder / "checkpoint"


def _compiled(checkpoint: Path, folder: Path, engines: Sequence[str], calibrate: Path) -> dict[str, Path]:
    """An artifact for each engine that this machine can build and run."""
    made = {}
    for name in engines:
        backend, precision, *layout = name.split()
        out = folder / name.replace(" ", "-")
        command = [sys.executable, "-m", "nermill.model_build.cli", "compile", str(checkpoint), "--out", str(out)]
        command += ["--backend", backend, "--precision", precision]
        command += ["--layout", *layout] if layout else []
        command += ["--calibrate", str(calibrate)] if name in ("onnx int8", "openvino int8") else []
        print(f"compiling {name}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            made[name] = out
        elif done.returncode == 2:  # one line: what is missing
            print(f"{name}: not measured: {done.stderr.strip()}")
        else:
            raise SystemExit(f"{name}: {done.stderr}")
    return made


def _f1(artifact: Path, path: Path) -> float:
    texts = read_texts([str(path)])
    with Tagger.load(artifact) as tagger:
        said = [list(found.tags or ()) for found in tagger.tag([tuple(text.content) for text in texts])]
    return float(f1_score([list(text.gold) for text in texts], said))


def _table(
    rounds: Sequence[Mapping[str, Body]],
    lengths: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    gold: Sequence[str],
) -> str:
    """A row an engine, a cell a length: GFLOP/s, its share of the peaks, its speed over what is shipped."""
    peaks = {kind: [_peak(bodies, kind) for bodies in rounds] for kind in ("fp32", "int8")}
    peaks = {kind: taken for kind, taken in peaks.items() if all(taken)}
    heads = ["engine", *(f"rows of {length}" for length in lengths), *(f"F1 {name}" for name in gold)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in rounds[0]:
        cells = [name]
        for length in lengths:
            speed = [_gflops(bodies[name], length) for bodies in rounds]
            said = [f"{median(speed):.0f} GFLOP/s"]
            said += [f"{_ratio(speed, taken):.2f} {kind}" for kind, taken in peaks.items()]
            if BASE in rounds[0]:
                said.append(f"{_ratio(speed, [_gflops(bodies[BASE], length) for bodies in rounds]):.2f} ×")
            cells.append(", ".join(said))
        cells += [f"{score:.4f}" for score in scores[name]] or [""] * len(gold)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\npeak in {kind}: {median(taken):.0f} GFLOP/s" for kind, taken in peaks.items()]
    return "\n".join([*lines, f"\nMedians of {len(rounds)} rounds; shares and × within each round, × over {BASE}."])


def _gflops(body: Body, length: int) -> float:
    return next(float(shape["gflops"]) for shape in body["shapes"] if shape["length"] == length)


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return median(one / other for one, other in zip(ones, others, strict=True))


def _peak(bodies: Mapping[str, Body], precision: str) -> float:
    return max((body["peak_gflops"] for body in bodies.values() if body["precision"] == precision), default=0.0)


if __name__ == "__main__":
    main()
