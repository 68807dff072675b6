"""The mean of the weights of training runs that began with the same weights (Wortsman et al. 2022, Model soups).

    python -m nermill.model_build.demo.average build/one/last build/two/last --data DATA --out build/demo

Prints entity F1 on the held-out parts and the temperature by which the classifier is divided.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import BertForTokenClassification

from nermill.model_build.demo.corpora import read_all
from nermill.model_build.demo.train import calibrate, held_out_scores


def average(folders: list[Path], out: Path) -> BertForTokenClassification:
    """Writes the Hugging Face folder ``out``: the mean weights of ``folders``, whose tokenizers are the same.

    Raises:
        SystemExit: The tokenizers differ.
    """
    if len({(folder / "tokenizer.json").read_bytes() for folder in folders}) > 1:
        raise SystemExit("the tokenizers differ; name runs that began with the same weights")
    model = BertForTokenClassification.from_pretrained(folders[0])
    members = [BertForTokenClassification.from_pretrained(folder).state_dict() for folder in folders]
    model.load_state_dict({name: torch.stack([m[name] for m in members]).mean(0) for name in members[0]})
    model.save_pretrained(out)
    shutil.copy(folders[0] / "tokenizer.json", out)
    return model


def main() -> None:
    """Parses the command line and averages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+", help="uncalibrated: the folders last of the runs")
    parser.add_argument("--data", type=Path, required=True, help="folder with conll2003/, crossner/, ...")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    corpora, _ = read_all(options.data)
    model = average(options.folders, options.out)
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    print(held_out_scores(model, tokenizer, corpora)[1])
    print(f"temperature of the classifier: {calibrate(options.out, corpora):.2f}")


if __name__ == "__main__":
    main()
