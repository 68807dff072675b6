"""What each family of checkpoints calls its sizes and weights, and what it is called here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_build.wrap import ACTIVATIONS, Architecture
from worker.contracts.errors import UsageError


@dataclass(frozen=True)
class Family:
    """Names of one family.

    Attributes:
        prefix: Before every key of the encoder.
        sizes: Configuration key of each size that is not called as in BERT.
        keys: Weight keys, ours from theirs; ``N`` stands for the layer's number.
        pads_positions: Whether positions count from ``pad_token_id + 1`` (RoBERTa).
    """

    prefix: str
    sizes: Mapping[str, str]
    keys: Mapping[str, str]
    pads_positions: bool = False


_EMBEDDINGS = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
}
_BERT_KEYS = {
    **_EMBEDDINGS,
    "types": "embeddings.token_type_embeddings",
    "layers.N.query": "encoder.layer.N.attention.self.query",
    "layers.N.key": "encoder.layer.N.attention.self.key",
    "layers.N.value": "encoder.layer.N.attention.self.value",
    "layers.N.attended": "encoder.layer.N.attention.output.dense",
    "layers.N.attended_norm": "encoder.layer.N.attention.output.LayerNorm",
    "layers.N.wide": "encoder.layer.N.intermediate.dense",
    "layers.N.narrow": "encoder.layer.N.output.dense",
    "layers.N.narrow_norm": "encoder.layer.N.output.LayerNorm",
}
_DISTILBERT_KEYS = {
    **_EMBEDDINGS,
    "layers.N.query": "transformer.layer.N.attention.q_lin",
    "layers.N.key": "transformer.layer.N.attention.k_lin",
    "layers.N.value": "transformer.layer.N.attention.v_lin",
    "layers.N.attended": "transformer.layer.N.attention.out_lin",
    "layers.N.attended_norm": "transformer.layer.N.sa_layer_norm",
    "layers.N.wide": "transformer.layer.N.ffn.lin1",
    "layers.N.narrow": "transformer.layer.N.ffn.lin2",
    "layers.N.narrow_norm": "transformer.layer.N.output_layer_norm",
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
    "electra": Family("electra.", {}, {**_BERT_KEYS, "project": "embeddings_project"}),
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
                return tensor.to(torch.float32, copy=True)  # one that is not copied keeps its whole file mapped
        raise UsageError(f"{where}: weight {key}.{part} is missing; is this the model that config.json describes?")

    keys = {ours: family.prefix + theirs for ours, theirs in family.keys.items()} | {"classifier": "classifier"}
    if f"{keys.get('project')}.weight" not in weights:
        keys.pop("project", None)
    for pattern, theirs in keys.items():
        for number in range(layers) if "N" in pattern.split(".") else (0,):
            ours, key = (re.sub(r"\bN\b", str(number), name) for name in (pattern, theirs))
            is_embedding = ours in ("words", "positions", "types")
            is_linear = not is_embedding and not ours.endswith("norm")
            weight = take(key, "weight")
            translated[f"{ours}.weight"] = weight.T.contiguous() if is_linear else weight
            if not is_embedding:
                translated[f"{ours}.bias"] = take(key, "bias")
    for number in range(layers):
        for part in ("weight", "bias"):
            joined = [translated.pop(f"layers.{number}.{name}.{part}") for name in ("query", "key", "value")]
            translated[f"layers.{number}.qkv.{part}"] = torch.cat(joined, -1)
    return translated


def untranslate(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The way back for BERT: our names to a checkpoint's."""
    ours = dict(weights)
    for number in range(layers):
        for part in ("weight", "bias"):
            parts = ours.pop(f"layers.{number}.qkv.{part}").chunk(3, -1)
            ours |= {f"layers.{number}.{n}.{part}": t for n, t in zip(("query", "key", "value"), parts, strict=True)}
    result = {}
    for name, tensor in ours.items():
        key, part = name.rsplit(".", 1)
        theirs = _BERT_KEYS.get(re.sub(r"\d+", "N", key))
        full = key if theirs is None else "bert." + theirs.replace("N.", f"{key.split('.')[1]}." if "." in key else "")
        is_linear = part == "weight" and tensor.ndim == 2 and key not in ("words", "positions", "types")
        result[f"{full}.{part}"] = tensor.T.contiguous() if is_linear else tensor.contiguous()
    return result
