"""Tables of costs: seconds of one call of each shape, published or measured, and what they say of a corpus.

A table is a JSON object with ``kind`` (``estimate`` or ``measured``), ``source``, ``shapes`` (each with ``rows``,
``length`` and ``seconds``, or with ``refused``) and, where it was measured, ``layout`` of the graph and ``is_free``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Literal, get_args

from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import Layout

Shape = tuple[int, int]
Way = Literal["padded", "bucketed", "packed", "equal"]

SPECIAL_TOKENS = 2  # of each window


@dataclass(frozen=True)
class Costs:
    """Seconds of one call of each shape.

    Attributes:
        name: Of the table.
        kind: ``estimate`` where the numbers are somebody else's, ``measured`` where ``bench`` took them.
        source: Where they come from.
        seconds: By shape (rows, length).
        layout: Of the graph. Published tables are of plain graphs; that packed ones take as long is an assumption.
        is_free: Whether the graph takes other shapes as well.
        artifact_sha256: Of the artifact that was measured.
    """

    name: str
    kind: str
    source: str
    seconds: dict[Shape, float]
    layout: Layout = "packed"
    is_free: bool = False
    artifact_sha256: str = ""

    @property
    def way(self) -> Way:
        """How a worker fills the batches of this graph."""
        if self.layout == "equal":
            return "equal"
        return "bucketed" if self.layout == "plain" and not self.is_free else "packed"

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways that this table says something about, the one with the most padding first."""
        return ("padded", "equal") if self.layout == "equal" else ("padded", "bucketed", "packed")

    @property
    def longest(self) -> int:
        """Length of the longest rows."""
        return max(length for _, length in self.seconds)

    def token_seconds(self, shape: Shape) -> float:
        """Seconds of one token of a full batch."""
        return self.seconds[shape] / (shape[0] * shape[1])

    def row_seconds(self, shape: Shape) -> float:
        """Seconds of one row of a full batch."""
        return self.seconds[shape] / shape[0]


def load_costs(table: str) -> Costs:
    """Reads a table of nermill-build by its name, or a file that ``bench --json`` wrote.

    Raises:
        UsageError: there is no such table, or it cannot be read.
    """
    shipped = _shipped()
    try:
        body = json.loads(shipped.get(table, Path(table)).read_text("utf-8"))
        seconds = {(int(e["rows"]), int(e["length"])): float(e["seconds"]) for e in body["shapes"] if "seconds" in e}
        about = {name: body[name] for name in ("layout", "is_free", "artifact_sha256") if name in body}
        costs = Costs(table, str(body["kind"]), str(body["source"]), seconds, **about)
        if any(value <= 0 or rows < 1 or length < 1 for (rows, length), value in seconds.items()):
            raise ValueError("rows, lengths and seconds are above 0")
    except OSError as error:
        raise UsageError(
            f"--costs {table}: cannot be read ({error.strerror}); tables by name are {', '.join(sorted(shipped))}, and "
            "nermill-build bench ART --json writes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--costs {table}: not a table of costs ({error}); bench --json writes one") from None
    if not seconds:
        raise UsageError(f"--costs {table}: names no shape")
    return costs


def _shipped() -> dict[str, Path]:
    """The tables that come with nermill-build, by name; none where it is not installed."""
    spec = find_spec("nermill.model_build")
    if spec is None or spec.origin is None:
        return {}
    return {path.stem: path for path in (Path(spec.origin).parent / "costs").glob("*.json")}


def seconds_of_full_batches(lengths: Mapping[int, int], costs: Costs, window: int, overlap: int) -> dict[Way, float]:
    """Device seconds of a corpus, every batch taken as full.

    Args:
        lengths: How many documents have so many tokens, special tokens included.
        costs: The table.
        window: Most tokens of a window; at most the table's longest rows.
        overlap: Tokens that neighbouring windows of a longer document share.

    Returns:
        ``padded``: one window in a row of the longest length; ``bucketed``: one in a row of the length that takes it in
        the least time; ``packed``: windows behind one another, rows without gaps; ``equal``: windows of one length. Of
        a graph of layout ``equal`` the first and the last, of others the first three.
    """
    seconds: dict[Way, float] = dict.fromkeys(get_args(Way), 0.0)
    padded = min(costs.row_seconds(shape) for shape in costs.seconds if shape[1] == costs.longest)
    for length, documents in lengths.items():
        windows, tokens = windows_of(length, window, overlap)
        windows *= documents
        fitting = [shape for shape in costs.seconds if shape[1] >= tokens]
        seconds["padded"] += windows * padded
        seconds["bucketed"] += windows * min(map(costs.row_seconds, fitting))
        seconds["packed"] += windows * tokens * min(map(costs.token_seconds, fitting))
        seconds["equal"] += windows * tokens * costs.token_seconds(min(fitting, key=itemgetter(1)))
    return {way: seconds[way] for way in costs.ways}


def windows_of(length: int, window: int, overlap: int) -> tuple[int, int]:
    """Into how many windows of at most ``window`` tokens a document of ``length`` tokens is split, and the tokens of
    each, special tokens included; ``nermill.worker.tagging.windows`` splits it so."""
    if length <= window:
        return 1, length
    content, capacity = length - SPECIAL_TOKENS, window - SPECIAL_TOKENS
    shared = min(overlap, capacity // 2)
    windows = -(-(content - shared) // (capacity - shared))
    return windows, -(-(content + (windows - 1) * shared) // windows) + SPECIAL_TOKENS
