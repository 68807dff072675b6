"""The reference recipe's protocol, reproduced with the demo model, beside ours.

    python -m tests.benchmarks.recipe CONLL_FILE [--every 6] [--json]

The recipe (ModelZoo, Bert_Large_NER for torch_aie) looks whole words up in the vocabulary, pads every sentence
to 512, computes one at a time, passes the mask and the token types in swapped places, edits the mask constant
from float32's minimum to -1000, and reports word accuracy with O counted. Each of these is one switch here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from seqeval.metrics import f1_score
from tokenizers import Tokenizer

from nermill.model_build.checkpoint import open_checkpoint
from nermill.model_build.corpus import Text, read_texts
from nermill.model_build.demo.recover import recover
from nermill.worker import Tagger
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact
from nermill.worker.engine.encoder import Encoder, build

LENGTH = 512
CONSTANTS = {"fp32-min": float(torch.finfo(torch.float32).min), "-10000": -10_000.0, "-1000": -1000.0}


def word_accuracy(gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """Share of words with the right tag, O counted as the recipe does."""
    pairs = [(g, s) for tags, answers in zip(gold, said, strict=True) for g, s in zip(tags, answers, strict=True)]
    return sum(g == s for g, s in pairs) / len(pairs)


def row(name: str, gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]], seconds: float) -> dict[str, Any]:
    """One line of the table."""
    return {
        "protocol": name,
        "word_accuracy": round(word_accuracy(gold, said), 4),
        "f1": round(float(f1_score([list(tags) for tags in gold], [list(tags) for tags in said])), 4),
        "sentences_per_second": round(len(gold) / seconds, 2),
    }


@torch.no_grad()
def recipe(
    model: Encoder, tokenizer: Tokenizer, labels: Sequence[str], texts: Sequence[Text], *, swapped: bool
) -> tuple[list[list[str]], float]:
    """Tags of each word and the seconds of the forwards alone, as the recipe times them."""
    unknown = tokenizer.token_to_id("[UNK]")
    said, seconds = [], 0.0
    for text in texts:
        words = [word.lower() for word in text.content][:LENGTH]
        known = [tokenizer.token_to_id(word) for word in words]
        ids = torch.zeros(1, LENGTH, dtype=torch.int64)
        ids[0, : len(words)] = torch.tensor([unknown if number is None else number for number in known])
        mask = torch.zeros(1, LENGTH, dtype=torch.int64)
        mask[0, : len(words)] = 1
        types = torch.zeros(1, LENGTH, dtype=torch.int64)
        begun = time.perf_counter()
        logits = model(ids, types, mask) if swapped else model(ids, mask, types)
        seconds += time.perf_counter() - begun
        said.append([labels[best] for best in logits[0, : len(words)].argmax(-1).tolist()])
    return said, seconds


def ours(texts: Sequence[Text]) -> tuple[list[list[str]], float]:
    """Tags of each word and the seconds of everything: tokenizing, batching, computing, decoding."""
    with Tagger.load("demo") as tagger:
        begun = time.perf_counter()
        annotations = tagger.tag([tuple(text.content) for text in texts])
        return [list(annotation.tags or ()) for annotation in annotations], time.perf_counter() - begun


def measure(texts: Sequence[Text], threads: int) -> list[dict[str, Any]]:
    """The table: always O, the recipe's protocol under every switch, ours."""
    torch.set_num_threads(threads)
    gold = [text.gold for text in texts]
    rows = [{**row("always O", gold, [["O"] * len(tags) for tags in gold], 1.0), "sentences_per_second": None}]
    artifact = resolve_artifact("demo")
    labels = load_manifest(artifact).labels
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    with tempfile.TemporaryDirectory() as folder:
        recover(Path(folder) / "demo")
        checkpoint = open_checkpoint(str(Path(folder) / "demo"))
        model = build(checkpoint.architecture, checkpoint.weights(), layout="plain")
    for swapped, (name, constant) in product((False, True), CONSTANTS.items()):
        model.masked = constant
        said, seconds = recipe(model, tokenizer, labels, texts, swapped=swapped)
        rows.append(row(f"recipe, {'swapped' if swapped else 'right order'}, {name}", gold, said, seconds))
        print(rows[-1], file=sys.stderr)
    said, seconds = ours(texts)
    return [*rows, row("nermill (WordPiece, int8, batched, all stages timed)", gold, said, seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", help="CoNLL-2003 file with tags")
    parser.add_argument("--every", type=int, default=6, help="take every n-th sentence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    texts = read_texts([arguments.data])[:: arguments.every]
    rows = measure(texts, arguments.threads)
    if arguments.json:
        print(json.dumps({"data": Path(arguments.data).name, "sentences": len(texts), "rows": rows}))
        return
    print(f"{len(texts)} sentences of {Path(arguments.data).name}")
    print(f"{'protocol':<54} word accuracy      F1  sentences/s")
    for entry in rows:
        speed = entry["sentences_per_second"]
        print(f"{entry['protocol']:<54} {entry['word_accuracy']:13.4f} {entry['f1']:7.4f}  {speed or '':>11}")


if __name__ == "__main__":
    main()
