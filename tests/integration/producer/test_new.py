"""``submit --new``: what a complete run below OUT had as an input is left out, known by its content."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nermill.producer.runs.planning import Request, find_inputs, make_plan, without_tagged
from nermill.worker.contracts.layout import RunFolder, part_name
from nermill.worker.contracts.plan import read_plan
from nermill.worker.contracts.shard import read_documents, read_shard

arrivals = st.lists(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["one", "two", "three"])), max_size=5)


@settings(max_examples=25, deadline=None)
@given(arrivals, st.booleans())
def test_each_content_is_tagged_by_one_run(rounds, may_fail):
    """Files come, go and change between the calls; each run but perhaps the first completes."""
    with tempfile.TemporaryDirectory() as folder:
        inbox, out = Path(folder, "inbox"), f"{folder}/out"
        inbox.mkdir()
        tagged: list[set[str]] = []
        contents: set[str] = set()
        for number, files in enumerate(rounds):
            for name, text in files.items():
                (inbox / f"{name}.txt").write_text(text)
            now = {path.read_text() for path in inbox.iterdir()}
            if not now:
                continue
            request = Request((str(inbox),), out)
            found = without_tagged(out, find_inputs(request))
            if not found:
                assert now <= contents
                continue
            run, plan = make_plan(request, found=found)
            texts = {d.text or "" for s in plan.shards for d in read_documents(read_shard(run, s.index, s.sha256))}
            assert texts == now - contents
            if may_fail and number == 0:
                continue
            for shard in plan.shards:
                run.write(part_name(shard.index), b"")
            tagged.append(texts)
            contents |= texts
        assert sum(map(len, tagged)) == len(contents)


def test_the_command_tags_a_changed_and_a_new_file_alone(nermill, broker, serving, tmp_path):
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    inbox.mkdir()
    command = ("submit", inbox, "--out", out, "--broker", broker, "--new", "--wait", "--json")
    (inbox / "a.txt").write_text("Ada")
    (inbox / "b.txt").write_text("Bob")
    with serving():
        code, text, err = nermill(*command)
        assert (code, json.loads(text)["documents"]["total"]) == (0, 2)
        assert "0 of 2 files left out" in err
        code, text, err = nermill(*command)
        assert (code, json.loads(text)) == (0, {"run": None, "files": {"new": 0, "left_out": 2}})
        (inbox / "b.txt").write_text("Bob and Eve")
        (inbox / "copy.txt").write_text("Ada")
        (inbox / "c.txt").write_text("Carl")
        code, text, _ = nermill(*command)
        body = json.loads(text)
        assert (code, body["documents"]["total"]) == (0, 2)
    inputs = read_plan(RunFolder(body["run"])).inputs
    assert [Path(entry.uri).name for entry in inputs] == ["b.txt", "c.txt"]


def test_a_stream_has_no_new_files(nermill, tmp_path):
    code, out, err = nermill("submit", "-", "--out", tmp_path / "out", "--new")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--new knows files by their content" in err
