"""Allowed roots, and how a run's files are written and removed."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nermill.worker.contracts import deadline
from nermill.worker.contracts.errors import StoreError, UsageError
from nermill.worker.contracts.layout import TEMPORARY_SECONDS, RunFolder
from nermill.worker.contracts.store import ObjectStore
from nermill.worker.process.settings import Settings, is_allowed, read_settings, split_roots


@pytest.mark.parametrize("uri", ["{root}", "{root}/run=1", "{root}/a/../run=1", "file://{root}/run=1"])
def test_what_lies_below_a_root_is_allowed(tmp_path: Path, uri: str) -> None:
    root = tmp_path / "out"
    root.mkdir()
    assert is_allowed(uri.format(root=root), Settings(allowed_roots=str(root)).roots)


@pytest.mark.parametrize(
    "uri",
    [
        "{root}-other/run=1", "{root}/../other", "{root}/link/run=1", "file://{root}/../other", "file://{root}/link",
        "local://{root}/link", "simplecache::file://{root}", "{root}/x::memory://y", "memory://x", "s3://bucket/ab",
        "s3://bucket/a/../ab", "s3://other/a", "{root}\0", "/", "", "..",
    ],
)  # fmt: skip
def test_what_lies_elsewhere_is_not(tmp_path: Path, uri: str) -> None:
    root = tmp_path / "out"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    roots = Settings(allowed_roots=f"{root}:s3://bucket/a").roots
    assert is_allowed("s3://bucket/a/run=1", roots)
    assert not is_allowed(uri.format(root=root), roots)


@pytest.mark.parametrize(
    ("text", "roots"),
    [
        ("/srv/a", ["/srv/a"]),
        ("/srv/a:/srv/b", ["/srv/a", "/srv/b"]),
        ("/srv/a:/srv/b,/srv/c", ["/srv/a", "/srv/b", "/srv/c"]),
        ("s3://minio:9000/bucket", ["s3://minio:9000/bucket"]),
        ("/srv/a:s3://minio:9000/bucket/deep", ["/srv/a", "s3://minio:9000/bucket/deep"]),
        ("s3://minio:9000/bucket, /srv/a, gs://other", ["s3://minio:9000/bucket", "/srv/a", "gs://other"]),
        ("s3://user:secret@minio:9000/bucket", ["s3://user:secret@minio:9000/bucket"]),
        ("s3://bucket/a:b", ["s3://bucket/a:b"]),
        ("/srv/a:", ["/srv/a"]),
        ("out", ["out"]),
        ("", []),
    ],
)
def test_roots_are_split_at_commas_and_between_local_paths(text: str, roots: list[str]) -> None:
    assert split_roots(text) == roots
    assert not any(":9000" in root and "://" not in root for root in Settings(allowed_roots=text).roots)


def test_a_folder_whose_name_has_separators_is_one_root(tmp_path: Path) -> None:
    folder = tmp_path / "run of 10:30:/x, y"
    folder.mkdir(parents=True)
    assert split_roots(str(folder)) == [str(folder)]
    assert Settings(allowed_roots=str(folder)).roots == (str(folder),)


def test_a_port_opens_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = read_settings({"NERMILL_ALLOWED_ROOTS": "s3://minio:9000/bucket"}).roots
    assert is_allowed("s3://minio:9000/bucket/run=1", roots)
    for elsewhere in ("s3://minio/run=1", "s3://minio:9000/other", str(tmp_path / "9000/bucket/run=1"), "/9000/bucket"):
        assert not is_allowed(elsewhere, roots)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3:/bucket", "'s3' is no absolute path"),
        ("minio:9000/bucket", "'minio' is no absolute path"),
        ("/srv/a:out", "'out' is no absolute path"),
        ("s3://a:/srv/b", "'s3://a:/srv/b' is two roots in one; separate them by a comma"),
        ("s3://a:s3://b", "is two roots in one; separate them by a comma"),
        ("s3://", "'s3://' names no bucket or folder"),
        ("s3:///", "names no bucket or folder"),
        ("s3://bucket/*", "'s3://bucket/*' is a pattern"),
        ("/srv/*", "'/srv/*' is a pattern"),
        ("~/out", "'~/out' is not expanded; write the path out"),
        ("simplecache::s3://bucket", "a chain of stores"),
        ("/srv/a\0", "has a null byte"),
        (",", "names no root"),
        (" : ", "names no root"),
        (__file__, "is no folder"),
    ],
)
def test_an_invalid_root_is_refused_at_start(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read_settings({"NERMILL_ALLOWED_ROOTS": text})
    assert "NERMILL_ALLOWED_ROOTS" in str(caught.value)


@pytest.mark.parametrize("kind", ["disk", "file URI", "memory"])
def test_an_exclusive_write_leaves_what_is_there(tmp_path: Path, kind: str) -> None:
    uris = {"disk": str(tmp_path), "file URI": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}
    run = RunFolder(uris[kind])
    assert run.write("x/part", b"first", exclusive=True)
    assert not run.write("x/part", b"second", exclusive=True)
    assert run.read("x/part") == b"first"
    assert run.write("x/part", b"third")
    assert run.read("x/part") == b"third"
    assert run.list("x") == ["part"]
    run.remove("x/part")
    run.remove("x/part")
    assert not run.exists("x/part")


class Bucket:
    """The part of an fsspec file system that a put needs; ``mode`` is the mode that the put supports."""

    def __init__(self, *, takes_mode: bool) -> None:
        self.files: dict[str, bytes] = {}
        self.takes_mode = takes_mode
        self.hidden = ""

    def invalidate_cache(self, path: str) -> None: ...

    def exists(self, path: str) -> bool:
        return path in self.files and path != self.hidden

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if options and not self.takes_mode:
            raise TypeError("unexpected keyword argument 'mode'")
        if options == {"mode": "create"} and path in self.files:
            raise FileExistsError(path)
        self.files[path] = value


def test_a_store_with_conditional_puts_decides_a_race() -> None:
    bucket = Bucket(takes_mode=True)
    store = ObjectStore(bucket)
    assert store.create("part", b"first")
    bucket.hidden = "part"  # it came between the look and the put
    assert not store.create("part", b"second")
    assert bucket.files == {"part": b"first"}


def test_a_store_without_them_is_looked_at_first() -> None:
    store = ObjectStore(bucket := Bucket(takes_mode=False))
    assert store.create("part", b"first")
    assert not store.create("part", b"second")
    assert bucket.files == {"part": b"first"}


def test_a_call_that_hangs_is_given_up_and_its_slot_comes_back() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        deadline.within(0.1, lambda: time.sleep(0.5))
    assert time.monotonic() - began < 0.4
    assert deadline.within(1, lambda: 7) == 7
    with pytest.raises(KeyError, match="own"):
        deadline.within(1, lambda: dict[str, int]()["own"])


def test_a_fault_of_the_store_names_file_reason_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "rejects").touch()
    with pytest.raises(StoreError, match=r"rejects/part: cannot write it \(File exists\); put a folder in the place"):
        RunFolder(str(tmp_path)).write("rejects/part", b"")
    with pytest.raises(StoreError, match=r"missing: cannot read it \(No such file or directory\)"):
        RunFolder(str(tmp_path)).read("missing")


def test_sweeping_takes_what_no_living_writer_can_own(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for folder in ("_rejects", "_shards"):
        (tmp_path / folder).mkdir()
    aside = uuid.uuid4().hex
    of_committed = [f".part-00000.parquet.{aside}", f"_shards/.part-00000.parquet.{aside}"]
    young = [f".part-00001.parquet.{aside}", f"._report.json.{aside}"]
    old = [f"._plan.json.{aside}", f"_shards/.shard-00001.arrow.{aside}"]
    others = ["part-00000.parquet", ".hidden", ".part-00000.parquet.notes", "_rejects/rejects.parquet"]
    for name in of_committed + young + old + others:
        (tmp_path / name).touch()
    before = time.time() - TEMPORARY_SECONDS - 10
    for name in [*old, ".hidden"]:
        os.utime(tmp_path / name, (before, before))
    assert run.remove_stale_files() == len(of_committed + old)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(young + others)


def test_a_disk_that_fails_while_stale_files_are_looked_for_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(str(tmp_path))
    (tmp_path / f"._plan.json.{uuid.uuid4().hex}").touch()

    def fail(path: str) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("nermill.worker.contracts.layout.os", SimpleNamespace(stat=fail))
    with pytest.raises(StoreError, match=r"_plan.*cannot look at it \(Input/output error\)"):
        run.remove_stale_files()


def test_a_disk_without_hard_links_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    run = RunFolder(str(tmp_path))
    assert run.write("part", b"first", exclusive=True)
    assert not run.write("part", b"second", exclusive=True)
    assert run.read("part") == b"first"
    assert run.list() == ["part"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, in order."""
    paths: list[str] = []
    fsync = os.fsync

    def recording(descriptor: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    return paths


def test_a_new_folder_is_synced_in_the_one_around_it(tmp_path: Path, synced: list[str]) -> None:
    run = RunFolder(str(tmp_path / "out" / "run=r"))
    run.write("_shards/shard", b"documents")
    folders = [path for path in synced if os.path.isdir(path)]
    assert folders == [str(tmp_path.parent), str(tmp_path), f"{tmp_path}/out", run.uri, run.path("_shards")]
    synced.clear()
    run.write("_shards/another", b"documents")
    assert [path for path in synced if os.path.isdir(path)] == [run.path("_shards")]


def test_a_folder_whose_maker_may_have_died_is_synced_again(tmp_path: Path, synced: list[str]) -> None:
    run = RunFolder(str(tmp_path / "run=r"))
    (tmp_path / "run=r").mkdir()
    run.write("part", b"")
    assert [path for path in synced if os.path.isdir(path)] == [str(tmp_path), run.uri]


def test_a_file_that_is_there_is_synced_on_demand(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "part").touch()
    RunFolder(str(tmp_path)).sync("part")
    assert synced == [str(tmp_path)]
    RunFolder("memory://run").sync("part")
    assert synced == [str(tmp_path)]


def test_a_disk_that_does_not_answer_is_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(str(tmp_path))
    (tmp_path / "part").touch()
    assert run.exists("part")
    assert not run.exists("missing")
    assert not run.exists("part/below")

    stat = os.stat

    def broken(path: Any, **options: Any) -> os.stat_result:
        if str(path) == run.path("part"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(StoreError, match=r"part: cannot look at it \(Input/output error\)"):
        run.exists("part")
