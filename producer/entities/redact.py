"""Replaces the entities of a text and restores them: spans, replacements and offsets of one document."""

from __future__ import annotations

import hashlib
import hmac
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, get_args

Method = Literal["label", "mask", "hash", "pseudonym"]
METHODS: tuple[Method, ...] = get_args(Method)
MASK = "*"

Entity = dict[str, Any]
Replace = Callable[[str, str], str]  # from label and text of an entity to its replacement


def replacement(method: Method, secret: bytes = b"", pseudonym: Replace | None = None) -> Replace:
    """The function that computes replacements.

    Args:
        method: ``label``: ``[PER]``; ``mask``: one ``*`` a code point; ``hash``: ``PER_`` and 16 hexadecimal digits of
            an HMAC-SHA256 of label and text; ``pseudonym``: the result of the function ``pseudonym``.
        secret: Key of the HMAC.
        pseudonym: Returns the pseudonym of a label and a text.
    """

    def hashed(label: str, text: str) -> str:
        digest = hmac.new(secret, f"{label}\0{text}".encode(), hashlib.sha256).hexdigest()
        return f"{label}_{digest[:16]}"

    if method == "label":
        return lambda label, _: f"[{label}]"
    if method == "mask":
        return lambda _, text: MASK * len(text)
    if method == "hash":
        return hashed
    assert pseudonym is not None
    return pseudonym


def redact(
    text: str, entities: Sequence[Entity], replace: Replace, only: frozenset[str] = frozenset(), min_score: float = 0.0
) -> tuple[str, list[Entity]]:
    """Replaces the entities of a text; all other code points stay.

    Entities that overlap are replaced as one span, with the label of the longest; adjacent entities stay separate.

    Args:
        text: The document.
        entities: ``start``, ``end``, ``label``, ``text``, ``score``; offsets are half-open code points, in any order.
        replace: Returns an entity's replacement.
        only: Labels to replace; empty for all.
        min_score: Entities with a lower score stay.

    Returns:
        The new text, and its entities in order, with ``start``, ``end`` and ``text`` of the new text and ``redacted``.
        Entities that are not replaced and overlap a replaced span are left out.
    """
    chosen = [e for e in entities if (not only or e["label"] in only) and e["score"] >= min_score]
    spans = _union(chosen)
    ends = [span["end"] for span in spans]

    def is_touched(entity: Entity) -> bool:
        after = bisect_right(ends, entity["start"])
        return after < len(spans) and spans[after]["start"] < entity["end"]

    parts = [(e["start"], e["end"], True, e) for e in spans]
    parts += [(e["start"], e["end"], False, e) for e in entities if not is_touched(e)]
    out: list[str] = []
    found: list[Entity] = []
    at = length = 0  # positions in the old text and in the new one
    for start, end, is_span, entity in sorted(parts, key=itemgetter(0, 1)):
        out.append(text[at:start])
        length += start - at
        at = start
        new = replace(entity["label"], text[start:end]) if is_span else text[start:end]
        found.append({**entity, "start": length, "end": length + len(new), "text": new, "redacted": is_span})
        if is_span:
            out.append(new)
            length += len(new)
            at = end
    out.append(text[at:])
    return "".join(out), found


def restore(text: str, entities: Sequence[Entity], original: Callable[[str], str]) -> str:
    """The original of a redacted text.

    Args:
        text: A redacted text.
        entities: Its entities, as ``redact`` returns them.
        original: Returns the text that a replacement stands for.
    """
    out: list[str] = []
    at = 0
    for entity in entities:
        if entity["redacted"]:
            out += [text[at : entity["start"]], original(text[entity["start"] : entity["end"]])]
            at = entity["end"]
    return "".join([*out, text[at:]])


def _union(entities: Sequence[Entity]) -> list[Entity]:
    """Disjoint spans that cover all entities; entities that overlap become one span, empty ones are ignored."""
    spans: list[Entity] = []
    longest = 0
    for entity in sorted(entities, key=lambda e: (e["start"], -e["end"])):
        size = entity["end"] - entity["start"]
        if size <= 0:
            continue
        if spans and entity["start"] < spans[-1]["end"]:
            label = entity["label"] if size > longest else spans[-1]["label"]
            score = max(entity["score"], spans[-1]["score"])
            longest = max(size, longest)
            spans[-1] = {**spans[-1], "end": max(entity["end"], spans[-1]["end"]), "label": label, "score": score}
        else:
            spans.append({key: entity[key] for key in ("start", "end", "label", "score")})
            longest = size
    return spans
