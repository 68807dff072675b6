"""Peers: loops made by hand around the same model in the same precision, and tools for batch inference.

A peer whose packages are not installed is left out; ``missing`` says what to install. ``optimum`` is not among them:
its part for onnxruntime (optimum-onnx 0.1.0) takes no transformers after 4.57; the loop around onnxruntime is the same
thing.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout, suppress
from functools import cache, partial
from importlib.util import find_spec
from io import StringIO
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet as pq
from tokenizers import Encoding, Tokenizer

from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest
from tests.benchmarks.corpora import SAMPLE
from tests.benchmarks.ways import Measure, Models, Sample, Way, hugging_face, timed

LONGEST = 512  # tokens of a window
STRIDE = 64  # tokens that two windows of a long document share
BATCH_TOKENS = 1024  # padding included
CALIBRATION_ROWS = 20  # their number changes no speed
ONNX, OPENVINO = "onnxruntime.onnx", "openvino.xml"
SPACY_MODEL = os.environ.get("BENCH_SPACY", "en_core_web_sm")  # a package or a folder
ENTITY = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("label", pa.string()), ("score", pa.float32())])

Feeds = dict[str, NDArray[np.int64]]
Run = Callable[[Sequence[Feeds]], list[NDArray[np.float32]]]  # padded batches to logits of (rows, length, labels)
Entity = dict[str, Any]


def make_graphs(checkpoint: Path, folder: Path) -> None:
    """Int8 graphs of padded rows as the libraries' own tools make them: the peers' models, in ``folder``."""
    folder.mkdir()
    plain = folder / "plain.onnx"
    command = ["export", str(checkpoint), "--format", "onnx", "--layout", "plain", "--out", str(plain)]
    subprocess.run([sys.executable, "-m", "nermill.model_build.cli", *command], check=True, stdout=subprocess.DEVNULL)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # its advice to preprocess, on the root logger
    quantize_dynamic(plain, folder / ONNX, weight_type=QuantType.QInt8, per_channel=True)
    if missing("openvino sorted") is None:
        _quantize_for_openvino(plain, checkpoint, folder / OPENVINO)
    logging.disable(logging.NOTSET)


def _quantize_for_openvino(plain: Path, checkpoint: Path, target: Path) -> None:
    import openvino

    from nermill.model_build.openvino import import_nncf

    nncf = import_nncf()
    texts = [block for block in SAMPLE.read_text("utf-8").split("\n\n") if block.strip()][:CALIBRATION_ROWS]
    tokenizer = Tokenizer.from_file(str(checkpoint / TOKENIZER_FILE))
    words = [[line.split()[0] for line in text.splitlines()] for text in texts]
    rows = [_feeds([encoding]) for encoding in tokenizer.encode_batch(words, is_pretokenized=True)]
    plain_graph = openvino.Core().read_model(plain)
    with redirect_stdout(StringIO()):  # its progress bars
        graph = nncf.quantize(plain_graph, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(graph, target)


def sorted_loop(load: Callable[[Path], Run]) -> Way:
    """Everything tokenized at once, windows sorted by length, batches of similar length, entities to Parquet."""

    def way(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
        assert models.peers is not None
        tokenizer = Tokenizer.from_file(str(models.checkpoint / TOKENIZER_FILE))
        tokenizer.no_padding()
        tokenizer.enable_truncation(LONGEST, stride=STRIDE)
        run = load(models.peers)
        labels = load_manifest(models.shipped).labels
        target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "entities.parquet"

        def tag() -> None:
            windows = _windows(tokenizer, texts)
            batches = [_feeds(batch) for batch in _batches([window.encoding for window in windows])]
            logits = chain.from_iterable(run(batches))
            found: list[list[Entity]] = [[] for _ in texts]
            for window, answer in zip(windows, logits, strict=True):
                found[window.document] += _entities(window, answer, labels)
            for entities in found:
                entities.sort(key=itemgetter("start"))
            _write(texts, found, target)

        windows = [window.encoding for window in _windows(tokenizer, texts)]
        computed = sum(len(batch) * len(batch[0]) for batch in _batches(windows))
        tag()
        return lambda: timed(tag, len(texts), 1 - sum(map(len, windows)) / computed)

    return way


class _Window(NamedTuple):
    """A row of a batch; ``begin`` to ``end`` are the tokens whose answers count."""

    document: int
    begin: int
    end: int
    encoding: Encoding


def _windows(tokenizer: Tokenizer, texts: Sequence[str]) -> list[_Window]:
    """Windows of all texts, longest first; neighbours take half of what they share."""
    windows = []
    for document, first in enumerate(tokenizer.encode_batch(texts)):
        parts = [first, *first.overflowing]
        for number, part in enumerate(parts):
            begin = 1 + (STRIDE // 2 if number else 0)
            end = len(part) - 1 - (STRIDE // 2 if number < len(parts) - 1 else 0)
            windows.append(_Window(document, begin, end, part))
    return sorted(windows, key=lambda window: -len(window.encoding))


def _batches(rows: Sequence[Encoding]) -> Iterator[Sequence[Encoding]]:
    """Rows in order, longest first, in batches of at most BATCH_TOKENS padded tokens."""
    at = 0
    while at < len(rows):
        taken = max(1, BATCH_TOKENS // len(rows[at]))
        yield rows[at : at + taken]
        at += taken


def _feeds(encodings: Sequence[Encoding]) -> Feeds:
    shape = (len(encodings), max(map(len, encodings)))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding)] = encoding.ids
        mask[row, : len(encoding)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}


def _entities(window: _Window, logits: NDArray[np.float32], labels: Sequence[str]) -> list[Entity]:
    """Entities of one window, by the first token of each word."""
    _, begin, end, encoding = window
    kept = logits[begin:end]
    best = kept.argmax(-1)
    if not best.any():
        return []
    weights = np.exp(kept - kept.max(-1, keepdims=True))
    scores = (weights.max(-1) / weights.sum(-1)).tolist()
    found: list[Entity] = []
    last_word, is_open = None, False
    words, offsets = encoding.word_ids[begin:end], encoding.offsets[begin:end]
    for word, (start, stop), label, score in zip(words, offsets, map(labels.__getitem__, best), scores, strict=True):
        if word == last_word:
            if is_open:
                found[-1]["end"] = stop
            continue
        last_word = word
        prefix, _, kind = label.partition("-")
        if is_open and prefix == "I" and found[-1]["label"] == kind:
            found[-1]["end"] = stop
            continue
        is_open = bool(kind)
        if is_open:
            found.append({"start": start, "end": stop, "label": kind, "score": score})
    return found


def _write(texts: Sequence[str], found: Sequence[Sequence[Entity]], target: Path) -> None:
    columns = {"text": pa.array(texts), "entities": pa.array(found, pa.list_(ENTITY))}
    pq.write_table(pa.table(columns), target, compression="zstd")


def onnxruntime_run(graphs: Path) -> Run:
    """A thread a core, each with batches of its own."""
    import onnxruntime

    cores = len(os.sched_getaffinity(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graphs / ONNX), options, providers=["CPUExecutionProvider"])
    executor = ThreadPoolExecutor(cores)
    return lambda batches: list(executor.map(lambda feeds: session.run(None, feeds)[0], batches))


def openvino_run(graphs: Path) -> Run:
    """OpenVINO's own hint for throughput, and its queue of asynchronous requests."""
    import openvino

    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    queue = openvino.AsyncInferQueue(openvino.Core().compile_model(str(graphs / OPENVINO), "CPU", hints))

    def run(batches: Sequence[Feeds]) -> list[NDArray[np.float32]]:
        answers: list[Any] = [None] * len(batches)
        queue.set_callback(lambda request, at: answers.__setitem__(at, request.get_output_tensor(0).data.copy()))
        for at, feeds in enumerate(batches):
            queue.start_async(feeds, at)
        queue.wait_all()
        return answers

    return run


