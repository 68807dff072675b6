"""What each family of checkpoints calls its sizes and weights, and what it is called here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nermill.worker.contracts.errors import UsageError
from nermill.worker.engine.encoder import Architecture
from nermill.worker.engine.layers import ACTIVATIONS


@dataclass(frozen=True)
class Family:
    """Names of one family.

    Attributes:
        prefix: Before every key of the encoder.
        sizes: Configuration key of each size that is not called as in BERT.
        keys: Weight keys, ours from theirs (several are joined); ``N`` stands for the layer's number.
        pads_positions: Whether positions count from ``pad_token_id + 1`` (RoBERTa).
    """

    prefix: str
    sizes: Mapping[str, str]
    keys: Mapping[str, tuple[str, ...]]
    pads_positions: bool = False


_EMBEDDINGS = {
    "words": ("embeddings.word_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
}
_BERT_LAYER = "encoder.layer.N."
_BERT_KEYS = {
    **_EMBEDDINGS,
    "types": ("embeddings.token_type_embeddings",),
    "layers.N.qkv": tuple(f"{_BERT_LAYER}attention.self.{name}" for name in ("query", "key", "value")),
    "layers.N.attended": (f"{_BERT_LAYER}attention.output.dense",),
    "layers.N.attended_norm": (f"{_BERT_LAYER}attention.output.LayerNorm",),
    "layers.N.wide": (f"{_BERT_LAYER}intermediate.dense",),
    "layers.N.narrow": (f"{_BERT_LAYER}output.dense",),
    "layers.N.narrow_norm": (f"{_BERT_LAYER}output.LayerNorm",),
}
_DISTILBERT_LAYER = "transformer.layer.N."
_DISTILBERT_KEYS = {
    **_EMBEDDINGS,
    "layers.N.qkv": tuple(f"{_DISTILBERT_LAYER}attention.{name}_lin" for name in ("q", "k", "v")),
    "layers.N.attended": (f"{_DISTILBERT_LAYER}attention.out_lin",),
    "layers.N.attended_norm": (f"{_DISTILBERT_LAYER}sa_layer_norm",),
    "layers.N.wide": (f"{_DISTILBERT_LAYER}ffn.lin1",),
    "layers.N.narrow": (f"{_DISTILBERT_LAYER}ffn.lin2",),
    "layers.N.narrow_norm": (f"{_DISTILBERT_LAYER}output_layer_norm",),
}
_DISTILBERT_SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
_ROBERTA = Family("roberta.", {}, _BERT_KEYS, pads_positions=True)

FAMILIES: dict[str, Family] = {
    "bert": Family("bert.", {}, _BERT_KEYS),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Family("electra.", {}, {**_BERT_KEYS, "project": ("embeddings_project",)}),
    "distilbert": Family("distilbert.", _DISTILBERT_SIZES, _DISTILBERT_KEYS),
}


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Reads the sizes from a checkpoint's configuration.

    Raises:
        UsageError: the family or one of its options cannot be served; the message names it.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UsageError(f"{where}: model type {model_type!r} cannot be served; nermill takes {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]

    def size(key: str) -> Any:
        name = family.sizes.get(key, key)
        if name not in config:
            raise UsageError(f"{where}: {name} is missing; is this the checkpoint's own configuration?")
        return config[name]

    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise UsageError(f"{where}: position_embedding_type {kind!r} cannot be served; nermill takes 'absolute'")
    if (activation := size("hidden_act")) not in ACTIVATIONS:
        raise UsageError(f"{where}: activation {activation!r} cannot be served; nermill takes {', '.join(ACTIVATIONS)}")
    if config.get("is_decoder"):
        raise UsageError(f"{where}: a decoder (is_decoder) cannot be served; nermill takes encoders")
    hidden = size("hidden_size")
    return Architecture(
        vocabulary=size("vocab_size"),
        positions=size("max_position_embeddings"),
        types=config.get("type_vocab_size", 2) if "types" in family.keys else 0,
        embedding=config.get("embedding_size", hidden) if "project" in family.keys else hidden,
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=size("num_attention_heads"),
        intermediate=size("intermediate_size"),
        labels=len(config.get("id2label", {})),
        activation=activation,
        epsilon=config.get("layer_norm_eps", 1e-12),
        position_offset=config.get("pad_token_id", 1) + 1 if family.pads_positions else 0,
    )


def translate(weights: dict[str, Tensor], model_type: str, layers: int, where: str) -> dict[str, Tensor]:
    """Renames a checkpoint's weights to ours, joins query, key and value, and makes them float32.

    Each tensor is copied once: one that is not keeps the whole file that it came from in memory.

    Args:
        weights: As stored; emptied on the way, so that memory holds each tensor once.
        model_type: Key of ``FAMILIES``.
        layers: How many layers there are.
        where: The checkpoint, for messages.

    Raises:
        UsageError: a weight is missing; the message names it.
    """
    family = FAMILIES[model_type]
    translated = {}

    def take(key: str, part: str) -> Tensor:
        for spelling in (part, {"weight": "gamma", "bias": "beta"}[part]):  # checkpoints of 2018 say gamma and beta
            if (tensor := weights.pop(f"{key}.{spelling}", None)) is not None:
                return tensor
        raise UsageError(f"{where}: weight {key}.{part} is missing; is this the model that config.json describes?")

    keys = {ours: tuple(family.prefix + name for name in theirs) for ours, theirs in family.keys.items()}
    keys["classifier"] = ("classifier",)
    if "project" in keys and f"{keys['project'][0]}.weight" not in weights:
        del keys["project"]
    for pattern, names in keys.items():
        for number in range(layers) if "N" in pattern.split(".") else (0,):
            ours, *theirs = (re.sub(r"\bN\b", str(number), name) for name in (pattern, *names))
            parts = [take(key, "weight") for key in theirs]
            if _is_linear(ours):
                translated[f"{ours}.weight"] = torch.cat([part.T for part in parts], -1).float().contiguous()
            else:
                translated[f"{ours}.weight"] = parts[0].to(torch.float32, copy=True)
            if ours not in _TABLES:
                translated[f"{ours}.bias"] = torch.cat([take(key, "bias") for key in theirs]).float()
    return translated


def untranslate(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The way back for BERT: our names to a checkpoint's."""
    keys = {ours: tuple("bert." + name for name in theirs) for ours, theirs in _BERT_KEYS.items()}
    keys["classifier"] = ("classifier",)
    result: dict[str, Tensor] = {}
    for pattern, names in keys.items():
        for number in range(layers) if "N" in pattern.split(".") else (0,):
            ours, *theirs = (re.sub(r"\bN\b", str(number), name) for name in (pattern, *names))
            for part in ("weight", "bias"):
                if (tensor := weights.get(f"{ours}.{part}")) is not None:
                    pieces = tensor.chunk(len(theirs), -1)
                    turned = (piece.T if part == "weight" and _is_linear(ours) else piece for piece in pieces)
                    result |= {f"{key}.{part}": t.contiguous() for key, t in zip(theirs, turned, strict=True)}
    return result


_TABLES = ("words", "positions", "types")


def _is_linear(name: str) -> bool:
    return name not in _TABLES and not name.endswith("norm")
