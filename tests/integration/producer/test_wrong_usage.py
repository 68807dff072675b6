"""Every option of every command with a value that it does not have: one line that names it, and exit code 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import typer
from pyarrow import parquet as pq

from nermill.producer import cli
from nermill.producer.entities.redacted import redact_run
from nermill.producer.runs import run as runs
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import Queue
from tests.stand_in import next_claim

# Option, a wrong value, what the message says besides the value. Whoever adds an option has to add a line.
WRONG = {
    "--aggregation": ("best", "one of none, simple, first, average, max"),
    "--broker": ("amqp://host", "broker URLs begin with redis://"),
    "--compare": ("nowhere", "no run here"),
    "--costs": ("nowhere.json", "nermill-build bench ART --json writes one"),
    "--delimiter": ("ab", "one character"),
    "--device": ("gpu", "say cpu"),
    "--devices": ("gpu", "say auto"),
    "--format": ("docx", "one of "),
    "--gold": ("nowhere.conll", "No such file"),
    "--high-water": ("0", "--high-water"),
    "--id-column": ("key", "name the id with --id-column"),
    "--key": ("{file}", "; name "),
    "--layout": ("rows", "one of documents, entities"),
    "--limit": ("0", "--limit"),
    "--linger": ("soon", "--linger"),
    "--map": ("person", "'person' is not FROM=TO"),
    "--max-chars": ("0", "--max-chars"),
    "--min-accuracy": ("2", "--min-accuracy"),
    "--min-documents-per-second": ("-1", "--min-documents-per-second"),
    "--min-f1": ("high", "--min-f1"),
    "--min-score": ("2", "--min-score"),
    "--model": ("nowhere", "no model artifact"),
    "--on-error": ("ignore", "one of reject, fail"),
    "--only": ("PER,", "an empty label"),
    "--out": ("{file}/below", "cannot be a folder"),
    "--overlap": ("5000", "--overlap"),
    "--part-mib": ("0", "--part-mib"),
    "--price-per-hour": ("inf", "what one device costs an hour"),
    "--priority": ("urgent", "one of high, normal, low"),
    "--resume": ("nowhere", "--resume"),
    "--shard-documents": ("many", "--shard-documents"),
    "--tag-column": ("0", "columns count from 1"),
    "--tag-names": ("O,PER", "'PER' is no tag"),
    "--text-column": ("body", "name the text with --text-column"),
    "--to": ("{file}", "exists already"),
    "--unit": ("word", "one of sentence, document"),
    "--word-column": ("0", "columns count from 1"),
    "--with": ("magic", "one of label, mask, hash, pseudonym"),
}
FINDINGS = {"--broker", "--devices", "--model", "--out"}  # doctor goes on: what is wrong is what it is asked for
NEED_NO_PLACE = {"doctor", "tag"}
NOWHERE = dict.fromkeys(("run", "plan", "submit", "list"), "no such f")
NOWHERE["restore"] = "its name shows no format"
HELPFUL = {"help", "install_completion", "show_completion"}
GROUP: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = GROUP.commands


def options() -> Iterator[tuple[str, str, str]]:
    """Command, flag and environment variable of each option."""
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.param_type_name == "option" and option.name not in HELPFUL:
                yield name, option.opts[0], str(option.envvar or "")


def is_flag(command: str, flag: str) -> bool:
    return any(option.is_flag for option in COMMANDS[command].params if flag in option.opts)


@pytest.fixture(scope="module")
def base(broker_url, tmp_path_factory) -> dict[str, list[str]]:
    """Arguments with which each command would succeed, over an unfinished and a finished run."""
    from nermill.worker.contracts.broker import redis_client
    from nermill.worker.contracts.ledger import Ledger

    from .conftest import ARTIFACT, tag

    folder = tmp_path_factory.mktemp("usage")
    corpus, scored = folder / "in.parquet", folder / "in.conll"
    pq.write_table(pa.table({"id": ["a"], "text": ["Ada"]}), corpus)
    scored.write_text("Ada B-PER\n\n")
    out, queue = str(folder / "out"), Queue(broker_url)
    waiting, _ = make_plan(Request((str(corpus),), out))
    finished, plan = make_plan(Request((str(scored),), out))
    runs.send(finished, plan, queue)
    ledger = Ledger(redis_client(broker_url))
    while claim := next_claim(ledger, ARTIFACT):
        tag(claim, ledger)
    runs.wait(finished, plan, queue)
    redacted, key = f"{folder}/redacted.jsonl", f"{folder}/names.key"
    redact_run(finished, plan, redacted, "pseudonym", key)
    broker = ["--broker", broker_url]
    return {
        "run": [str(corpus), "--out", f"{folder}/new", "--devices", "cpu"],
        "plan": [str(corpus)],
        "submit": [str(corpus), "--out", f"{folder}/new", *broker],
        "status": [waiting.uri, *broker],
        "resume": [waiting.uri, *broker],
        "rejects": [finished.uri, "--retry", *broker],
        "cancel": [waiting.uri, *broker],
        "evaluate": [finished.uri],
        "compact": [finished.uri],
        "show": [finished.uri],
        "tag": ["Ada"],
        "export": [finished.uri, "--format", "conll", "--to", f"{folder}/new.conll"],
        "redact": [finished.uri, "--to", f"{folder}/new.jsonl", "--with", "pseudonym", "--key", f"{folder}/new.key"],
        "restore": [redacted, "--key", key, "--to", f"{folder}/back.jsonl"],
        "publish": [finished.uri, f"{folder}/table"],
        "list": [out, *broker],
        "doctor": [*broker],
    }


@pytest.mark.parametrize(("command", "flag", "variable"), list(options()))
def test_a_wrong_value_is_one_line(nermill, base, monkeypatch, command, flag, variable):
    flags = is_flag(command, flag)
    value, told = ("maybe", f"Option {flag!r} does not take a value") if flags else WRONG[flag]
    file = next((argument for argument in base[command] if "/" in argument and Path(argument).is_file()), __file__)
    value = value.replace("{file}", file)
    given = [f"{flag}={value}"] if flags else [flag, value]
    code, out, err = nermill(command, *base[command], *given)
    if command == "doctor" and flag in FINDINGS:
        assert (code, err) == (1, "")
        assert "FAILS" in out
        return
    check(code, out, err, told, flag if told == flag or flags else value)
    if not variable or (flag in base[command] and not flags):  # a flag has the last word
        return
    monkeypatch.setenv(variable, value)
    check(*nermill(command, *base[command]), variable if flags else told, flag if told == flag or flags else value)


def check(code: int, out: str, err: str, *told: str) -> None:
    assert (code, out) == (2, ""), err
    assert all(words in err for words in told), err
    assert re.fullmatch(r"nermill: [^\n]+\n", err)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_missing_or_wrong_place_is_one_line(nermill, base, command, tmp_path):
    if command in NEED_NO_PLACE:
        return
    code, out, err = nermill(command, *base[command][1:])
    check(code, out, err, "Missing argument")
    code, out, err = nermill(command, str(tmp_path / "nowhere"), *base[command][1:])
    check(code, out, err, NOWHERE.get(command, "no run here"))
    code, out, err = nermill(command, *base[command], "--no-such-option")
    check(code, out, err, "No such option: --no-such-option")


@pytest.mark.parametrize(
    "command", sorted(COMMANDS.keys() - {"run", "plan", "submit", "list", "doctor", "tag", "restore"})
)
def test_a_run_of_the_first_layout_is_refused_with_the_way_on(nermill, base, command, tmp_path):
    run = tmp_path / "run=3f2a91c07b55"
    run.mkdir()
    (run / "plan.json").write_text('{"plan_version": 1}')
    (tmp_path / "run=3f2a91c07b56").mkdir()
    code, out, err = nermill(command, run, *base[command][1:])
    check(code, out, err, str(run), "plan version 1", "submit its input again")
    assert [path.name for path in run.iterdir()] == ["plan.json"]


def test_nothing_is_written_into_a_run_of_the_first_layout(nermill, base, tmp_path):
    (tmp_path / "plan.json").write_text('{"plan_version": 1}')
    for command in ("run", "submit"):
        check(*nermill(command, *base[command], "--out", tmp_path), "a run's folder itself")
    check(*nermill("evaluate", *base["evaluate"], "--compare", tmp_path), "submit its input again")


def test_mistyped_names_are_met_with_the_right_ones(nermill, base):
    corpus = base["plan"][0]
    check(*nermill("statsu"), "No such command 'statsu'. Did you mean 'status'?")
    check(*nermill("plan", corpus, "--keep-txt"), "--keep-text", "--keep-txt")
    check(*nermill("plan", corpus.replace("in.parquet", "inn.parquet")), f"did you mean {corpus}?")
    run = base["show"][0]
    check(*nermill("show", run[:-1]), f"did you mean {run}?")
