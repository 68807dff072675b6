"""Redaction of one text: other text stays, offsets are right, pseudonyms can be restored."""

from __future__ import annotations

from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nermill.producer.entities.redact import redact, replacement, restore

LABELS = ("PER", "ORG", "LOC")
texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab \u0301\u05d0\u0627\u200f\u200d😀\r\n")))


@st.composite
def documents(draw):
    """A text and random entities in it: overlapping, adjacent, empty, unordered."""
    text = draw(texts)
    place = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(place, place, st.sampled_from(LABELS), st.floats(0, 1)), max_size=8))
    return text, [entity(text, *sorted(span[:2]), *span[2:]) for span in spans]


def entity(text, start, end, label="PER", score=0.9):
    return {"start": start, "end": end, "label": label, "text": text[start:end], "score": score}


def numbered():
    """Functions that return the pseudonym of a label and text, and the text of a pseudonym."""
    known: dict[tuple[str, str], str] = {}
    numbers = count(1)

    def pseudonym(label: str, text: str) -> str:
        return known.setdefault((label, text), f"{label}_{next(numbers)}")

    return replacement("pseudonym", pseudonym=pseudonym), lambda new: next(k[1] for k, v in known.items() if v == new)


@given(documents(), st.sets(st.sampled_from(LABELS)), st.floats(0, 1))
def test_what_is_no_entity_is_unchanged_byte_for_byte(document, only, min_score):
    text, entities = document
    replaced = [e for e in entities if (not only or e["label"] in only) and e["score"] >= min_score]
    covered = {at for e in replaced for at in range(e["start"], e["end"])}
    outside = "".join(letter for at, letter in enumerate(text) if at not in covered)
    for how in ("label", "mask", "hash"):
        new, found = redact(text, entities, replacement(how, b"secret"), frozenset(only), min_score)
        redacted = {at for e in found if e["redacted"] for at in range(e["start"], e["end"])}
        left = "".join(letter for at, letter in enumerate(new) if at not in redacted)
        assert left.encode() == outside.encode()
        if how == "mask":
            assert len(new) == len(text)
            assert all(new[at] == "*" for at in covered)


@given(documents(), st.sets(st.sampled_from(LABELS)), st.floats(0, 1))
def test_a_pseudonym_and_back_gives_the_text(document, only, min_score):
    text, entities = document
    replace, original = numbered()
    new, found = redact(text, entities, replace, frozenset(only), min_score)
    assert restore(new, found, original).encode() == text.encode()


@given(documents(), st.sets(st.sampled_from(LABELS)))
def test_offsets_hold_in_the_new_text(document, only):
    text, entities = document
    new, found = redact(text, entities, replacement("label"), frozenset(only))
    assert [e["start"] for e in found] == sorted(e["start"] for e in found)
    spans = [e for e in found if e["redacted"]]
    for one, other in pairwise(spans):
        assert one["end"] <= other["start"]
    for e in found:
        assert new[e["start"] : e["end"]] == e["text"]
        if e["redacted"]:
            assert e["text"] == f"[{e['label']}]"
        else:
            assert any(e["text"] == given["text"] and e["label"] == given["label"] for given in entities)


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("Ada Lovelace in London.", [(0, 12, "PER"), (16, 22, "LOC")], "[PER] in [LOC]."),
        ("AdaBob", [(0, 3, "PER"), (3, 6, "PER")], "[PER][PER]"),  # adjacent
        ("Bank of England", [(0, 15, "ORG"), (8, 15, "LOC")], "[ORG]"),  # nested
        ("the Ada Lovelace Institute here", [(4, 16, "PER"), (8, 26, "ORG")], "the [ORG] here"),  # crossing
        ("Rene\u0301 came", [(0, 5, "PER")], "[PER] came"),  # combining acute
        ("\u05d0\u05d1 \u05d1\u05d9\u05e8\u05d5.", [(0, 2, "PER"), (4, 7, "LOC")], "[PER] \u05d1[LOC]."),
        ("👩\u200d🚀 Ada", [(4, 7, "PER")], "👩\u200d🚀 [PER]"),
        ("no one", [], "no one"),
        ("", [], ""),
    ],
)  # fmt: skip
def test_labels_stand_in_the_place_of_entities(text, spans, expected):
    entities = [entity(text, *span) for span in spans]
    assert redact(text, entities, replacement("label"))[0] == expected
    assert redact(text, entities[::-1], replacement("label"))[0] == expected


def test_entities_that_stay_move_with_the_text():
    text = "Ada of ACME in London"
    entities = [entity(text, 0, 3), entity(text, 7, 11, "ORG"), entity(text, 15, 21, "LOC", 0.4)]
    new, found = redact(text, entities, replacement("label"), frozenset(("PER", "LOC")), 0.5)
    assert new == "[PER] of ACME in London"
    assert [(e["start"], e["end"], e["text"], e["redacted"]) for e in found] == [
        (0, 5, "[PER]", True),
        (9, 13, "ACME", False),
        (17, 23, "London", False),
    ]


def test_hashes_depend_on_secret_label_and_text():
    one, other = replacement("hash", b"one"), replacement("hash", b"other")
    assert one("PER", "Ada") == one("PER", "Ada")
    assert len({one("PER", "Ada"), one("PER", "Bob"), one("ORG", "Ada"), other("PER", "Ada")}) == 4
    assert one("PER", "Ada").startswith("PER_")
    assert len(one("PER", "Ada")) == 20


def test_a_document_of_many_entities_is_no_trouble():
    text = "Ada Bob " * 50_000
    entities = [entity(text, at, at + 3, "PER" if at % 8 else "ORG") for at in range(0, len(text), 4)]
    new, found = redact(text, entities, replacement("label"), frozenset(("ORG",)))
    assert (len(found), new[:20]) == (100_000, "[ORG] Bob [ORG] Bob ")
