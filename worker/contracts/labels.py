"""Which labels a run writes and an evaluation counts, and under which names: ``--map``, ``--only``, ``--min-score``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.tags import OUTSIDE, split_tag

# How other corpora and models call what most call PER, ORG, LOC and MISC; only for suggestions.
_USUAL = {
    "PER": ("per", "pers", "person", "people", "human"),
    "ORG": ("org", "organisation", "organization", "corporation", "company", "group", "institution"),
    "LOC": ("loc", "location", "place", "gpe", "geo-loc", "country", "city", "facility", "fac"),
    "MISC": ("misc", "miscellaneous", "other", "product", "event", "creative-work", "work_of_art", "norp"),
}


@dataclass(frozen=True)
class LabelChoice:
    """What becomes of labels, the gold tags' and the model's alike.

    Attributes:
        map: New name of a label; ``O`` leaves it out. Labels that are not named keep theirs.
        only: Labels that stay, by their new names; empty for all.
        min_score: Entities of the model below this score, in [0, 1], are left out.
    """

    map: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    min_score: float = 0.0

    @property
    def is_all(self) -> bool:
        """Whether everything stays as it is."""
        return not self.map and not self.only and not self.min_score

    def target(self, label: str) -> str:
        """A label's name in the output; empty where it is left out."""
        name = self.map.get(label, label)
        return "" if name == OUTSIDE or (self.only and name not in self.only) else name

    def tags(self, tags: Sequence[str], changes: Counter[str]) -> list[str]:
        """IOB2 gold tags under their new names.

        Args:
            tags: A tag a word.
            changes: Counts the entities that were mapped or left out.
        """
        chosen = []
        for tag in tags:
            prefix, _, label = tag.partition("-")
            name = self.target(label) if label else ""
            chosen.append(f"{prefix}-{name}" if name else OUTSIDE)
            if prefix == "B" and name != label:
                changes[key("gold", label, name)] += 1
        return chosen

    def check(self, labels: Iterable[str], model: str) -> None:
        """Looks whether a model has what the options speak of.

        Args:
            labels: The model's labels, without prefixes.
            model: Its name in messages.

        Raises:
            UsageError: a label that is neither the model's nor mapped to one of its.
        """
        own = set(labels)
        new = {self.map.get(label, label) for label in own}
        listed = ", ".join(sorted(own))
        for label in self.only:
            if label not in new:
                raise UsageError(f"--only {label}: the model {model} has no label {label}; it has {listed}")
        for label, name in self.map.items():
            if label not in own and name not in new and name != OUTSIDE:
                raise UsageError(
                    f"--map {label}={name}: the model {model} has neither {label} nor {name}; it has {listed}"
                )


def key(side: str, label: str, name: str) -> str:
    """How a changes calls entities of ``gold`` or ``predicted`` whose label became ``name``, or was left out."""
    return f"{side}.{'mapped' if name else 'left_out'}.{label}"


def nested(changes: Mapping[str, int]) -> dict[str, dict[str, dict[str, int]]]:
    """A changes as the report has it: side, then what was done, then label."""
    found: dict[str, dict[str, dict[str, int]]] = {
        side: {"mapped": {}, "left_out": {}} for side in ("gold", "predicted")
    }
    for name, count in sorted(changes.items()):
        side, what, label = name.split(".", 2)
        found[side].setdefault(what, {})[label] = count
    return found


def bare_labels(labels: Iterable[str]) -> list[str]:
    """A model's labels without their prefixes, sorted, each once."""
    return sorted({bare_label(label) for label in labels} - {""})


def bare_label(label: str) -> str:
    """A model's label without its prefix: empty for ``O``; one without a prefix as it is."""
    parsed = split_tag(label)
    return label if parsed is None else parsed[1]


def suggest_map(gold: Sequence[str], known: Sequence[str]) -> str:
    """A ``--map`` that gives gold labels the names that a model knows.

    Args:
        gold: Gold labels that the model does not know.
        known: The model's labels.
    """
    called = {alias: name for name in known for alias in (name.lower(), *_USUAL.get(name.upper(), ()))}
    pairs = [f"{label}={called[label.lower()]}" for label in gold if label.lower() in called]
    return f"--map {','.join(pairs)}" if pairs else f"--map {gold[0]}={known[0] if known else 'LABEL'}"


def choice_of(options: Any) -> LabelChoice:
    """What a run's ``Options`` say of labels."""
    return LabelChoice(options.map, options.only, options.min_score)
