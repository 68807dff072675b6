"""All ways on one corpus, in turn: each is a process of its own, idle between two measurements."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tests.benchmarks.corpora import Corpus, spread
from tests.benchmarks.peers import PEERS, missing
from tests.benchmarks.ways import (
    BUCKETS,
    Measure,
    Models,
    Sample,
    Way,
    engine,
    mill,
    padded,
    peak,
    pipeline,
    recipe,
    tagger,
    task_per_document,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

WAYS: dict[str, Way] = {  # neighbours here are neighbours in time: those whose ratio is of interest
    "recipe": recipe,
    "pipeline-1": pipeline(1),
    "celery task": task_per_document,
    "spacy": PEERS["spacy"].way,
    "ray data": PEERS["ray data"].way,
    "pipeline-32": pipeline(32),
    "mill openvino": mill("openvino"),
    "openvino sorted": PEERS["openvino sorted"].way,
    "engine openvino": engine("openvino"),
    "onnxruntime sorted": PEERS["onnxruntime sorted"].way,
    "tagger": tagger,
    "mill": mill("shipped"),
    "engine": engine("shipped"),
    "engine, packed": engine("packed"),
    "engine, nearest bucket": engine("packed", padded(*BUCKETS)),
    "engine, rows of 512": engine("packed", padded(512)),
    "peak": peak,
    "engine fp32": engine("fp32"),
    "mill fp32": mill("fp32"),
}
NEEDS = {"mill openvino": "openvino sorted", "engine openvino": "openvino sorted"}  # the packages of that peer
SLOW = {  # these tag one in so many documents
    "recipe": 80,
    "pipeline-1": 16,
    "celery task": 16,
    "pipeline-32": 8,
    "ray data": 8,
    "engine, rows of 512": 16,
}


def possible(ways: Sequence[str]) -> list[str]:
    """The ways whose packages are installed; says what the others need."""
    found = []
    for way in ways:
        peer = NEEDS.get(way, way)
        needed = missing(peer) if peer in PEERS else None
        if needed is None:
            found.append(way)
        elif peer == way:
            say(f"{way}: {needed}")
    return found


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


@contextmanager
def prepared(name: str, texts: Sequence[str], models: Models) -> Iterator[Measure]:
    """A way in a process of its own, idle between two measurements."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, name, texts, models))
    process.start()
    there.close()
    try:
        here.recv()

        def measure() -> Any:
            here.send(None)
            return here.recv()

        yield measure
    except EOFError:
        raise SystemExit(f"the way {name!r} failed; its own words are above") from None
    finally:
        here.close()
        process.join()


def _serve(connection: Connection, name: str, texts: Sequence[str], models: Models) -> None:
    with ExitStack() as stack, suppress(EOFError):  # the end of the other side's questions
        measure = WAYS[name](texts, models, stack)
        connection.send("ready")
        while True:
            connection.recv()
            connection.send(measure())


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
