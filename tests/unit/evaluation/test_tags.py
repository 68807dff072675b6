"""Tag schemes: conversion keeps the chunks."""

from __future__ import annotations

import pytest

from nermill.worker.contracts.tags import detect_scheme, to_iob2

# Two people beside each other, then a place that follows a person at once.
IOB2 = ("B-PER", "I-PER", "B-PER", "O", "B-ORG", "B-LOC", "I-LOC", "I-LOC")
IOB1 = ("I-PER", "I-PER", "B-PER", "O", "I-ORG", "I-LOC", "I-LOC", "I-LOC")
BIOES = ("B-PER", "E-PER", "S-PER", "O", "S-ORG", "B-LOC", "I-LOC", "E-LOC")
BILOU = ("B-PER", "L-PER", "U-PER", "O", "U-ORG", "B-LOC", "I-LOC", "L-LOC")


@pytest.mark.parametrize(("tags", "scheme"), [(IOB2, "IOB2"), (IOB1, "IOB1"), (BIOES, "BIOES"), (BILOU, "BIOES")])
def test_every_scheme_is_found_and_becomes_the_same_iob2(tags, scheme):
    assert detect_scheme([("O", "O"), tags]) == scheme
    assert to_iob2(tags, scheme) == IOB2


def test_a_chunk_ends_with_its_sequence():
    assert detect_scheme([("B-PER",), ("I-PER",)]) == "IOB1"
    assert detect_scheme([("B-PER", "I-PER")]) == "IOB2"


def test_the_scheme_may_show_late():
    assert detect_scheme([("B-PER", "O"), ("I-PER",), ("S-PER",)]) == "BIOES"


def test_a_mixed_file_keeps_the_chunks_that_conlleval_sees():
    assert to_iob2(("B-PER", "I-PER", "I-LOC", "O", "I-PER"), "IOB1") == ("B-PER", "I-PER", "B-LOC", "O", "B-PER")


def test_a_closed_bioes_chunk_is_not_continued():
    assert to_iob2(("S-PER", "I-PER", "E-PER", "E-PER"), "BIOES") == ("B-PER", "B-PER", "I-PER", "B-PER")


def test_no_tags_and_only_outside():
    assert to_iob2((), "IOB2") == ()
    assert detect_scheme([]) == "IOB2"
    assert to_iob2(("O", "O"), "IOB1") == ("O", "O")


@pytest.mark.parametrize("tag", ["PER", "M-PER", "b-PER", "B-", "B_PER", "-PER", "", "OO", "o"])
def test_a_tag_of_no_scheme_is_named_with_its_index(tag):
    with pytest.raises(ValueError, match=rf"{tag!r} at index 1 "):
        detect_scheme([("O", tag)])
    with pytest.raises(ValueError, match=rf"{tag!r} at index 1 "):
        to_iob2(("O", tag), "BIOES")


def test_labels_may_hold_dashes():
    assert to_iob2(("I-WORK-OF-ART", "I-WORK-OF-ART"), "IOB1") == ("B-WORK-OF-ART", "I-WORK-OF-ART")


def test_a_tag_that_the_named_scheme_does_not_have():
    with pytest.raises(ValueError, match="'E-PER' at index 1 is not IOB2"):
        to_iob2(("B-PER", "E-PER"), "IOB2")
    with pytest.raises(ValueError, match="'I-LOC' at index 1 starts a chunk"):
        to_iob2(("B-PER", "I-LOC"), "IOB2")
    with pytest.raises(ValueError, match="unknown tag scheme 'IOBES'"):
        to_iob2(("O",), "IOBES")  # type: ignore[arg-type]
