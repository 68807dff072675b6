"""Logits compared to the last bit: windows of the bundled sample, in batches of other sizes and in another order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nermill.model_build.verify import run_batched
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest
from nermill.worker.engine import Engine

Windows = Sequence[tuple[int, ...]]


def sample_windows(artifact: Path, sample: Path, number: int) -> list[tuple[int, ...]]:
    """Windows of the bundled model from stretches of the sample's sentences, nearly all different, 3 to 60 words long.

    Args:
        artifact: Whose tokenizer counts.
        sample: Folder of the sample.
        number: How many.
    """
    blocks = (sample / "wikigold.conll").read_text("utf-8").split("\n\n")
    words = [line.split()[0] for block in blocks for line in block.splitlines() if line]
    chance = random.Random(7)
    starts = chance.sample(range(len(words) - 60), number)
    tokenizer = Tokenizer.from_file(str(artifact / TOKENIZER_FILE))
    texts = [words[at : at + chance.choice((3, 8, 14, 20, 27, 60))] for at in starts]
    manifest = load_manifest(artifact)
    encoded = tokenizer.encode_batch(texts, is_pretokenized=True, add_special_tokens=False)
    windows = [(manifest.cls_id, *encoding.ids, manifest.sep_id) for encoding in encoded]
    assert len(set(windows)) > 0.99 * number
    return windows


def shuffled(windows: Windows, logits: Sequence[np.ndarray]) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """Windows and their logits in the same other order."""
    order = random.Random(0).sample(range(len(windows)), len(windows))
    return [windows[number] for number in order], [logits[number] for number in order]


def batched(
    engine: Engine, windows: Windows, budget: int, shapes: tuple[tuple[int, int], ...] = ()
) -> list[np.ndarray]:
    """Logits of windows in batches of another budget, or of given shapes."""
    manifest = engine.manifest
    engine.manifest = replace(manifest, token_budget=budget, shapes=shapes)
    logits = run_batched(engine, windows)
    engine.manifest = manifest
    return logits


def same_bits(mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> None:
    """Asserts that all logits are equal."""
    different = [number for number, (a, b) in enumerate(zip(mine, theirs, strict=True)) if not np.array_equal(a, b)]
    assert different == []
