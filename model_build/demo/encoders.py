"""The encoders of the recipe: BERT for the demo model, MPNet for the larger model that it learns from.

Both read the token ids of the demo model's tokenizer. MPNet has BERT's vocabulary behind four tokens of its own, and
other special tokens; ``load_encoder`` puts its embeddings into BERT's order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, BertForTokenClassification, MPNetForTokenClassification, PreTrainedModel

_SPECIAL = {"[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
_FIRST_POSITION = 2  # MPNet's positions 0 and 1 are not used


def _class_of(folder: Path) -> type[PreTrainedModel]:
    kind = AutoConfig.from_pretrained(folder).model_type
    classes: dict[str, type[PreTrainedModel]] = {
        "bert": BertForTokenClassification,
        "mpnet": MPNetForTokenClassification,
    }
    if kind not in classes:
        raise SystemExit(f"{folder}: an encoder of type {kind}; bert and mpnet are read")
    return classes[kind]


def load_classifier(folder: Path) -> PreTrainedModel:
    """A token classifier that the recipe wrote."""
    return _class_of(folder).from_pretrained(folder)


def load_encoder(folder: Path, tokenizer: Tokenizer, **config: Any) -> PreTrainedModel:
    """An encoder with a new classifier, its word embeddings in the order of ``tokenizer``.

    Args:
        folder: A Hugging Face folder.
        tokenizer: BERT's, before cased forms are added.
        config: Settings that differ from the folder's.

    Raises:
        SystemExit: it is neither BERT nor MPNet, or its vocabulary lacks a token.
    """
    model = _class_of(folder).from_pretrained(folder, **config)
    if model.config.model_type == "mpnet":
        own = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        lacking = [name for name, _ in names if _SPECIAL.get(name, name) not in own]
        if lacking:
            raise SystemExit(f"{folder}: the vocabulary lacks {lacking[0]!r}")
        order = torch.tensor([own[_SPECIAL.get(name, name)] for name, _ in names])
        table = model.base_model.embeddings.word_embeddings.weight.detach()[order]
        model.base_model.embeddings.word_embeddings = nn.Embedding.from_pretrained(table, freeze=False)
    return model


def logits_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits, shape (rows, tokens, labels), of token ids and their mask, int64, shape (rows, tokens)."""
    positions = None
    if model.config.model_type == "mpnet":
        positions = torch.arange(_FIRST_POSITION, _FIRST_POSITION + ids.shape[1]).expand(ids.shape)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
