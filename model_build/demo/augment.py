"""Changed copies of training sentences: mentions swapped for others of their type, and changed case."""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

from nermill.model_build.demo.corpora import MISC, Corpus, Sentence, Span, bits

_LOOSE = frozenset(["misc"])  # types too mixed to swap within


class Mentions:
    """Mentions of the training parts by pool.

    PER, ORG and LOC mentions are pooled over all corpora; MISC mentions within one fine type.
    """

    def __init__(self, corpora: list[Corpus]) -> None:
        self._pools: defaultdict[str, list[list[str]]] = defaultdict(list)
        for sentence in (s for corpus in corpora for document in corpus.train for s in document):
            for span in sentence.spans:
                if swappable(sentence, span):
                    self._pools[_pool(span)].append(sentence.words[span.start : span.end])

    def draw(self, span: Span, rng: random.Random) -> list[str]:
        """A mention that may stand in the place of ``span``."""
        return rng.choice(self._pools[_pool(span)])


def _pool(span: Span) -> str:
    return span.pool if MISC in span.labels else span.labels[0]


def swappable(sentence: Sentence, span: Span) -> bool:
    """Whether another mention may stand here: the label is decided, and it is no user name of a tweet."""
    first = sentence.words[span.start]
    named = first.startswith(("@", "#")) or (span.start > 0 and sentence.words[span.start - 1] == "@")
    return len(span.labels) == 1 and not named and span.pool not in _LOOSE and span.pool != MISC


def swap(sentence: Sentence, mentions: Mentions, rng: random.Random) -> Sentence:
    """Swaps each mention that may be, with a chance of one half."""
    words: list[str] = []
    allowed: list[int] = []
    spans: list[Span] = []
    end = 0
    for span in sentence.spans:
        words += sentence.words[end : span.start]
        allowed += sentence.allowed[end : span.start]
        mention, bits_ = sentence.words[span.start : span.end], sentence.allowed[span.start : span.end]
        if swappable(sentence, span) and rng.random() < 0.5:
            mention = mentions.draw(span, rng)
            bits_ = [bits(("I-" if i else "B-") + span.labels[0]) for i in range(len(mention))]
        spans.append(Span(len(words), len(words) + len(mention), span.labels, span.pool))
        words += mention
        allowed += bits_
        end = span.end
    return Sentence(words + sentence.words[end:], allowed + sentence.allowed[end:], spans)


def augmented(sentence: Sentence, mentions: Mentions, rng: random.Random, options: argparse.Namespace) -> Sentence:
    """The sentence, or a changed copy: shares ``options.swapped`` and ``options.recased``."""
    shouted = not any(c.islower() for word in sentence.words for c in word)
    if sentence.spans and not shouted and rng.random() < options.swapped:
        sentence = swap(sentence, mentions, rng)
    if rng.random() < options.recased:
        change = str.upper if rng.random() < 0.25 else str.lower
        sentence = Sentence([change(word) for word in sentence.words], sentence.allowed, sentence.spans)
    return sentence
