"""The HTML report: self-contained, all texts escaped, charts for every kind of report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nermill.worker.contracts.layout import REPORT_HTML, REPORT_JSON, RunFolder
from nermill.worker.evaluation import evaluate, write_report
from nermill.worker.evaluation.report import render_report
from tests.unit.evaluation.runs import Doc, make_run, stats_of, write_part

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "&lt;b&gt;",
    "</pre></style>",
    "\u202egnp.exe\x00",
]


class Page(HTMLParser):
    """Tags, link targets and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.targets.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunFolder) -> tuple[str, Page]:
    write_report(run, evaluate(run))
    html = run.read(REPORT_HTML).decode()
    return html, Page(html)


def test_who_finds_the_scores_finds_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, [Doc(["Ada"], ["B-PER"], ["B-PER"], id="a")])
    written: list[str] = []
    monkeypatch.setattr(RunFolder, "write", lambda self, name, data: written.append(name))
    write_report(run, evaluate(run))
    assert written == [REPORT_HTML, REPORT_JSON]


@pytest.fixture
def hostile_run(tmp_path: Path) -> RunFolder:
    tags = ["B-PER", "O", "B-<b>LOC</b>", "I-$x$", "O"]
    docs = [
        Doc(HOSTILE, tags, ["O"] * 5, id="<script>alert(3)</script>"),
        Doc(["a" * 100_000, "b"], ["B-PER", "O"], ["O", "B-PER"], id="long"),
        Doc(HOSTILE, ["O"] * 5, tags),
        Doc(["日本語", "😀"], ["B-PER", "O"], ["B-PER", "O"]),
        Doc(HOSTILE, None, tags),
    ]
    run = make_run(tmp_path, docs)
    write_part(run, 0, 0, docs, stats_of(0, 5, host="<b>host</b>", worker="$w$", device="cpu"))
    return run


def test_hostile_text_is_shown_and_harmless(hostile_run: RunFolder) -> None:
    html, page = page_of(hostile_run)
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "base", "form"}
    assert page.handlers == []
    assert "<script>alert(1)</script>" in page.text
    assert "<script>alert(3)</script>" in page.text
    assert "<b>host</b>" in page.text
    assert "[U+202E]gnp.exe[U+0000]" in page.text
    assert "\u202e" not in html
    assert "\x00" not in html
    assert len(html) < 300_000


def test_the_page_needs_nothing_else(hostile_run: RunFolder) -> None:
    html, page = page_of(hostile_run)
    assert [target for target in page.targets if not target.startswith(("#", "data:,"))] == []
    addresses = {address for address in re.findall(r"https?://[^\s\"'<>)]+", html) if "www.w3.org/" not in address}
    assert addresses == set()
    assert "@import" not in html
    assert {found for found in re.findall(r"url\(([^)]*)\)", html) if not found.startswith("#")} == set()


def test_ids_of_charts_do_not_collide(hostile_run: RunFolder) -> None:
    html, _ = page_of(hostile_run)
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(clips) > 5
    assert len(clips) == len(set(clips))


def test_ink_follows_the_page(hostile_run: RunFolder) -> None:
    html, page = page_of(hostile_run)
    assert "currentColor" in html
    assert "#010203" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert html.count("<svg") == 10
    assert not re.search(r"<svg[^>]* width=", html)
    assert "prolog" not in page.tags


def test_json_and_page_say_the_same(hostile_run: RunFolder) -> None:
    _, page = page_of(hostile_run)
    report = json.loads(hostile_run.read(REPORT_JSON))
    assert f"{100 * report['f1']:.2f}" in page.text
    assert f"{100 * report['accuracy_all_outside']:.2f}" in page.text
    for word in (report["scheme"], report["mode"], report["average"], f"one a {report['unit']}"):
        assert word in page.text


def test_a_page_without_gold(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Doc(["a", "b"], ["B-PER", "O"], None)] * 3)
    html, page = page_of(run)
    assert "no gold tags" in page.text
    assert "Word accuracy" not in page.text
    assert html.count("<svg") == 4


def test_a_page_without_measurements_or_mistakes(tmp_path: Path) -> None:
    docs = [Doc(["a", "b"], ["B-PER", "O"], ["B-PER", "O"])]
    run = make_run(tmp_path, docs)
    write_part(run, 0, 0, docs, stats=[])
    _, page = page_of(run)
    assert "None: every entity was found, and no other." in page.text


def test_a_page_without_any_entity(tmp_path: Path) -> None:
    html, _ = page_of(make_run(tmp_path, [Doc(["a", "b"], ["O", "O"], ["O", "O"])]))
    assert "0.00" in html


@pytest.mark.slow
def test_many_devices_and_many_labels(tmp_path: Path) -> None:
    labels = [f"LABEL-WITH-A-RATHER-LONG-NAME-{n}" for n in range(40)]
    docs = [Doc([f"w{n}"], [f"B-{label}"], [f"B-{label}"]) for n, label in enumerate(labels)]
    run = make_run(tmp_path, docs, per_shard=2)
    for shard in range(20):
        write_part(run, shard, 2 * shard, docs[2 * shard : 2 * shard + 2], stats_of(shard, 2, device=f"npu:{shard}"))
    _, page = page_of(run)
    assert "20 devices together" in page.text
    assert all(label in page.text for label in labels)


def test_a_comparison_is_shown(tmp_path: Path) -> None:
    gold = ["B-PER", "O"]
    one = make_run(tmp_path / "a", [Doc(["a", "b"], gold if n % 2 else ["O", "O"], gold) for n in range(40)])
    two = make_run(tmp_path / "b", [Doc(["a", "b"], gold, gold)] * 40)
    page = Page(render_report(evaluate(one, compare=two)))
    assert "+33.33" in page.text
    assert "20 documents" in " ".join(page.text.split())
