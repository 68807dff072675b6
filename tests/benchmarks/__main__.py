"""``python -m tests.benchmarks``: everything side by side in one run; ``BENCH=quick`` takes under five minutes.

``BENCH_OUT`` names the folder for ``bench.json`` and ``bench.svg``. The machine's speed drifts, so what is worth
reading are the ratios: each is the median over rounds in which its two sides ran right after each other.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nermill.worker.contracts.manifest import load_manifest, resolve_artifact
from nermill.worker.engine.encoder import Architecture
from tests.benchmarks import host, report
from tests.benchmarks.corpora import Corpus, default_data, read_corpora, spread
from tests.benchmarks.ways import WAYS, Models, Sample, make_models, prepared

SLOW = {"recipe": 80, "pipeline-1": 16, "pipeline-32": 8, "celery task": 16}  # these tag one in so many documents
WHOLE = 3250  # sentences whose padding is counted
OTHER_CORPORA = ("pipeline-32", "engine", "tagger", "mill")  # the ways that long documents and the mix go


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        documents: Sentences for the fastest ways.
        rounds: Measurements of each way on sentences; medians are taken over them.
        host_documents: Sentences for the null engine.
        paced_seconds: How long each simulated device is kept busy.
        host_rounds: Measurements with the null engine and the simulated devices.
    """

    documents: int
    rounds: int
    host_documents: int
    paced_seconds: float
    host_rounds: int


SIZES = {
    "full": Size(3250, 5, 30_000, 20.0, 5),
    "quick": Size(1000, 3, 30_000, 8.0, 1),
    "smoke": Size(40, 1, 400, 0.2, 1),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run that shows only that everything works")
    parser.add_argument("--data", type=Path, default=default_data(), help="CoNLL file; default %(default)s")
    options = parser.parse_args(arguments)
    name = "smoke" if options.smoke else os.environ.get("BENCH") or "full"
    if name not in SIZES:
        parser.error(f"BENCH={name}: say quick or full")
    begun = time.monotonic()
    body = bench(name, options.data)
    body["seconds"] = round(time.monotonic() - begun, 1)
    out = Path(os.environ.get("BENCH_OUT") or "out/bench")
    report.write(out, body, body["corpora"]["sentences"])
    for corpus, rows in body["corpora"].items():
        print(f"\n{corpus}\n{report.table(rows)}")
    print(f"\npeak {body['peak_gflops']:.0f} GFLOP/s (fp32 matrix product)")
    for ratio, value in body["ratios"].items():
        print(f"{ratio:22} {value}")
    print(f"\n{out}/bench.json, {out}/bench.svg; {body['seconds']:.0f} s")


def bench(name: str, data: Path) -> dict[str, Any]:
    """Measures everything; returns the object of ``bench.json``."""
    size = SIZES[name]
    corpora = read_corpora(data, size.documents)
    sentences = corpora["sentences"]
    say(f"{len(sentences.texts)} sentences of {data.name}; preparing models")
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        samples, peaks = side_by_side(sentences, models, tuple(WAYS), size.rounds)
        others = {
            kind: side_by_side(corpora[kind], models, OTHER_CORPORA, 1)[0] for kind in ("long", "mix") if name == "full"
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
        "size": name,
        "data": data.name,
        "cores": len(os.sched_getaffinity(0)),
        "peak_gflops": round(peak, 2),
        "ratios": {
            "mill_over_engine": report.over(samples["mill"], samples["engine"]),
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
            for kind, taken in ({"sentences": samples} | others).items()
        },
        "null_engine": null,
        "paced_310p3": npu,
        "padding_share": {"packed": padding["packed"], "sorted": padding["plain"]},
    }


def side_by_side(
    corpus: Corpus, models: Models, ways: Sequence[str], rounds: int
) -> tuple[dict[str, list[Sample]], list[float]]:
    """Every way in every round, one after another; the samples by way, and the peaks in GFLOP/s."""
    with ExitStack() as stack:
        measures = {}
        for way in ways:
            say(f"{corpus.name}: preparing {way}")
            texts = spread(corpus.texts, max(2, len(corpus.texts) // SLOW.get(way, 1)))
            measures[way] = stack.enter_context(prepared(way, texts, models))
        taken: dict[str, list[Any]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, measure in measures.items():
                say(f"{corpus.name}: round {number + 1} of {rounds}, {way}")
                taken[way].append(measure())
    peaks = taken.pop("peak", [])
    return taken, peaks


def flops_of(corpus: Corpus, artifact: Path | None = None) -> float:
    """Floating-point operations that one document needs (of the demo model), in matrix products, without padding."""
    sizes = Architecture(**load_manifest(artifact or resolve_artifact("demo")).details["architecture"])
    return float(sum(length * sizes.flops_of_token(length) for length in corpus.lengths.tolist())) / len(corpus.texts)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
