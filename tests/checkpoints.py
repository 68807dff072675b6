"""Small checkpoints of every model family with random weights, in the layout of Hugging Face."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
FAMILIES = ("bert", "roberta", "electra", "distilbert")
MAX_LENGTH = 96
# the sizes of BERT-large; 24 layers of it are 1.3 GB
LARGE: dict[str, Any] = {
    "vocab_size": 28_996,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 512,
}


def vocabulary() -> list[str]:
    """Every printable character and its continuation; token 1 is the pad, as in RoBERTa."""
    characters = [*string.ascii_lowercase, *string.digits, *",.-'()"]
    return ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *characters, *(f"##{c}" for c in characters)]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.enable_truncation(16)  # a checkpoint may have it; the artifact must not
    tokenizer.save(str(folder / "tokenizer.json"))


def config(family: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": MAX_LENGTH + (2 if family == "roberta" else 0),
        "pad_token_id": 1,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    if family == "distilbert":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if family == "electra":
        sizes |= {"embedding_size": 16}
    names = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra", "distilbert": "DistilBert"}
    return getattr(transformers, f"{names[family]}Config")(**{**sizes, **changes})


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Changes entries of a checkpoint's config.json; None removes an entry."""
    path = folder / "config.json"
    body = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}), "utf-8")


def write_checkpoint(
    folder: Path, family: str = "bert", *, task: str = "TokenClassification", pickled: bool = False, **changes: Any
) -> Path:
    """Writes a checkpoint with random weights: ``write_checkpoint(folder, pickled=True, hidden_act="relu")``."""
    torch.manual_seed(7)
    settings = config(family, **changes)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(settings)
    for parameter in model.parameters():  # with the default initialisation logits hardly differ
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(folder)
    rewrite_config(folder, architectures=[type(model).__name__])
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write_tokenizer(folder)
    return folder
