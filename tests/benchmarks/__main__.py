"""``python -m tests.benchmarks``: everything side by side in one run; ``BENCH=quick`` takes about five minutes.

``BENCH_OUT`` names the folder for ``bench.json`` and ``bench.svg``. The machine's speed drifts, so what is worth
reading are the ratios: each is the median over rounds in which its two sides ran right after each other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from nermill.worker.contracts.manifest import resolve_artifact
from tests.benchmarks import host, report
from tests.benchmarks.corpora import SAMPLE, default_data, flops_of, read_corpora
from tests.benchmarks.peers import PEERS, make_graphs, missing
from tests.benchmarks.side_by_side import WAYS, possible, say, side_by_side
from tests.benchmarks.ways import Models

WHOLE = 3250  # sentences whose padding is counted
OTHER_CORPORA = (  # the ways that long documents and the mix go
    "pipeline-32", "mill openvino", "openvino sorted", "onnxruntime sorted", "tagger", "mill", "engine",
)  # fmt: skip
MILLS = ("mill", "mill openvino")
BY_HAND = ("onnxruntime sorted", "openvino sorted")  # the same model in the same precision


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        documents: Sentences for the fastest ways.
        rounds: Measurements of each way on sentences; medians are taken over them.
        host_documents: Sentences for the null engine.
        paced_seconds: How long each simulated device is kept busy.
        host_rounds: Measurements with the null engine and the simulated devices.
        other_rounds: Measurements of each way on the other corpora, by the corpus' name.
    """

    documents: int
    rounds: int
    host_documents: int
    paced_seconds: float
    host_rounds: int
    other_rounds: dict[str, int]


