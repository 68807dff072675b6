"""The eager float32 checkpoint as transformers runs it: what every artifact is measured against."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.model_build.checkpoint import Checkpoint
from nermill.worker.contracts.errors import EngineError, UsageError
from nermill.worker.engine import Engine
from nermill.worker.engine.golden import Golden, golden_difference

ROWS = 64  # windows of one length that are computed together

# Own sentences: names of several kinds, scripts and lengths, and a text without any.
GOLDEN_TEXTS = (
    "Angela Merkel met Barack Obama in Berlin on Tuesday .",
    "The European Commission fined Siemens AG in Brussels , Reuters reported .",
    "SOCCER - JAPAN GET LUCKY WIN , CHINA IN SURPRISE DEFEAT .",
    "Nothing here has a name , and the afternoon was long .",
    "Zinédine Zidane, born in Marseille, coached Real Madrid; São Paulo's fans flew to Łódź.",
    "The University of Nairobi and the Kenya Wildlife Service opened a laboratory near Mount Kenya "
    "with money from the World Bank, said its director, Dr. Wanjiku Kamau, in Swahili and English.",
    "東京 (Tokyo) hosted the Olympic Games.",
    "EU",
)


def reference_logits(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Logits of each window from transformers, float32, unpadded: (tokens, labels) each.

    Raises:
        UsageError: transformers is not installed or cannot load the checkpoint.
    """
    try:
        from transformers import AutoModelForTokenClassification
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise UsageError("transformers is needed to read a checkpoint; pip install 'nermill[build]'") from None
    disable_progress_bar()
    model: Any
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own deprecations differ from version to version
            model = AutoModelForTokenClassification.from_pretrained(checkpoint.folder, local_files_only=True)
            model = model.float().eval()
            return _run(model, windows)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{checkpoint.folder}: transformers does not load it ({str(error).splitlines()[0]})") from None
    finally:
        logger.setLevel(level)


def _run(model: Any, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    logits: dict[int, NDArray[np.float32]] = {}
    by_length = sorted(range(len(windows)), key=lambda number: len(windows[number]))
    for length, group in groupby(by_length, key=lambda number: len(windows[number])):
        numbers = list(group)
        for some in (numbers[at : at + ROWS] for at in range(0, len(numbers), ROWS)):
            ids = torch.tensor([list(windows[number]) for number in some])
            mask = torch.ones(len(some), length, dtype=torch.int64)
            with torch.no_grad():
                answer = model(input_ids=ids, attention_mask=mask).logits.numpy()
            logits |= dict(zip(some, answer, strict=True))
    return [logits[number] for number in range(len(windows))]


def windows_of(checkpoint: Checkpoint, texts: Sequence[str], max_length: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of each text with its special tokens, cut at ``max_length``."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
    contents = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    keep = max_length - 2
    return tuple((checkpoint.cls_id, *ids[:keep], checkpoint.sep_id) for ids in contents)


def golden(checkpoint: Checkpoint, max_length: int) -> Golden:
    """The golden answers of a checkpoint, for windows of at most ``max_length`` tokens."""
    windows = windows_of(checkpoint, GOLDEN_TEXTS, max_length)
    return Golden(GOLDEN_TEXTS, windows, tuple(reference_logits(checkpoint, windows)))


def check_graph(engine: Engine, answers: Golden) -> float:
    """Largest distance of a golden logit over all shapes; closes the engine.

    Raises:
        EngineError: it is beyond the manifest's tolerance.
    """
    manifest, worst = engine.manifest, 0.0
    try:
        for shape in manifest.shapes or (None,):
            engine.manifest = manifest if shape is None else replace(manifest, shapes=(shape,))
            fitting = [n for n, ids in enumerate(answers.windows) if shape is None or len(ids) <= shape[1]]
            some = Golden(
                answers.texts,
                tuple(answers.windows[n] for n in fitting),
                tuple(answers.logits[n] for n in fitting),
            )
            worst = max(worst, golden_difference(engine, some) if fitting else 0.0)
    finally:
        engine.close()
    if not worst <= manifest.tolerance:
        raise EngineError(
            f"{manifest.name}: the traced graph is {worst:.3g} away from the checkpoint's logits (tolerance "
            f"{manifest.tolerance:.3g}); nothing was written"
        )
    return worst
