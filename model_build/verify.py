"""Is a compiled artifact still its checkpoint? Logits, tags, padding, packing: measured, and held to its tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.model_build.corpus import Text, encode
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest
from nermill.worker.engine import Batch, load_engine
from nermill.worker.engine.golden import lay_rows, load_golden, run_alone
from nermill.worker.tagging.batching import place

if TYPE_CHECKING:
    from nermill.worker.engine import Engine

Ids = Sequence[int]
Logits = NDArray[np.float32]
PADDING = 37  # more tokens, and another row, around a window whose shape is free


@dataclass(frozen=True)
class Check:
    """One line of the table; ``limit`` is None where the figure is for information."""

    name: str
    value: float
    limit: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.limit is None or bool(self.value <= self.limit)


def verify(
    artifact: Path, *, checkpoint: str | None = None, texts: Sequence[Text] = (), device: str = "cpu", threads: int = 0
) -> list[Check]:
    """Checks an artifact against its golden answers, and against its checkpoint where that is given.

    Args:
        artifact: The artifact's folder.
        checkpoint: The Hugging Face folder, or hub name with revision, that it was compiled from.
        texts: Further texts; with gold tags, F1 is compared too. They need the checkpoint.
        device: Where the artifact runs.
        threads: Compute threads on a CPU; 0 takes all.

    Raises:
        ArtifactError: the artifact cannot be loaded, which covers its hashes and the names of its inputs.
        UsageError: the checkpoint cannot be read, or texts were given without one.
    """
    if texts and checkpoint is None:
        raise UsageError("texts need --checkpoint: without it there is nothing to compare their tags with")
    engine = load_engine(artifact, device, threads)
    try:
        golden = load_golden(artifact)
        names = ", ".join(entry.name for entry in engine.manifest.inputs)
        checks = [Check("inputs", 0, 0, f"bound by name: {names}")]
        windows = golden.windows
        alone = run_alone(engine, windows)
        checks += _compare("golden", alone, golden.logits, engine.manifest)
        if engine.manifest.layout == "equal":
            beside = [_beside_others(engine, ids) for ids in windows]
            checks.append(_largest("batching", beside, alone, engine.manifest, "a window alone against among others"))
        else:
            padded = [_padded(engine, ids) for ids in windows]
            checks.append(_largest("padding", padded, alone, engine.manifest, "a window alone against padded"))
        if engine.manifest.layout == "packed":
            packed = run_packed(engine, windows)
            checks.append(_largest("packing", packed, alone, engine.manifest, "a window alone against among others"))
        if texts and checkpoint is not None:
            checks += _compare_texts(engine, artifact, checkpoint, texts)
    finally:
        engine.close()
    return checks


def report(artifact: Path, checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as one JSON object; a value that is infinite or no number at all is null."""
    return {
        "artifact": str(artifact),
        "passed": all(check.passed for check in checks),
        "checks": [
            {**asdict(check), "value": check.value if np.isfinite(check.value) else None, "passed": check.passed}
            for check in checks
        ],
    }


def run_packed(engine: Engine, windows: Sequence[Ids]) -> list[Logits]:
    """Logits of each window, computed in rows that are shared with the others."""
    longest = max(map(len, windows))
    shape = _widest(engine.manifest) or (2, min(engine.manifest.max_length, 2 * longest))
    logits: list[Logits | None] = [None] * len(windows)
    waiting = list(range(len(windows)))
    while waiting:
        rows: list[list[int]] = [[] for _ in range(shape[0])]
        for number in list(waiting):
            row = next((r for r in rows if sum(len(windows[n]) for n in r) + len(windows[number]) <= shape[1]), None)
            if row is not None:
                row.append(number)
                waiting.remove(number)
        answer = engine.run(lay_rows([[windows[n] for n in row] for row in rows], shape, engine.manifest))
        for at, row in enumerate(rows):
            column = 0
            for number in row:
                logits[number] = answer[at, column : column + len(windows[number])]
                column += len(windows[number])
    return [window for window in logits if window is not None]