SIZES = {
    "full": Size(3250, 5, 30_000, 20.0, 5, {"long": 3, "mix": 1}),
    "quick": Size(1000, 3, 30_000, 8.0, 1, {"long": 1}),
    "smoke": Size(40, 1, 400, 0.2, 1, {}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run that shows only that everything works")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=[way for way in WAYS if way != "peak"],
        metavar="WAY",
        help="these alone, on sentences and long documents: a table",
    )
    parser.add_argument("--documents", type=int, help="sentences for the fastest ways; default: 3,250, quick 1,000")
    parser.add_argument("--data", type=Path, default=default_data(), help="CoNLL file; default %(default)s")
    options = parser.parse_args(arguments)
    name = "smoke" if options.smoke else os.environ.get("BENCH") or "full"
    if name not in SIZES:
        parser.error(f"BENCH={name}: say quick or full")
    size = SIZES[name] if options.documents is None else replace(SIZES[name], documents=options.documents)
    if options.ways:
        compare_ways(size, options.data, options.ways)
        return
    begun = time.monotonic()
    body = {"size": name, **bench(size, options.data)}
    body["seconds"] = round(time.monotonic() - begun, 1)
    out = Path(os.environ.get("BENCH_OUT") or "out/bench")
    report.write(out, body, body["corpora"]["sentences"])
    for corpus, rows in body["corpora"].items():
        print(f"\n{corpus}\n{report.table(rows)}")
    print(f"\npeak {body['peak_gflops']:.0f} GFLOP/s (fp32 matrix product)")
    for ratio, value in body["ratios"].items():
        print(f"{ratio:22} {value}")
    print(f"\n{out}/bench.json, {out}/bench.svg; {body['seconds']:.0f} s")


def compare_ways(size: Size, data: Path, ways: Sequence[str]) -> None:
    """Prints a table of some ways for each of two corpora, and each way's ratio to the first one of them."""
    corpora = read_corpora(data, size.documents)
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        for kind in ("sentences", "long"):
            samples, peaks = side_by_side(corpora[kind], models, [*possible(ways), "peak"], size.rounds)
            rows = report.summarise(corpora[kind], samples, flops_of(corpora[kind]), median(peaks))
            print(f"\n{kind}\n{report.table(rows)}")
            first, *others = samples
            for way in others:
                print(f"{first} over {way}: {report.over(samples[first], samples[way])}")


def bench(size: Size, data: Path) -> dict[str, Any]:
    """Measures everything; returns the object of ``bench.json`` without the size's name."""
    corpora = read_corpora(data, size.documents)
    sentences = corpora["sentences"]
    say(f"{len(sentences.texts)} sentences of {data.name}; preparing models")
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        samples, peaks = side_by_side(sentences, models, possible(tuple(WAYS)), size.rounds)
        others = [way for way in OTHER_CORPORA if way in samples]
        measured = {"sentences": samples} | {
            kind: side_by_side(corpora[kind], models, others, rounds)[0] for kind, rounds in size.other_rounds.items()
        }
    peak = median(peaks)
    texts = host.repeated(sentences.texts, size.host_documents)
    say("null engine")
    null = host.null_over_tokenizer(texts, size.host_rounds)
    say("simulated devices")
    scaling = host.paced_scaling(texts, size.paced_seconds, size.host_rounds)
    npu = host.paced_310p3(sentences, size.paced_seconds, size.host_rounds)
    whole = read_corpora(data, WHOLE)
    padding = {
        layout: {kind: round(host.padding(corpus, layout), 4) for kind, corpus in whole.items()}
        for layout in ("packed", "plain")
    }
    engine = [
        flops_of(sentences) * s.documents / s.seconds / 1e9 / p
        for s, p in zip(samples["engine fp32"], peaks, strict=True)
    ]
    return {
        "data": data.name,
        "cores": len(os.sched_getaffinity(0)),
        "peak_gflops": round(peak, 2),
        "ratios": {
            "mill_over_engine": report.over(samples["mill"], samples["engine"]),
            "best_mill_over_best_peer": {kind: best_over(taken, MILLS, BY_HAND) for kind, taken in measured.items()},
            "best_mill_over_pipeline": best_over(samples, MILLS, ["pipeline-32"]),
            "mill_over_peer": over_peers(samples),
            "equal_over_packed": report.over(samples["engine"], samples["engine, packed"]),
            "packed_over_bucketed": report.over(samples["engine, packed"], samples["engine, nearest bucket"]),
            "packed_over_512": report.over(samples["engine, packed"], samples["engine, rows of 512"]),
            "mill_over_pipeline": report.over(samples["mill"], samples["pipeline-32"]),
            "mill_over_recipe": report.over(samples["mill"], samples["recipe"]),
            "mill_fp32_over_engine_fp32": report.over(samples["mill fp32"], samples["engine fp32"]),
            "mill_fp32_over_pipeline": report.over(samples["mill fp32"], samples["pipeline-32"]),
            "mill_fp32_over_recipe": report.over(samples["mill fp32"], samples["recipe"]),
            "engine_over_peak": round(median(engine), 4),
            "null_over_tokenizer": round(median(entry["ratio"] for entry in null), 4),
            "paced_scaling": {str(n): round(median(reached), 4) for n, reached in scaling.items()},
            "paced_310p3_busy": round(median(npu["busy"]), 4),
            "paced_310p3_of_ideal": round(median(npu["of_ideal"]), 4),
            "padding_share": {"packed": max(padding["packed"].values()), "sorted": max(padding["plain"].values())},
        },
        "corpora": {
            kind: report.summarise(corpora[kind], taken, flops_of(corpora[kind]), peak)
            for kind, taken in measured.items()
        },
        "null_engine": null,
        "paced_310p3": npu,
        "padding_share": {"packed": padding["packed"], "sorted": padding["plain"]},
    }


def over_peers(samples: report.Samples) -> dict[str, float]:
    """The mill over each peer: the one with the peer's own library where there is one, else the faster one."""
    mills = {"onnxruntime sorted": "mill", "openvino sorted": "mill openvino"}
    return {
        peer: best_over(samples, [mills[peer]] if peer in mills else MILLS, [peer]) for peer in PEERS if peer in samples
    }


def best_over(samples: report.Samples, ones: Sequence[str], others: Sequence[str]) -> float:
    """The fastest of some ways over the fastest of others, of those that were measured."""
    mine, theirs = ([samples[way] for way in side if way in samples] for side in (ones, others))
    return report.over_best(mine, theirs)


def make_models(folder: Path) -> Models:
    """Takes the shipped model's checkpoint back from it and compiles that for the ways that are possible."""
    from nermill.model_build.demo.recover import recover

    checkpoint = folder / "checkpoint"
    recover(checkpoint)
    compile_(checkpoint, folder / "fp32", "--backend", "torch")
    int8 = ("--precision", "int8", "--calibrate", str(SAMPLE))
    compile_(checkpoint, folder / "packed", "--backend", "onnx", "--layout", "packed", *int8)
    openvino = None
    if missing("openvino sorted") is None:
        openvino = folder / "openvino"
        compile_(checkpoint, openvino, "--backend", "openvino", *int8)
    make_graphs(checkpoint, folder / "peers")
    return Models(resolve_artifact("demo"), folder / "packed", folder / "fp32", checkpoint, openvino, folder / "peers")


def compile_(checkpoint: Path, out: Path, *options: str) -> None:
    """``nermill-build compile``."""
    command = [sys.executable, "-m", "nermill.model_build.cli", "compile", str(checkpoint), "--out", str(out), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
