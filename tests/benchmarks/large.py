"""A BERT-large-sized checkpoint with random weights: what building costs, and how fast the mill is beside the engine.

    python -m tests.benchmarks.large [--keep DIR] [--speed]

24 layers of 1024, a vocabulary of 28,996: the size of dslim/bert-large-NER, saved as safetensors and as
``pytorch_model.bin``. Every command is a process of its own; its peak memory is set against the weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from tokenizers import Tokenizer

from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from tests.benchmarks import report
from tests.benchmarks.corpora import default_data, flops_of, read_corpora
from tests.benchmarks.side_by_side import side_by_side
from tests.benchmarks.ways import Models

LABELS = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
SHAPES = "1x64,4x128"
DOCUMENTS = 160
ROUNDS = 5
SPEED_WAYS = ("recipe", "pipeline-32", "mill fp32", "engine fp32", "peak")


def write(folder: Path) -> tuple[Path, Path]:
    """The checkpoint twice: as safetensors, and as a pickle that ``weights_only`` reads."""
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config)
    torch.nn.init.normal_(model.classifier.bias)  # logits as far apart as a trained model's: int8 is held against them
    safe, pickled = folder / "safetensors", folder / "pickled"
    model.save_pretrained(safe)
    tokenizer.save(str(safe / TOKENIZER_FILE))
    pickled.mkdir()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    for name in ("config.json", TOKENIZER_FILE):
        (pickled / name).write_bytes((safe / name).read_bytes())
    return safe, pickled


def run(*arguments: str) -> tuple[float, float, str]:
    """Seconds, peak memory in bytes and standard output of one ``nermill-build``."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "nermill.model_build.cli", *arguments], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"nermill-build {' '.join(arguments)}: exit code {process.returncode}\n{text}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024, text


def speed(work: Path, checkpoint: Path) -> None:
    """Prints the fp32 mill beside its engine, the pipeline and the recipe on the same sentences."""
    artifact = work / "free-fp32"
    run("compile", str(checkpoint), "--out", str(artifact), "--backend", "torch")
    corpus = read_corpora(default_data(), DOCUMENTS)["sentences"]
    samples, peaks = side_by_side(corpus, Models(artifact, artifact, artifact, checkpoint), SPEED_WAYS, ROUNDS)
    flops, peak = flops_of(corpus, artifact), median(peaks)
    print(report.table(report.summarise(corpus, samples, flops, peak)))
    engine, mill = samples["engine fp32"], samples["mill fp32"]
    useful = [flops * s.documents / s.seconds / 1e9 / p for s, p in zip(engine, peaks, strict=True)]
    print(f"mill over engine    {report.over(mill, engine):.3f}")
    print(f"mill over pipeline  {report.over(mill, samples['pipeline-32']):.2f}")
    print(f"mill over recipe    {report.over(mill, samples['recipe']):.1f}")
    print(f"engine over peak    {median(useful):.3f} of {peak:.0f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    parser.add_argument("--speed", action="store_true", help="measure the speed alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.keep or Path(temporary)
        safe, pickled = write(work)
        if options.speed:
            speed(work, safe)
            return
        weights = (safe / "model.safetensors").stat().st_size
        print(f"weights {weights / 1e9:.2f} GB", flush=True)
        for name, checkpoint, choices in (
            ("torch-fp32", safe, ("--backend", "torch", "--shapes", SHAPES)),
            ("torch-fp32-pickled", pickled, ("--backend", "torch", "--shapes", SHAPES)),
            ("onnx-fp32", safe, ("--backend", "onnx", "--shapes", SHAPES)),
            ("onnx-int8", safe, ("--backend", "onnx", "--precision", "int8", "--shapes", SHAPES)),
        ):
            art = str(work / name)
            seconds, peak, _ = run("compile", str(checkpoint), "--out", art, *choices)
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
