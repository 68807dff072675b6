"""Which labels a run writes and an evaluation counts, and under which names: ``--map``, ``--only``, ``--min-score``.

A *counter of label changes* is a ``Counter`` with keys such as ``gold.mapped.person``: see ``key`` and ``nested``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.tags import OUTSIDE, split_tag

# Other names of PER, ORG, LOC and MISC in corpora and models; used for suggestions only.
_USUAL = {
    "PER": ("per", "pers", "person", "people", "human"),
    "ORG": ("org", "organisation", "organization", "corporation", "company", "group", "institution"),
    "LOC": ("loc", "location", "place", "gpe", "geo-loc", "country", "city", "facility", "fac"),
    "MISC": ("misc", "miscellaneous", "other", "product", "event", "creative-work", "work_of_art", "norp"),
}


@dataclass(frozen=True)
class LabelChoice:
    """Which labels are renamed or left out, of gold tags and of the model alike.

    Attributes:
        map: New name by label; ``O`` leaves the label out. A label that is not in it keeps its name.
        only: Labels that stay, by their new names; empty for all.
        min_score: Entities of the model below this score, in [0, 1], are left out.
    """

    map: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    min_score: float = 0.0

    @property
    def is_all(self) -> bool:
        """Whether no label is renamed and no entity left out."""
        return not self.map and not self.only and not self.min_score

    def target(self, label: str) -> str:
        """A label's name in the output; empty where it is left out."""
        name = self.map.get(label, label)
        return "" if name == OUTSIDE or (self.only and name not in self.only) else name

    def tags(self, tags: Sequence[str], changes: Counter[str]) -> list[str]:
        """IOB2 gold tags under their new names.

        Args:
            tags: One tag for each word.
            changes: Counter of label changes; updated.
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
        """Checks that the labels of the options are labels of the model.

        Args:
            labels: The model's labels, without prefixes.
            model: The model's name in messages.

        Raises:
            UsageError: a label is neither one of the model's nor mapped to one of the model's.
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
    """Key in a counter of label changes.

    Args:
        side: ``gold`` or ``predicted``.
        label: The label before the change.
        name: The label after it; empty where it was left out.
    """
    return f"{side}.{'mapped' if name else 'left_out'}.{label}"


def nested(changes: Mapping[str, int]) -> dict[str, dict[str, dict[str, int]]]:
    """A counter of label changes as nested objects: side, then ``mapped`` or ``left_out``, then label."""
    found: dict[str, dict[str, dict[str, int]]] = {
        side: {"mapped": {}, "left_out": {}} for side in ("gold", "predicted")
    }
    for name, count in sorted(changes.items()):
        side, what, label = name.split(".", 2)
        found[side].setdefault(what, {})[label] = count
    return found


def bare_labels(labels: Iterable[str]) -> list[str]:
    """A model's labels without prefixes and without ``O``, sorted, each once."""
    return sorted({bare_label(label) for label in labels} - {""})


def bare_label(label: str) -> str:
    """A model's label without its prefix; empty for ``O``; a label without a prefix as it is."""
    parsed = split_tag(label)
    return label if parsed is None else parsed[1]


def suggest_map(gold: Sequence[str], known: Sequence[str]) -> str:
    """A ``--map`` option that gives gold labels the names of a model's labels.

    Args:
        gold: Gold labels that the model does not have.
        known: The model's labels.
    """
    called = {alias: name for name in known for alias in (name.lower(), *_USUAL.get(name.upper(), ()))}
    pairs = [f"{label}={called[label.lower()]}" for label in gold if label.lower() in called]
    return f"--map {','.join(pairs)}" if pairs else f"--map {gold[0]}={known[0] if known else 'LABEL'}"


def choice_of(options: Any) -> LabelChoice:
    """The label options of a run.

    Args:
        options: ``contracts.plan.Options``.
    """
    return LabelChoice(options.map, options.only, options.min_score)
