"""Texts to find the scales of int8 with: which windows of them, and the ranges of each layer's inputs over those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.model_build.corpus import encode, read_texts
from nermill.worker.contracts.manifest import TOKENIZER_FILE, Manifest
from nermill.worker.engine.encoder import Encoder
from nermill.worker.engine.golden import lay_rows
from nermill.worker.engine.inputs import named_inputs
from nermill.worker.engine.layers import Linear

MOST_TEXTS = 5000  # of a file that are tokenized, evenly spread
MOST_WINDOWS = 500  # of those texts that are computed, evenly spread
WINDOW = 128  # tokens

Windows = Sequence[Sequence[int]]
Inputs = dict[str, NDArray[np.integer]]
Float = NDArray[np.float32]
Ranges = dict[str, tuple[Float, Float]]


def calibration_windows(
    path: str | None, folder: Path, manifest: Manifest, golden: Windows
) -> tuple[Windows, dict[str, Any]]:
    """Windows of a file's texts, or else the golden ones, and for the manifest what they are.

    Args:
        path: The file: CoNLL, JSONL or plain lines.
        folder: Where the artifact's tokenizer is.
        manifest: The artifact's, as far as it is known.
        golden: Token ids of the golden texts, special tokens included.

    Raises:
        UsageError: the file cannot be read, or holds no text.
    """
    if path is None:
        return golden, {"calibration": {"texts": f"{len(golden)} golden texts", "windows": len(golden)}}
    texts = read_texts([path])
    chosen = texts[:: max(1, len(texts) // MOST_TEXTS)]
    keep = min(manifest.max_length, WINDOW) - 2
    windows = [
        (manifest.cls_id, *ids[at : at + keep], manifest.sep_id)
        for ids, _ in encode(Tokenizer.from_file(str(folder / TOKENIZER_FILE)), chosen)
        for at in range(0, len(ids), keep)
    ]
    step = max(1.0, len(windows) / MOST_WINDOWS)
    windows = [windows[int(at * step)] for at in range(min(len(windows), MOST_WINDOWS))]
    source = f"{len(texts)} texts of {Path(path).name}"
    return windows, {"calibration": {"texts": source, "windows": len(windows)}}


def window_inputs(window: Sequence[int], manifest: Manifest) -> Inputs:
    """A graph's inputs for one window in a row of its own length, whatever shapes will be compiled."""
    free = replace(manifest, shapes=())
    return named_inputs(lay_rows([[window]], (1, len(window)), free), free)


def input_ranges(model: Encoder, windows: Windows, manifest: Manifest) -> Ranges:
    """Smallest and largest values of every ``Linear``'s inputs over some windows, by the layer's name.

    Args:
        model: In float32.
        windows: Token ids, special tokens included.
        manifest: Layout and inputs of the model.

    Returns:
        For each layer two arrays of shape (inputs,); 0 is within each range.
    """
    ranges: Ranges = {}

    def watch(name: str, layer: Linear) -> Any:
        def note(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            tokens = inputs[0].numpy().reshape(-1, inputs[0].shape[-1])
            low, high = ranges.get(name, (np.float32(0), np.float32(0)))
            ranges[name] = np.minimum(low, tokens.min(0)), np.maximum(high, tokens.max(0))

        return layer.register_forward_pre_hook(note)

    hooks = [watch(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear)]
    with torch.inference_mode():
        for window in windows:
            model(*map(torch.from_numpy, window_inputs(window, manifest).values()))
    for hook in hooks:
        hook.remove()
    return ranges