def ray_data(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
    """Ray Data: the Hugging Face pipeline in one actor a core, Parquet out; from the first batch to the last file."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # of the actors
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=2 * cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    stack.callback(ray.shutdown)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    batch = max(1, min(32, len(texts) // cores))

    def measure(texts: Sequence[str] = texts) -> Sample:
        began = folder / f"began-{time.monotonic_ns()}"
        tag = partial(_tag_batch, str(models.checkpoint), str(began))
        data = ray.data.from_items([{"text": text} for text in texts], override_num_blocks=4 * cores)
        tagged = data.map_batches(tag, batch_size=batch, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=cores))
        tagged.write_parquet(str(folder / began.name.replace("began", "out")))
        return Sample(len(texts), time.time() - float(began.read_text()), None, None, None)

    measure(texts[: batch * cores])  # its workers start and load their models
    return measure


@cache
def _pipeline(checkpoint: str) -> Any:
    import torch

    torch.set_num_threads(1)
    return hugging_face(Path(checkpoint))


def _tag_batch(checkpoint: str, began: str, batch: dict[str, Any]) -> dict[str, Any]:
    tagger = _pipeline(checkpoint)
    with suppress(FileExistsError), open(began, "x") as file:  # of all actors the first batch
        file.write(repr(time.time()))
    texts = list(batch["text"])
    answers = tagger(texts, batch_size=len(texts))
    found = [
        [{"start": e["start"], "end": e["end"], "label": e["entity_group"], "score": float(e["score"])} for e in row]
        for row in answers
    ]
    return {"text": texts, "entities": pa.array(found, pa.list_(ENTITY))}


def spacy_pipe(texts: Sequence[str], models: Models, stack: ExitStack) -> Measure:
    """``nlp.pipe`` of a model of spaCy's own with its entity recognizer alone: another model, smaller and weaker."""
    import spacy

    nlp = spacy.load(SPACY_MODEL, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer", "senter"])
    cores = len(os.sched_getaffinity(0))
    target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "entities.parquet"

    def tag() -> None:
        found = [
            [{"start": e.start_char, "end": e.end_char, "label": e.label_, "score": None} for e in document.ents]
            for document in nlp.pipe(texts, batch_size=256, n_process=cores if len(texts) > 256 else 1)
        ]
        _write(texts, found, target)

    return lambda: timed(tag, len(texts), None)


class Peer(NamedTuple):
    """A way, the modules it needs, and what ``pip install`` takes to bring them."""

    way: Way
    modules: tuple[str, ...]
    packages: str


PEERS = {
    "ray data": Peer(ray_data, ("ray", "msgpack"), "'ray[data]'"),
    "spacy": Peer(spacy_pipe, ("spacy", SPACY_MODEL), f"spacy && python -m spacy download {SPACY_MODEL}"),
    "onnxruntime sorted": Peer(sorted_loop(onnxruntime_run), ("onnxruntime",), "onnxruntime"),
    "openvino sorted": Peer(sorted_loop(openvino_run), ("openvino", "nncf"), "'nermill[openvino-build]'"),
}


def missing(name: str) -> str | None:
    """What to install for a peer; None where it can run."""
    peer = PEERS[name]
    return None if all(map(_is_there, peer.modules)) else f"not installed: pip install {peer.packages}"


def _is_there(module: str) -> bool:
    return os.path.isdir(module) or find_spec(module) is not None