def run_batched(engine: Engine, windows: Sequence[Ids]) -> list[Logits]:
    """Logits of many windows, in the batches that a worker would make."""
    waiting = np.arange(len(windows))
    lengths = np.array([len(ids) for ids in windows])
    batches: list[tuple[Batch, list[tuple[int, int, int]]]] = []  # with number, row and column of each window
    while len(waiting):
        placement = place(lengths[waiting], engine.manifest)
        taken = waiting[placement.window]
        rows: list[list[Ids]] = [[] for _ in range(placement.rows)]
        order = np.lexsort((placement.column, placement.row))
        for number, row in zip(taken[order].tolist(), placement.row[order].tolist(), strict=True):
            rows[row].append(windows[number])
        places = list(zip(taken.tolist(), placement.row.tolist(), placement.column.tolist(), strict=True))
        batches.append((lay_rows(rows, (placement.rows, placement.length), engine.manifest), places))
        waiting = np.delete(waiting, placement.window)
    logits: dict[int, Logits] = {}
    with ThreadPoolExecutor(engine.at_once) as threads:
        answers = threads.map(engine.run, [batch for batch, _ in batches])
        for (_, places), answer in zip(batches, answers, strict=True):
            for number, row, column in places:
                logits[number] = answer[row, column : column + len(windows[number])]
    return [logits[number] for number in range(len(windows))]


def _compare(name: str, mine: Sequence[Logits], theirs: Sequence[Logits], manifest: Manifest) -> list[Check]:
    tokens = sum(map(len, theirs))
    different = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(mine, theirs, strict=True))
    limit = 0.0 if manifest.precision == "fp32" else None
    logits = _largest(f"{name} logits", mine, theirs, manifest, "against the eager float32 checkpoint")
    if name == "texts" and manifest.precision == "int8":
        logits = replace(logits, limit=None)  # the worst of many texts says little where numbers are coarse: F1 does
    return [logits, Check(f"{name} tags", different / tokens, limit, f"{different} of {tokens} tokens differ")]


def _largest(name: str, mine: Sequence[Logits], theirs: Sequence[Logits], manifest: Manifest, note: str) -> Check:
    worst = max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True))
    return Check(name, worst if np.isfinite(worst) else float("inf"), manifest.tolerance, note)


def _padded(engine: Engine, ids: Ids) -> Logits:
    manifest = engine.manifest
    shape = _widest(manifest) or (3, min(len(ids) + PADDING, manifest.max_length))
    return engine.run(lay_rows([[]] * (shape[0] - 1) + [[ids]], shape, manifest))[-1, : len(ids)]


def _beside_others(engine: Engine, ids: Ids) -> Logits:
    """Logits of a window below another of its length, its tokens in reverse order."""
    return engine.run(lay_rows([[ids[::-1]], [ids]], (2, len(ids)), engine.manifest))[1, :]


def _widest(manifest: Manifest) -> tuple[int, int] | None:
    return max(manifest.shapes, key=lambda shape: (shape[1], shape[0]), default=None)


def _compare_texts(engine: Engine, artifact: Path, checkpoint: str, texts: Sequence[Text]) -> list[Check]:
    from nermill.model_build.checkpoint import open_checkpoint
    from nermill.model_build.reference import reference_logits

    manifest = engine.manifest
    opened = open_checkpoint(checkpoint)
    if opened.source["sha256"] != manifest.source["sha256"]:
        raise UsageError(f"{checkpoint}: {artifact} was compiled from other weights (sha256 differs)")
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    keep = manifest.max_length - 2
    encoded = [(ids[:keep], words[:keep]) for ids, words in encode(tokenizer, texts)]
    windows = [(manifest.cls_id, *ids, manifest.sep_id) for ids, _ in encoded]
    mine, theirs = run_batched(engine, windows), reference_logits(opened, windows)
    checks = _compare("texts", [a[1:-1] for a in mine], [b[1:-1] for b in theirs], manifest)
    gold = [text.gold for text in texts]
    if all(gold):
        words = [numbers for _, numbers in encoded]
        scores = [_f1(manifest, gold, words, logits) for logits in (mine, theirs)]
        note = f"F1 {scores[0]:.4f}, checkpoint {scores[1]:.4f}, on {len(texts)} texts"
        limit = 0.003 if manifest.precision == "int8" else None
        checks.append(Check("texts F1 lost", scores[1] - scores[0], limit, note))
    return checks


def _f1(
    manifest: Manifest, gold: Sequence[tuple[str, ...]], words: Sequence[list[int | None]], logits: Sequence[Logits]
) -> float:
    from seqeval.metrics import f1_score

    truth, said = [], []
    for tags, numbers, answer in zip(gold, words, logits, strict=True):
        best = answer[1:-1].argmax(-1).tolist()
        first = {word: token for token, word in reversed(list(enumerate(numbers))) if word is not None}
        truth.append(list(tags))
        said.append([manifest.labels[best[first[word]]] if word in first else "O" for word in range(len(tags))])
    return float(f1_score(truth, said))
