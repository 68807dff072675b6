"""The training corpora of the bundled demo model, read into one form with the four labels PER, ORG, LOC, MISC.

A corpus with other labels needs a reader that yields ``(words, tags)`` and a map from its types to ``Target``.
A target may leave the label open: a word then has several allowed labels, and the loss is the negative logarithm
of the sum of their probabilities. Corpora that do not annotate MISC use this for their ``O`` words.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LABELS = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
OUTSIDE = "O"
MISC = "MISC"
EVALUATION = Path("wikigold", "wikigold.conll.txt")  # no sentence of it may be trained on
NGRAM = 8  # a sentence that shares so many consecutive words with an evaluation corpus is left out

Tagged = tuple[list[str], list[str]]
Target = tuple[str, ...]  # the labels that an entity of a fine type may have


@dataclass(frozen=True)
class Span:
    """One entity of a sentence.

    Attributes:
        start, end: First word and the word behind the last one.
        labels: Coarse labels that are allowed; one where the corpus decides it.
        pool: Name of the set of mentions that may stand in its place.
    """

    start: int
    end: int
    labels: Target
    pool: str


@dataclass(frozen=True)
class Sentence:
    """One sentence.

    Attributes:
        words: Its words.
        allowed: Allowed labels of each word, one bit per label of ``LABELS``.
        spans: Its entities; those whose labels include ``O`` are open.
    """

    words: list[str]
    allowed: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Corpus:
    """Documents of one source, split into a training part and a held-out part.

    Attributes:
        name: Name of the source.
        train: Documents to train on, each a list of sentences.
        held: Documents held out; they choose the checkpoint and the settings.
        labels: Labels that the corpus annotates.
    """

    name: str
    train: list[list[Sentence]]
    held: list[list[Sentence]]
    labels: frozenset[str]


_ALL = frozenset(["PER", "ORG", "LOC", "MISC"])
_NO_MISC = frozenset(["PER", "ORG", "LOC"])
_PLAIN: dict[str, Target] = {label: (label,) for label in _ALL}

WNUT17: dict[str, Target] = {
    "person": ("PER",),
    "location": ("LOC",),
    "corporation": ("ORG",),
    "group": ("ORG",),
    "product": ("MISC",),
    "creative-work": ("MISC",),
}

# CoNLL-2003 counts names alone. CrossNER also tags terms (genres, tasks, compounds). A term without a capital letter
# becomes O. A term with one may be MISC or O: the other corpora decide. The same holds for journals and magazines
# (CoNLL: publishers are ORG, titles MISC), conferences and astronomical objects.
_TERM: Target = ("MISC", OUTSIDE)
CROSSNER: dict[str, Target] = {
    "person": ("PER",),
    "politician": ("PER",),
    "writer": ("PER",),
    "musicalartist": ("PER",),
    "scientist": ("PER",),
    "researcher": ("PER",),
    "organisation": ("ORG",),
    "politicalparty": ("ORG",),
    "band": ("ORG",),
    "university": ("ORG",),
    "location": ("LOC",),
    "country": ("LOC",),
    "astronomicalobject": ("LOC", "MISC"),
    "academicjournal": ("ORG", "MISC"),
    "magazine": ("ORG", "MISC"),
    "conference": ("ORG", "MISC"),
    "misc": ("MISC",),
    "event": ("MISC",),
    "election": ("MISC",),
    "award": ("MISC",),
    "book": ("MISC",),
    "poem": ("MISC",),
    "song": ("MISC",),
    "album": ("MISC",),
    "product": ("MISC",),
    "programlang": ("MISC",),
    "algorithm": _TERM,
    "task": _TERM,
    "field": _TERM,
    "metrics": _TERM,
    "discipline": _TERM,
    "theory": _TERM,
    "musicgenre": _TERM,
    "literarygenre": _TERM,
    "musicalinstrument": (OUTSIDE,),
    "chemicalcompound": _TERM,
    "chemicalelement": _TERM,
    "protein": _TERM,
    "enzyme": _TERM,
}
_DOMAINS = ("ai", "literature", "music", "politics", "science")


def bits(*labels: str) -> int:
    """The set of ``labels`` as bits, one per position in ``LABELS``."""
    return sum(1 << LABELS.index(label) for label in set(labels))


_O = bits(OUTSIDE)
OPEN = bits(OUTSIDE, "B-MISC", "I-MISC")


def spans_of(tags: list[str]) -> list[tuple[int, int, str]]:
    """Entities (start, end, type) of IOB1 or IOB2 tags; a type begins at ``B-`` or where the type changes."""
    spans: list[tuple[int, int, str]] = []
    start, kind = 0, ""
    for position, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, here = tag.partition("-")
        if kind and (prefix != "I" or here != kind):
            spans.append((start, position, kind))
            kind = ""
        if here and not kind:
            start, kind = position, here
    return spans


def with_targets(words: list[str], tags: list[str], targets: dict[str, Target], outside: list[int]) -> Sentence:
    """Maps the types of one tagged sentence.

    Args:
        words: Words of the sentence.
        tags: IOB tag of each word.
        targets: Allowed coarse labels of each type.
        outside: Allowed labels of each word where it is in no entity, as bits.

    Raises:
        KeyError: ``targets`` lacks a type.
    """
    allowed, spans = list(outside), []
    for start, end, kind in spans_of(tags):
        labels = targets[kind]
        cased = any(character.isupper() for word in words[start:end] for character in word)
        if MISC in labels and targets is CROSSNER and not cased:
            labels = (OUTSIDE,)
        names = [label for label in labels if label != OUTSIDE]
        rest = [OUTSIDE] if OUTSIDE in labels else []
        for position in range(start, end):
            prefix = "B-" if position == start else "I-"
            begins = [f"B-{name}" for name in names] if rest else []  # an open entity may begin later
            allowed[position] = bits(*(prefix + name for name in names), *begins, *rest)
        if names:
            spans.append(Span(start, end, labels, kind if kind in CROSSNER or kind in WNUT17 else labels[0]))
    return Sentence(words, allowed, spans)


def read_columns(path: Path, word: int = 0, tag: int = 1, comments: bool = False) -> Iterator[list[Tagged]]:
    """Yields the documents of a column file, each a list of (words, tags).

    ``-DOCSTART-`` lines and, with ``comments``, ``# newdoc`` lines begin a document. With ``comments``, other lines
    that begin with ``#`` are left out. A line with an empty word is left out.
    """
    document: list[Tagged] = []
    words: list[str] = []
    tags: list[str] = []
    for line in [*path.read_text("utf-8").split("\n"), "", "-DOCSTART-"]:
        begins = line.startswith("-DOCSTART-") or (comments and line.startswith("# newdoc"))
        if not line.strip() or begins:
            if words:
                document.append((words, tags))
                words, tags = [], []
            if begins and document:
                yield document
                document = []
        elif not (comments and line.startswith("# ")):
            columns = line.split("\t") if "\t" in line else line.split()
            if columns[word].strip():
                words.append(columns[word].strip())
                tags.append(columns[tag].strip())


def _shingles(words: list[str]) -> Iterator[tuple[str, ...]]:
    kept = [text for word in words if (text := re.sub(r"\W", "", word.lower()))]
    size = min(NGRAM, max(len(kept), 1))
    return (tuple(kept[i : i + size]) for i in range(len(kept) - size + 1))


def overlap(words: list[str], evaluation: set[tuple[str, ...]]) -> bool:
    """Whether a sentence stands in the evaluation corpus, whole or in ``NGRAM`` consecutive words."""
    return any(shingle in evaluation for shingle in _shingles(words))


def evaluation_shingles(path: Path) -> set[tuple[str, ...]]:
    """Runs of ``NGRAM`` words, and whole sentences, of a two-column evaluation corpus; its tags are not read."""
    return {s for document in read_columns(path) for words, _ in document for s in _shingles(words)}


def demonyms(documents: list[list[Sentence]]) -> set[str]:
    """Words that are mostly a MISC entity of one word: WNUT17 leaves nationalities and the like at ``O``."""
    all_, misc = Counter[str](), Counter[str]()
    for sentence in (s for d in documents for s in d):
        all_.update(sentence.words)
        misc.update(sentence.words[s.start] for s in sentence.spans if s.labels == (MISC,) and s.end == s.start + 1)
    return {word for word, count in misc.items() if count >= 2 and count > 0.7 * all_[word] and word[0].isupper()}


def read_plain(paths: list[Path], evaluation: set[tuple[str, ...]]) -> tuple[Corpus, int]:
    """Sentences without labels, for a teacher to label: one a line, words split by spaces, the first column alone.

    WikiSplit (Botha et al. 2018), for which this is written, writes quotation marks as two apostrophes or accents.

    Returns:
        The sentences, every label allowed; and how many were left out because they share ``NGRAM`` words with the
        ``evaluation`` corpus.
    """
    documents, left_out = [], 0
    for line in (line for path in paths for line in path.read_text("utf-8").splitlines()):
        words = ['"' if word in ("''", "``") else word for word in line.partition("\t")[0].split()]
        if overlap(words, evaluation):
            left_out += 1
        elif words:
            documents.append([Sentence(words, [bits(*LABELS)] * len(words), [])])
    return Corpus("plain", documents, [], frozenset()), left_out


def _split(
    name: str, documents: list[list[Sentence]], share: float, seed: int, labels: frozenset[str], group: int = 1
) -> Corpus:
    """Holds out about ``share`` of the sentences: runs of ``group`` documents, drawn with ``seed``."""
    runs = [documents[i : i + group] for i in range(0, len(documents), group)]
    random.Random(f"{name} {seed}").shuffle(runs)
    wanted, held = share * sum(map(len, documents)), 0
    parts: tuple[list[list[Sentence]], list[list[Sentence]]] = ([], [])
    for run in runs:
        parts[0 if held >= wanted else 1].extend(run)
        held += sum(map(len, run)) if held < wanted else 0
    return Corpus(name, parts[0], parts[1], labels)


def read_all(data: Path, share: float = 0.08, seed: int = 20) -> tuple[list[Corpus], dict[str, int]]:
    """Reads the five training corpora below ``data``.

    Returns:
        The corpora, and how many sentences of each were left out because they stand in ``wikigold/``.
    """
    evaluation = evaluation_shingles(data / EVALUATION)
    left_out: Counter[str] = Counter()

    def read(
        name: str,
        paths: list[Path],
        targets: dict[str, Target],
        outside: Callable[[str], int],
        word: int = 0,
        tag: int = 1,
        comments: bool = False,
    ) -> list[list[Sentence]]:
        documents = []
        for path in paths:
            for raw in read_columns(path, word, tag, comments):
                kept = [(words, tags) for words, tags in raw if not overlap(words, evaluation)]
                left_out[name] += len(raw) - len(kept)
                if kept:
                    documents.append([with_targets(w, t, targets, [outside(x) for x in w]) for w, t in kept])
        return documents

    def sentences(documents: list[list[Sentence]]) -> list[list[Sentence]]:
        return [[sentence] for document in documents for sentence in document]

    def closed(_: str) -> int:
        return _O

    def open_to_misc(_: str) -> int:
        return OPEN

    conll = read("conll", [data / "conll2003" / "train.txt"], _PLAIN, closed, tag=3)
    parts = [data / "crossner" / domain / f"{part}.txt" for domain in _DOMAINS for part in ("train", "dev", "test")]
    crossner = sentences(read("crossner", parts, CROSSNER, closed))
    known = demonyms([*conll, *crossner])
    parts = [data / "wnut17" / "train.conll", data / "wnut17" / "dev.conll"]
    wnut = sentences(read("wnut17", parts, WNUT17, lambda word: OPEN if word in known else _O))
    parts = [data / "btc" / f"{segment}.conll" for segment in "abegh"]
    btc = sentences(read("btc", parts, _PLAIN, open_to_misc))
    uner = read("uner", [data / "uner_ewt" / "dev.iob2"], _PLAIN, open_to_misc, 1, 2, comments=True)
    return [
        _split("conll", conll, share, seed, _ALL, group=1),
        _split("crossner", crossner, share, seed, _ALL),
        _split("wnut17", wnut, share, seed, _ALL),
        _split("btc", btc, share, seed, _NO_MISC),
        _split("uner", uner, max(share, 0.1), seed, _NO_MISC),
    ], dict(left_out)
