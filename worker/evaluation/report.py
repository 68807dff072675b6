"""Writes a report: ``_report.json`` for programs, ``_report.html`` for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from nermill.worker.contracts.layout import REPORT_HTML, REPORT_JSON, RunFolder
from nermill.worker.evaluation.charts import draw_charts, stage_name

_TEMPLATE = "report.html.jinja"
# Control characters, and characters that change the direction of writing: a page with them would not show the text.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def write_report(run: RunFolder, report: dict[str, Any]) -> None:
    """Writes both files into the run's folder, last the one by which others know that the run has its report.

    Args:
        run: The run's folder.
        report: What ``evaluate`` returned.

    Raises:
        StoreError: a file cannot be written.
    """
    html = render_report(report)
    run.write(REPORT_HTML, html.encode())
    run.write(REPORT_JSON, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def render_report(report: dict[str, Any]) -> str:
    """The report as one HTML page without scripts and references to other files; all texts in it are escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "number": _number, "json": _json, "visible": _visible}
    environment.globals |= {"pieces": _pieces, "stage_name": stage_name}
    source = files("nermill.worker.evaluation").joinpath(_TEMPLATE).read_text("utf-8")
    return environment.from_string(source).render(report=report, charts=draw_charts(report))


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def _number(value: float) -> str:
    """Whole numbers with separators of thousands; others with three significant digits."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _visible(text: str) -> str:
    """Text with invisible characters replaced by their code points, as in ``[U+200E]``."""
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _pieces(words: list[str], spans: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An excerpt's words as pieces of text: entities with their label, and the text between them without."""
    at = 0
    for span in spans:
        if span["first"] > at:
            yield {"text": " ".join(words[at : span["first"]]), "label": None, "correct": True}
        text = " ".join(words[span["first"] : span["end"]])
        yield {"text": text, "label": span["label"], "correct": span["correct"]}
        at = span["end"]
    if at < len(words):
        yield {"text": " ".join(words[at:]), "label": None, "correct": True}
