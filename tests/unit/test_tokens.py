"""The cached tokenizer answers as the tokenizer itself, to the last id, word and offset."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nermill.worker.contracts.manifest import TOKENIZER_FILE, resolve_artifact
from nermill.worker.tagging import tokens
from nermill.worker.tagging.tokens import CASE_PATTERNS, CachedTokenizer, Tokens, tokenize

PIECES = [
    "the",
    "a",
    "un",
    "##able",
    "##s",
    "##⇪",
    "##⇧",
    "e",
    "##e",
    "東",
    "京",
    "é",
    "##é",
    "'",
    "-",
    "_",
    ".",
    "2",
    "##2",
    "Ab",
    "##c",
]


def wordpiece(*, lowercase: bool, forms: Sequence[str] = (), **options: bool) -> Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES, *map(chr, range(97, 123))]
    words += [f"##{chr(c)}" for c in range(97, 123)]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.add_tokens([AddedToken(form, single_word=True, normalized=False) for form in forms])
    return tokenizer


def marked() -> Tokenizer:
    tokenizer = wordpiece(lowercase=True, forms=["The", "US"])
    marks = [normalizers.Replace(Regex(form), mark) for form, mark in zip(CASE_PATTERNS, "⇪⇧", strict=True)]
    tokenizer.normalizer = normalizers.Sequence([*marks, tokenizer.normalizer])
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bundled() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(resolve_artifact("demo") / TOKENIZER_FILE))
    tokenizer.no_truncation()
    return tokenizer


TOKENIZERS = {
    "bundled": bundled,
    "lowercased": lambda: wordpiece(lowercase=True),
    "cased": lambda: wordpiece(lowercase=False),
    "accents kept": lambda: wordpiece(lowercase=True, strip_accents=False),
    "nothing cleaned": lambda: wordpiece(lowercase=True, clean_text=False, handle_chinese_chars=False),
    "whole forms": lambda: wordpiece(lowercase=True, forms=["The", "US", "Ab", "May"]),
    "marks of case": marked,
    "byte level": byte_level,
}
SPECIAL = [
    "[SEP]",
    "[MASK]",
    "[UNK]",
    "[",
    "]",
    "##s",
    "The",
    "US",
    "U.S.",
    "The_",
    "May2",
    "May's",
    "\u0301",
    "\u00a0",
]
ODD = [
    "\t",
    "\r\n",
    "\x00",
    "\x0b",
    "\x7f",
    "\u2028",
    "\u200d",
    "\ufffd",
    "東京",
    "İstanbul",
    "ß",
    "é",
    "e\u0301",
    "'",
    "—",
    "😀",
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(max_codepoint=127), max_size=60),
    st.lists(st.sampled_from([*SPECIAL, *ODD, " ", "the", "Unables", "don't", "a-b", "1.5%"]), max_size=12).map(
        "".join
    ),
)


def same(one: Tokens, other: Tokens) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Tokens.__slots__)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_have_the_tokens_words_and_offsets_of_the_tokenizer(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    cached = CachedTokenizer(tokenizer)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(TEXTS, max_size=5))
    def check(texts: list[str]) -> None:
        assert same(cached.tokenize(texts, split=False), tokenize(tokenizer, texts, split=False))

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_have_the_tokens_and_offsets_of_the_tokenizer(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    cached = CachedTokenizer(tokenizer)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.lists(TEXTS, min_size=1, max_size=6), max_size=4))
    def check(documents: list[list[str]]) -> None:
        assert same(cached.tokenize(documents, split=True), tokenize(tokenizer, documents, split=True))

    check()


def test_a_full_cache_is_emptied_and_tokens_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_PIECES", 20)
    tokenizer = bundled()
    cached = CachedTokenizer(tokenizer)
    rng = np.random.default_rng(3)
    for _ in range(50):
        texts = [" ".join(f"w{n}" for n in rng.integers(0, 500, 30)) for _ in range(3)]
        assert same(cached.tokenize(texts, split=False), tokenize(tokenizer, texts, split=False))
        assert len(cached._texts._cached.numbers) <= 20 + 3 * 30 + 2


@pytest.mark.parametrize("name", ["bundled", "marks of case"])
def test_a_cached_piece_is_not_tokenized_again(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    cached = CachedTokenizer(tokenizer)
    cached.tokenize(["Ada Lovelace met Charles Babbage."], split=False)
    asked: list[object] = []
    cached._texts._tokenizer = type("Asked", (), {"encode_batch": lambda self, *a, **k: asked.append(a)})()
    cached.tokenize(["Charles met Ada.", "Babbage met Lovelace."], split=False)
    assert asked == []


def test_threads_that_learn_at_once_get_the_tokenizer_s_answers() -> None:
    tokenizer = bundled()
    cached = CachedTokenizer(tokenizer)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            texts = [" ".join(f"x{n}" for n in rng.integers(0, 3000, 20)) for _ in range(4)]
            if not same(cached.tokenize(texts, split=False), tokenize(tokenizer, texts, split=False)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
