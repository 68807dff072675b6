"""A BERT-large-sized checkpoint with random weights through compile, verify and bench: time and peak memory.

    python -m tests.benchmarks.large [--keep DIR]

24 layers of 1024, a vocabulary of 28,996: the size of dslim/bert-large-NER, saved as safetensors and as
``pytorch_model.bin``. Every command is a process of its own; its peak memory is set against the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact

VOCABULARY = 28_996
LABELS = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
SHAPES = "1x64,4x128"


def write(folder: Path) -> tuple[Path, Path]:
    """The checkpoint twice: as safetensors, and as a pickle that ``weights_only`` reads."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config)
    safe, pickled = folder / "safetensors", folder / "pickled"
    model.save_pretrained(safe)
    tokenizer = json.loads(Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE)).to_str())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: index for word, index in words.items() if index < VOCABULARY}
    (safe / TOKENIZER_FILE).write_text(json.dumps(tokenizer), "utf-8")
    pickled.mkdir()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for name in ("config.json", TOKENIZER_FILE):
        (pickled / name).write_bytes((safe / name).read_bytes())
    return safe, pickled


def run(*arguments: str) -> tuple[float, float, str]:
    """Seconds, peak memory in bytes and standard output of one ``nermill-build``."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "model_build.cli", *arguments], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"nermill-build {' '.join(arguments)}: exit code {process.returncode}\n{text}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    folder = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        safe, pickled = write(work)
        weights = (safe / "model.safetensors").stat().st_size
        print(f"weights {weights / 1e9:.2f} GB", flush=True)
        for name, checkpoint, options in (
            ("torch-fp32", safe, ("--backend", "torch", "--shapes", SHAPES)),
            ("torch-fp32-pickled", pickled, ("--backend", "torch", "--shapes", SHAPES)),
            ("onnx-fp32", safe, ("--backend", "onnx", "--shapes", SHAPES)),
            ("onnx-int8", safe, ("--backend", "onnx", "--precision", "int8", "--shapes", SHAPES)),
        ):
            art = str(work / name)
            seconds, peak, _ = run("compile", str(checkpoint), "--out", art, *options)
            print(
                f"{name}: compile {seconds:.0f} s, peak {peak / 1e9:.2f} GB = {peak / weights:.2f} x weights",
                flush=True,
            )
            seconds, peak, text = run("verify", art)
            print(f"verify {seconds:.0f} s, peak {peak / 1e9:.2f} GB\n{text}", flush=True)
        for name in ("onnx-fp32", "onnx-int8"):
            print(run("bench", str(work / name))[2], flush=True)


if __name__ == "__main__":
    main()
