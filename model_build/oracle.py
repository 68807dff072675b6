"""The eager float32 checkpoint as transformers runs it: what every artifact is measured against."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model_build.checkpoint import Checkpoint
from worker.contracts.errors import UsageError
from worker.engine.golden import Golden

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


def oracle_logits(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Logits of each window from transformers, float32, one at a time: (tokens, labels) each.

    Raises:
        UsageError: transformers is not installed or cannot load the checkpoint.
    """
    try:
        from transformers import AutoModelForTokenClassification
    except ImportError:
        raise UsageError("transformers is needed to read a checkpoint; pip install 'nermill[build]'") from None
    model: Any
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own deprecations differ from version to version
            model = AutoModelForTokenClassification.from_pretrained(checkpoint.folder, local_files_only=True)
            model = model.float().eval()
            with torch.no_grad():
                return [
                    model(
                        input_ids=torch.tensor([list(ids)]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64)
                    )
                    .logits[0]
                    .numpy()
                    for ids in windows
                ]
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{checkpoint.folder}: transformers does not load it ({str(error).splitlines()[0]})") from None
    finally:
        logger.setLevel(level)


def windows_of(checkpoint: Checkpoint, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each text with its special tokens, cut at the longest window."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
    contents = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    keep = checkpoint.max_length - 2
    return tuple((checkpoint.cls_id, *ids[:keep], checkpoint.sep_id) for ids in contents)


def golden(checkpoint: Checkpoint) -> Golden:
    """The golden answers of a checkpoint."""
    windows = windows_of(checkpoint, GOLDEN_TEXTS)
    return Golden(GOLDEN_TEXTS, windows, tuple(oracle_logits(checkpoint, windows)))
