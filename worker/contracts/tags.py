"""Tag schemes (IOB1, IOB2, BIOES): tags are interpreted as conlleval interprets them, and converted to IOB2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, get_args

Scheme = Literal["IOB1", "IOB2", "BIOES"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
OUTSIDE = "O"

_BIOES_ONLY = "ESLU"  # L and U are BILOU's names for E and S
STARTING = "BSU"  # prefixes that begin a chunk, whatever stands before them
_CLOSING = "ESLU"


def to_iob2(tags: Sequence[str], scheme: Scheme) -> tuple[str, ...]:
    """The tags of one sequence as IOB2, with the same chunks.

    Args:
        tags: One tag for each word: ``O`` or ``<prefix>-<label>``.
        scheme: Scheme of the tags. ``IOB1`` accepts a ``B-`` anywhere, as conlleval does; ``BIOES`` accepts BILOU's
            ``L-`` and ``U-`` too.

    Raises:
        ValueError: a tag does not belong to the scheme, or the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown tag scheme {scheme!r}; one of {', '.join(SCHEMES)}")
    out = []
    before, label_before = OUTSIDE, ""
    for index, tag in enumerate(tags):
        prefix, label = _split(tag, index)
        starts = _starts_chunk(before, label_before, prefix, label)
        if prefix in _BIOES_ONLY and scheme != "BIOES":
            raise ValueError(f"tag {tag!r} at index {index} is not {scheme}; it is BIOES")
        if prefix == "I" and starts and scheme == "IOB2":
            raise ValueError(
                f"tag {tag!r} at index {index} starts a chunk, which IOB2 writes as 'B-{label}'; it is IOB1"
            )
        out.append(tag if prefix == OUTSIDE else f"{'B' if starts else 'I'}-{label}")
        before, label_before = prefix, label
    return tuple(out)


def detect_scheme(sequences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme in which sequences of tags are written.

    It is BIOES where there is any ``E-``, ``S-``, ``L-`` or ``U-``, else IOB1 where any ``I-`` starts a chunk, else
    IOB2.

    Raises:
        ValueError: a tag belongs to no scheme.
    """
    found: Scheme = "IOB2"
    for tags in sequences:
        before, label_before = OUTSIDE, ""
        for index, tag in enumerate(tags):
            prefix, label = _split(tag, index)
            if prefix in _BIOES_ONLY:
                found = "BIOES"
            elif prefix == "I" and found == "IOB2" and _starts_chunk(before, label_before, prefix, label):
                found = "IOB1"
            before, label_before = prefix, label
    return found


def merge_schemes(one: Scheme, other: Scheme) -> Scheme:
    """The scheme of the whole, from the schemes of two parts of it: the one that allows more."""
    order: tuple[Scheme, ...] = ("IOB2", "IOB1", "BIOES")
    return max(one, other, key=order.index)


def is_tag(tag: str) -> bool:
    """Whether a tag belongs to any scheme: ``O``, or a known prefix, a dash and a label."""
    return split_tag(tag) is not None


def _starts_chunk(before: str, label_before: str, prefix: str, label: str) -> bool:
    if prefix == OUTSIDE:
        return False
    return prefix in STARTING or before == OUTSIDE or before in _CLOSING or label != label_before


def _split(tag: str, index: int) -> tuple[str, str]:
    parsed = split_tag(tag)
    if parsed is None:
        raise ValueError(
            f"tag {tag!r} at index {index} fits none of {', '.join(SCHEMES)}; tags are 'O' or like 'B-PER'"
        )
    return parsed


@lru_cache(maxsize=4096)
def split_tag(tag: str) -> tuple[str, str] | None:
    """Prefix and label of a tag: ``("O", "")`` for ``O``, else one of ``B I E S L U`` and the label; else None."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, label = tag.partition("-")
    if len(prefix) != 1 or prefix not in "BIESLU" or not dash or not label:
        return None
    return prefix, label
