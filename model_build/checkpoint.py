"""A Hugging Face checkpoint, from a folder or the hub, read without running any of its code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nermill.model_build.families import architecture, translate
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import file_sha256
from nermill.worker.engine.encoder import Architecture

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")
_WANTED = ["*.json", "*.safetensors", "pytorch_model*.bin", "vocab.txt", "merges.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A token classifier as it was published; its weights are read when they are asked for.

    Attributes:
        folder: Where its files are.
        name: What people call it.
        architecture: Its sizes.
        config: Its ``config.json``.
        tokenizer: JSON of its fast tokenizer, without truncation and padding.
        labels: Label of each logit.
        scheme: ``IOB2``, ``IOB1``, ``BIOES`` or ``IO``.
        lowercase: Whether the tokenizer folds case.
        max_length: Longest window in tokens.
        cls_id, sep_id, pad_id: Special tokens.
        source: Name, revision and the hash of the weights, for the manifest.
    """

    folder: Path
    name: str
    architecture: Architecture
    config: dict[str, Any]
    tokenizer: str
    labels: tuple[str, ...]
    scheme: str
    lowercase: bool
    max_length: int
    cls_id: int
    sep_id: int
    pad_id: int
    source: dict[str, str]

    def weights(self) -> dict[str, Tensor]:
        """The weights by our names, float32."""
        raw: dict[str, Tensor] = {}
        for file in weight_files(self.folder):
            raw |= _read_weights(file)
        translated = translate(raw, self.config["model_type"], self.architecture.layers, str(self.folder))
        classifier = tuple(translated["classifier.weight"].shape)
        if classifier != (self.architecture.hidden, len(self.labels)):
            raise UsageError(
                f"{self.folder}: the classifier has {classifier[-1]} outputs and config.json {len(self.labels)} labels"
            )
        return translated


def open_checkpoint(where: str) -> Checkpoint:
    """Opens a local folder, or ``owner/name@revision`` of the hub.

    Raises:
        UsageError: it is no checkpoint, or one that cannot be served; the message says which and why.
    """
    folder, name, revision = _find(where)
    config = _read_json(folder / "config.json", f"{folder}: no checkpoint (config.json is missing)")
    sizes = architecture(config, f"{folder / 'config.json'}")
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForTokenClassification") for kind in kinds):
        raise UsageError(f"{folder}: {', '.join(kinds) or 'a bare encoder'} is no token classifier; nermill needs one")
    labels = _labels(config, folder)
    tokenizer = _tokenizer(folder)
    special = tokenizer.encode("").ids
    if len(special) != 2:
        raise UsageError(f"{folder}: its tokenizer adds {len(special)} special tokens to a text; nermill needs two")
    if tokenizer.get_vocab_size() > sizes.vocabulary:
        raise UsageError(
            f"{folder}: the tokenizer knows {tokenizer.get_vocab_size()} tokens and the model {sizes.vocabulary}"
        )
    return Checkpoint(
        folder=folder,
        name=name,
        architecture=sizes,
        config=config,
        tokenizer=tokenizer.to_str(),
        labels=labels,
        scheme=tag_scheme(labels),
        lowercase=tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") != "A",
        max_length=_max_length(folder, sizes),
        cls_id=special[0],
        sep_id=special[1],
        pad_id=config.get("pad_token_id") or 0,
        source={
            "name": name,
            "revision": revision,
            "sha256": ",".join(file_sha256(file) for file in weight_files(folder)),
        },
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before ``pytorch_model.bin``, whole or sharded.

    Raises:
        UsageError: there is none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            index = _read_json(folder / f"{name}.index.json", "")
            return [folder / part for part in sorted(set(index["weight_map"].values()))]
    raise UsageError(f"{folder}: no weights (model.safetensors or pytorch_model.bin)")


def tag_scheme(labels: tuple[str, ...]) -> str:
    """The tag scheme that the labels themselves show.

    Raises:
        UsageError: no label says that a token is outside of entities, or they follow no scheme.
    """
    prefixes = {label.split("-", 1)[0] if "-" in label else label for label in labels}
    if "O" not in prefixes:
        raise UsageError(f"labels {', '.join(labels)}: none is 'O'; is this a tagger of named entities?")
    prefixes.discard("O")
    for scheme, allowed in (("IOB2", {"B", "I"}), ("BIOES", {"B", "I", "O", "E", "S"})):
        if "B" in prefixes and prefixes <= allowed:
            return scheme
    return "IOB1" if prefixes == {"I"} else "IO"


def _find(where: str) -> tuple[Path, str, str]:
    folder = Path(where)
    if folder.is_dir():
        folder = folder.resolve()
        # the hub's cache names its folders models--owner--name/snapshots/revision
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return folder, folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
        return folder, folder.name, "local"
    if not (match := _HUB_NAME.fullmatch(where)):
        hint = f"; a hub name needs its revision: {where}@REVISION" if re.fullmatch(r"[\w-]+/[\w.-]+", where) else ""
        raise UsageError(f"{where}: no such folder{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = match.groups()
    fetch = partial(snapshot_download, name, revision=revision, allow_patterns=_WANTED)
    try:
        return Path(fetch(local_files_only=True)), name, revision
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(fetch()), name, revision
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{where}: the hub did not give it ({reason}); name a local folder instead") from None


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(missing) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if not isinstance(body, dict):
        raise UsageError(f"{path}: not a JSON object")
    return body


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return weights
    except Exception as error:  # a truncated file fails in as many ways as there are readers
        reason = str(error).splitlines()[0]
        raise UsageError(f"{file}: not a whole weight file ({reason}); download it again") from None


def _labels(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    by_id = {int(index): str(label) for index, label in config.get("id2label", {}).items()}
    if sorted(by_id) != list(range(len(by_id))) or len(by_id) < 2:
        raise UsageError(f"{folder}/config.json: id2label does not name the labels 0, 1, …")
    return tuple(by_id[index] for index in range(len(by_id)))


def _tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else _convert_tokenizer(folder)
    except UsageError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{folder}: its tokenizer cannot be read ({reason})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _convert_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer that transformers makes from ``vocab.txt`` or ``vocab.json`` and ``merges.txt``."""
    if not ((folder / "vocab.txt").exists() or (folder / "merges.txt").exists()):
        models = ", ".join(file.name for file in sorted(folder.glob("*.model"))) or "no tokenizer.json, no vocab.txt"
        raise UsageError(
            f"{folder}: no fast tokenizer ({models}); save one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    return Tokenizer.from_str(fast.backend_tokenizer.to_str())


def _max_length(folder: Path, sizes: Architecture) -> int:
    limit = sizes.positions - sizes.position_offset
    file = folder / "tokenizer_config.json"
    if file.exists():
        said = _read_json(file, "").get("model_max_length", limit)
        limit = min(limit, int(said)) if isinstance(said, (int, float)) else limit  # "unlimited" is spelled 1e30
    return limit
