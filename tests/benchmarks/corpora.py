"""What is tagged: sentences, long documents, and a mix of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nermill.producer.sources import ReadOptions, Unit, open_sources
from nermill.worker.contracts.manifest import TOKENIZER_FILE, load_manifest, resolve_artifact
from nermill.worker.contracts.plan import Options
from nermill.worker.tagging.tokens import tokenize
from nermill.worker.tagging.windows import split_into_windows

ROOT = Path(__file__).parents[2]
CONLL = ROOT.parent / "shared" / "data" / "conll2003" / "valid.txt"
SAMPLE = ROOT / "model_build" / "demo" / "sample" / "wikigold.conll"


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind.

    Attributes:
        name: ``sentences``, ``long`` or ``mix``.
        texts: The documents.
        lengths: Length of every window in tokens, special tokens included, int64, shape (windows,).
    """

    name: str
    texts: tuple[str, ...]
    lengths: NDArray[np.int64]

    @property
    def tokens_per_document(self) -> float:
        """Real tokens of a document, special tokens included."""
        return float(self.lengths.sum()) / len(self.texts)


def default_data() -> Path:
    """CoNLL-2003's validation sentences where they lie beside the project, else the bundled sample."""
    return CONLL if CONLL.exists() else SAMPLE


def read_corpora(data: Path, documents: int) -> dict[str, Corpus]:
    """The three corpora, by name.

    Args:
        data: A CoNLL file.
        documents: Sentences to take, evenly spread; the other corpora are cut to as many words.
    """
    every_sentence = _texts(data, "sentence")
    sentences = spread(every_sentence, documents)
    share = len(sentences) / len(every_sentence)
    whole = _texts(data, "document")
    if len(whole) == 1:  # a file without -DOCSTART-
        whole = [" ".join(every_sentence[at : at + 14]) for at in range(0, len(every_sentence), 14)]
    long = spread(whole, max(2, round(share * len(whole))))
    mix = list(chain.from_iterable(zip(long, *[iter(sentences)] * (len(sentences) // len(long)), strict=False)))
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    kinds = {"sentences": sentences, "long": long, "mix": mix}
    return {name: _corpus(tokenizer, name, texts) for name, texts in kinds.items()}


def spread(texts: Sequence[str], count: int) -> list[str]:
    """``count`` of the texts, evenly spread; all where there are fewer."""
    if count >= len(texts):
        return list(texts)
    return [texts[number * len(texts) // count] for number in range(count)]


def flops_of(corpus: Corpus, artifact: Path | None = None) -> float:
    """Floating-point operations that one document needs (of the demo model), in matrix products, without padding."""
    from nermill.worker.engine.encoder import Architecture

    sizes = Architecture(**load_manifest(artifact or resolve_artifact("demo")).details["architecture"])
    return float(sum(length * sizes.flops_of_token(length) for length in corpus.lengths.tolist())) / len(corpus.texts)


def _texts(data: Path, unit: Unit) -> list[str]:
    options = ReadOptions(unit=unit)
    (source,) = open_sources([str(data)], options).sources
    return [" ".join(document.words) for document in source.documents(options) if document.words]


def _corpus(tokenizer: Tokenizer, name: str, texts: Sequence[str]) -> Corpus:
    longest = load_manifest(resolve_artifact("demo")).max_length
    tokens = tokenize(tokenizer, texts, split=False)
    return Corpus(name, tuple(texts), split_into_windows(tokens.bounds, longest, Options().overlap).lengths)
