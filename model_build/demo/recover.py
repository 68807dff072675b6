"""A Hugging Face checkpoint of the bundled demo model, its weights taken back from the int8 artifact.

    python -m nermill.model_build.demo.recover --out DIR

Only the small artifact is shipped; from this folder ``nermill-build compile`` makes any other.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nermill.model_build.artifact import folder_at_once
from nermill.model_build.families import untranslate
from nermill.model_build.int8 import read_weights
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact


def recover(out: Path) -> None:
    """Writes the folder ``out``: ``config.json``, ``model.safetensors``, ``tokenizer.json``.

    Raises:
        UsageError: ``out`` is there already.
        ArtifactError: the bundled artifact is missing or was changed.
    """
    artifact = resolve_artifact("demo")
    manifest = load_manifest(artifact)
    sizes = manifest.details["architecture"]
    graph = artifact / manifest.model_file
    weights = {name: torch.from_numpy(value.copy()) for name, value in read_weights(graph).items()}
    types = torch.zeros(sizes["types"], sizes["embedding"])
    types[0] = weights.pop("first_type")
    weights["types.weight"] = types
    config = {
        "architectures": ["BertForTokenClassification"],
        "model_type": "bert",
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": sizes["positions"],
        "type_vocab_size": sizes["types"],
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["intermediate"],
        "hidden_act": sizes["activation"],
        "layer_norm_eps": sizes["epsilon"],
        "pad_token_id": manifest.pad_id,
        "id2label": dict(enumerate(manifest.labels)),
        "label2id": {label: index for index, label in enumerate(manifest.labels)},
    }
    with folder_at_once(out) as folder:
        save_file(untranslate(weights, sizes["layers"]), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / TOKENIZER_FILE).write_bytes((artifact / TOKENIZER_FILE).read_bytes())
        shutil.copymode(folder / TOKENIZER_FILE, folder / "model.safetensors")  # safetensors keeps others out


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled demo model as a Hugging Face folder.")
    parser.add_argument("--out", type=Path, required=True)
    recover(parser.parse_args().out)


if __name__ == "__main__":
    main()
