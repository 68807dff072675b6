"""What the pages show is run: their commands in order, in one folder, and their Python as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nermill.worker.process.settings import Settings
from tests.reference import PAGES, REASONS, SKIPPED, commands, comparable, generated, stage, steps

RUN = [
    page for page in PAGES if page not in {"worker/queue/README.md", "producer/entities/README.md"}
]  # their own tests


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", RUN)
@pytest.mark.slow
def test_the_commands_of_a_page_run_and_print_what_it_shows(root: Path, page: str) -> None:
    wanted = [step for step in steps((root / page).read_text("utf-8")) if step.command not in SKIPPED]
    if not wanted:
        return
    with stage() as run:
        for step in wanted:
            output = run(step.command)
            if step.shown:
                assert comparable(output) == comparable("\n".join(step.shown)), (
                    f"{page}: python -m tests.reference {page}"
                )


def test_pages_that_show_no_command_are_few(root: Path) -> None:
    silent = {page for page in RUN if not list(steps((root / page).read_text("utf-8")))}
    assert silent <= {"worker/contracts/README.md", "tests/README.md", "deploy/README.md", "ARCHITECTURE.md"}


@pytest.mark.parametrize("page", PAGES)
def test_tables_made_from_the_code_are_up_to_date(root: Path, page: str) -> None:
    text = (root / page).read_text("utf-8")
    assert text == generated(text), f"python -m tests.reference --generated {page}"


@pytest.mark.parametrize(
    "page", [*PAGES, "SECURITY.md", "tests/benchmarks/README.md", "model_build/demo/MODEL_CARD.md"]
)
def test_links_lead_to_files_and_headings_that_exist(root: Path, page: str) -> None:
    text = (root / page).read_text("utf-8")
    for target, _, heading in (match.partition("#") for match in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)):
        place = (root / page).parent / target if target else root / page
        assert place.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", place.read_text("utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{target}#{heading}"


def test_paths_of_the_map_exist(root: Path) -> None:
    text = (root / "ARCHITECTURE.md").read_text("utf-8")
    named = set(re.findall(r"`((?:producer|worker|model_build|deploy|tests)/[\w./-]*)`", text))
    assert len(named) > 30
    for path in named:
        assert "NAME" in path or (root / path).exists(), path


@pytest.mark.parametrize(
    ("program", "page"), [("nermill", "producer/README.md"), ("nermill-build", "model_build/README.md")]
)
def test_every_command_has_its_section_with_its_options(root: Path, program: str, page: str) -> None:
    text = (root / page).read_text("utf-8")
    for name in commands(program):
        assert re.search(rf"^##+ {name}$", text, re.MULTILINE), name
        assert re.search(rf"<!-- generated: options {program} {name}( \w+)? -->", text), name


def test_settings_and_reject_reasons_are_described(root: Path) -> None:
    settings = (root / "worker/README.md").read_text("utf-8")
    assert all(f"NERMILL_{name.upper()}" in settings for name in vars(Settings()))
    reasons = re.findall(r"^\| `(\w+)` \| (?:producer|worker)", (root / "worker/contracts/README.md").read_text(), re.M)
    assert tuple(reasons) == REASONS


def test_the_readme_is_short(root: Path) -> None:
    assert len((root / "README.md").read_text("utf-8").splitlines()) <= 120
