"""A lowercased WordPiece tokenizer that keeps the case of frequent word forms.

``The``, ``May`` and ``US`` become added tokens that stand for whole words as written; every other word is lowercased
as before. They take the places of tokens that English text does not use, then new places. In training a cased form
has the embedding of its lowercased word plus one vector per kind of case, so that a form that the training text
lacks has one too. ``CasedEmbedding.folded`` writes the sums into a plain table, and the model stays a plain BERT.

Other words with a capital letter get one more piece at their end, which stands for their kind of case: ``Grateful``
becomes ``grateful ##⇧`` and ``NATO`` becomes ``nato ##⇪``. A word's first piece, number and offsets stay the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn

from nermill.worker.tagging.tokens import CASE_PATTERNS

TITLE, UPPER = 1, 2  # kinds of case; 0 is a token as the tokenizer had it
MARKS = {TITLE: "⇧", UPPER: "⇪"}  # no letters and no punctuation marks, so that they stay with their word
_PATTERNS = dict(zip((UPPER, TITLE), CASE_PATTERNS, strict=True))


def _unused(token: str) -> bool:
    """Whether English text does not need a token: placeholders, and letters from Hebrew onward."""
    body = token.removeprefix("##")
    return token.startswith("[unused") or any(
        "\u0590" <= c < "\u1e00" or "\u2c00" <= c < "\ufb00" or c >= "\ufb10" for c in body
    )


def cased_forms(words: Iterable[str], vocabulary: dict[str, int], count: int) -> list[tuple[str, int]]:
    """Chooses ``count`` forms, each with its kind of case.

    A form counts where its lowercased word is one token. Words of one's own corpora that stand in both cases come
    first, most frequent first; title forms of the other words follow in the order of the vocabulary, which is by
    frequency.
    """
    seen = Counter(words)
    ranked: dict[tuple[str, int], float] = {}
    for word, number in seen.items():
        lower = word.lower()
        if not word.isascii() or not word.isalpha() or word == lower or lower not in vocabulary:
            continue
        kind = TITLE if word == lower.capitalize() else UPPER if word == word.upper() else 0
        if kind and seen[lower] and number > 1:
            ranked[word, kind] = min(number, seen[lower])
    forms = sorted(ranked, key=lambda form: (-ranked[form], form[0]))[:count]
    taken = set(forms)
    for word in vocabulary:  # in the order of its ids
        form = word.capitalize(), TITLE
        if len(forms) >= count:
            break
        if word.isascii() and word.isalpha() and len(word) > 1 and form not in taken:
            forms.append(form)
    return forms


def with_cased_forms(tokenizer: Tokenizer, forms: list[tuple[str, int]]) -> tuple[Tokenizer, Tensor, Tensor]:
    """Adds cased forms to a lowercasing WordPiece tokenizer.

    Returns:
        The tokenizer; the id of each token's lowercased word, int64, shape (vocabulary,); the kind of case of each
        token, int64, shape (vocabulary,).
    """
    state = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    kept = {token: number for token, number in vocabulary.items() if not _unused(token)}
    free = sorted(set(vocabulary.values()) - set(kept.values()))
    free += range(len(vocabulary), len(vocabulary) + max(0, len(forms) - len(free)))
    base, kind = list(range(max(len(vocabulary), len(kept) + len(forms)))), [0] * (len(kept) + len(forms))
    kind += [0] * (len(base) - len(kind))
    for (word, case), number in zip(forms, free, strict=False):
        kept[word] = number
        base[number], kind[number] = vocabulary[word.lower()], case
        state["added_tokens"].append(
            {
                "id": number,
                "content": word,
                "single_word": True,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": False,
            }
        )
    state["model"]["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
    state["added_tokens"].sort(key=lambda token: token["id"])
    return Tokenizer.from_str(json.dumps(state)), torch.tensor(base), torch.tensor(kind)


def with_case_marks(tokenizer: Tokenizer) -> tuple[Tokenizer, dict[int, int]]:
    """Adds a piece per kind of case behind words with a capital letter that are no added tokens.

    Returns:
        The tokenizer; the kind of case of each new token id, empty where the tokenizer has them already.
    """
    state = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    pieces = {f"##{mark}": kind for kind, mark in MARKS.items()}
    if pieces.keys() <= vocabulary.keys():
        return tokenizer, {}
    first = max(*vocabulary.values(), *(token["id"] for token in state["added_tokens"])) + 1
    vocabulary |= dict(zip(pieces, range(first, first + len(pieces)), strict=True))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    marks = [normalizers.Replace(Regex(form), MARKS[kind]) for kind, form in _PATTERNS.items()]
    tokenizer.normalizer = normalizers.Sequence([*marks, tokenizer.normalizer])
    return tokenizer, {vocabulary[piece]: kind for piece, kind in pieces.items()}


class CasedEmbedding(nn.Module):
    """Word embeddings, float32, whose cased forms share the row of their lowercased word.

    Args:
        words: Table of the lowercased tokens, float32, shape (tokens, width).
        base, kind: As ``with_cased_forms`` returns them.
    """

    base: Tensor
    kind: Tensor

    def __init__(self, words: Tensor, base: Tensor, kind: Tensor) -> None:
        super().__init__()
        self.words = nn.Parameter(words.clone())
        self.case = nn.Parameter(torch.zeros(2, words.shape[1]))
        self.register_buffer("base", base)
        self.register_buffer("kind", kind)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of ``ids``, float32, shape (*ids.shape, width)."""
        plain = nn.functional.embedding(self.base[ids], self.words)
        return plain + nn.functional.embedding(self.kind[ids], self._cases())

    def _cases(self) -> Tensor:
        return torch.cat([torch.zeros_like(self.case[:1]), self.case])

    def folded(self) -> Tensor:
        """The table of all tokens, float32, shape (vocabulary, width)."""
        return (self.words[self.base] + self._cases()[self.kind]).detach()
