"""The documentation agrees with the program."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nermill.worker.evaluation
from nermill.worker.evaluation import evaluate
from tests.unit.evaluation.runs import Doc, make_run

FOLDER = Path(nermill.worker.evaluation.__file__).parent
BY_NAME = {"per_label", "devices"}  # their keys are labels and devices
UNWRITTEN = {"inputs", "options", "artifact", "evaluated_with", "excerpts"}  # described where they come from


def fields_of(report: Any, key: str = "") -> Iterator[str]:
    """Every field name of a report."""
    if isinstance(report, list):
        for entry in report:
            yield from fields_of(entry)
    elif isinstance(report, dict):
        for name, value in report.items():
            if key not in BY_NAME:
                yield name
            if name not in UNWRITTEN:
                yield from fields_of(value, name)


def test_every_field_of_a_report_is_documented(tmp_path: Path) -> None:
    gold = ["B-PER", "O", "O"]
    docs = [Doc(["a", "b", "c"], gold if n % 2 else ["O"] * 3, gold) for n in range(10)]
    run = make_run(tmp_path, docs)
    documented = set(re.findall(r"`([a-z0-9_]+)[`\[]", (FOLDER / "REPORT.md").read_text("utf-8")))
    assert set(fields_of(evaluate(run, compare=run))) - documented == set()


def test_the_room_is_light_until_a_page_is_drawn() -> None:
    """The producer imports it, so it imports no accelerator library, and matplotlib only to draw a chart."""
    program = "import sys, nermill.worker.evaluation; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pyarrow" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "onnxruntime",
        "tokenizers",
        "celery",
        "matplotlib",
        "jinja2",
        "seqeval",
    }
