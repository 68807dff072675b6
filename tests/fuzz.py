"""Mutations for fuzz tests, from a seed: messages, ledger entries and input files that are almost valid."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import uuid
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from nermill.producer.sources import ReadOptions, open_sources
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.message import FINISH_RUN, KEY_PREFIX, QUEUE, TAG_DOCUMENTS, TAG_SHARD
from nermill.worker.contracts.shard import encode_shard, shard_table

ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 1e308, "", "x", "\x00", "😀" * 50, [], {}, [[]], {"a": {}}, ["x"] * 30,
    "__import__('os')", {"__type__": "datetime", "__value__": 3}, "2099-01-01T00:00:00", "9" * 400,
)  # fmt: skip


class Touch:
    """An object that creates a file when it is unpickled, which shows that it was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def message(task: Any = TAG_SHARD, *arguments: Any, body: Any = None) -> dict[str, Any]:
    """A message as kombu writes it to a list of the queue; ``body`` replaces ``[arguments, {}, {}]``."""
    task_id, tag = str(uuid.uuid4()), str(uuid.uuid4())
    encoded = json.dumps([arguments, {}, {}] if body is None else body).encode()
    headers = {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": None, "group": None}
    return {
        "body": b64encode(encoded).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {**headers, "argsrepr": "()", "kwargsrepr": "{}", "timelimit": [None, None], "retries": 0},
        "properties": {
            "correlation_id": task_id,
            "reply_to": str(uuid.uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": QUEUE, "routing_key": QUEUE},
            "priority": 6,
            "body_encoding": "base64",
            "delivery_tag": tag,
        },
    }


def fresh(rng: random.Random) -> dict[str, Any]:
    """A valid message of one of the three tasks; no ledger knows its run."""
    return rng.choice(
        [
            message(TAG_SHARD, "r1", "/nowhere", 3),
            message(FINISH_RUN, "r1", "/nowhere"),
            message(TAG_DOCUMENTS, ["Ada met Charles.", ["in", "London"]]),
        ]
    )


def messages(rng: random.Random, count: int, canary: Path) -> Iterator[bytes]:
    """Mutated messages for the queue; one that is unpickled, followed or executed makes the canary."""
    makers = (
        _noise, _flipped, _with_odd_field, _with_odd_arguments, lambda r: _with_odd_body(r, canary),
        lambda r: _with_odd_task(r, canary), lambda r: _pickled(r, canary),
    )  # fmt: skip
    for _ in range(count):
        yield rng.choice(makers)(rng)


def commands(rng: random.Random, count: int, canary: Path) -> Iterator[bytes]:
    """Mutated messages for the control channel; ``shutdown``, which workers obey, is not among them."""
    methods = [
        "ping",
        "no_such_method",
        "revoke",
        "rate_limit",
        "pool_shrink",
        "objgraph",
        "memdump",
        "__class__",
        5,
        None,
    ]
    for _ in range(count):
        command = {
            "method": rng.choice(methods), "arguments": rng.choice([{}, {"task_id": ["x"]}, {"x": 1}, *ODD_VALUES]),
            "destination": rng.choice([None, None, ["nobody"], *ODD_VALUES]), "pattern": None, "matcher": None,
            "reply_to": rng.choice([None, {"exchange": "x", "routing_key": "y"}, *ODD_VALUES]), "ticket": "t",
        }  # fmt: skip
        whole = message(body=command)
        whole["headers"] = {"clock": rng.choice([1, *ODD_VALUES]), "expires": rng.choice([1e12, *ODD_VALUES])}
        yield rng.choice([json.dumps(whole).encode(), flip(rng, json.dumps(whole).encode()), _noise(rng), b"[]", b"[1"])


def ledger_changes(rng: random.Random, run_id: str, outside: Path, out: Path) -> Iterator[tuple[str, ...]]:
    """Endless Redis commands, each of which makes one entry of a run wrong."""
    run, sha = f"{KEY_PREFIX}run:{run_id}", "0" * 64
    elsewhere = [
        str(outside), f"{out}/../{outside.name}", f"{out}/link", f"{out}/link/..", f"file://{outside}",
        f"file://{out}/../{outside.name}", f"local://{outside}", f"simplecache::file://{outside}",
        f"{out}/x::file://{outside}", "memory://run", "s3://bucket/run", "http://127.0.0.1:1/run", "/", "", "..",
        "\x00", f"{out}\x00", "a" * 5000, "\udc80", f"{out}\n", "~root",
    ]  # fmt: skip
    options = ["{", "[]", "null", '{"max_chars": "many"}', '{"overlap": 1e9}', "[" * 5000, '{"keep_text": 1}', '"x"']
    specs = ["", "x", "1 2", f"10 0 {sha} 4", f"-1 0 {sha}", f"10 -1 {sha}", f"10 {1 << 70} {sha}", "10 0 ../../etc"]
    shards = ["abc", "-7", "../../0", "1e3", "", str(1 << 70), "0.5"]
    while True:
        yield rng.choice(
            [
                ("hset", run, "uri", rng.choice(elsewhere)),
                ("hset", run, "uri", rng.choice(elsewhere)),
                ("hset", run, "options", rng.choice(options)),
                ("hset", f"{run}:shards", "0", rng.choice(specs)),
                ("hset", f"{run}:shards", rng.choice(shards), f"10 0 {sha}"),
                ("zadd", f"{run}:pending", "-5", rng.choice(shards)),
                ("hset", run, "state", rng.choice(["x", "", "finishing"])),
                ("hset", f"{run}:attempts", "0", rng.choice(["x", "", "1.5", "9" * 30])),
                ("hset", run, "artifact", rng.choice(["x", "", "a" * 64])),
                ("hset", run, "options", flip(rng, b'{"overlap": 64, "keep_text": false}').decode("utf-8", "replace")),
            ]
        )


def flip(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(mutant) + 1)
        deed = rng.randrange(5)
        if deed == 0 and at < len(mutant):
            mutant[at] ^= 1 << rng.randrange(8)
        elif deed == 1:
            mutant[at:at] = rng.randbytes(rng.randint(1, 12))
        elif deed == 2:
            del mutant[at : at + rng.randint(1, 40)]
        elif deed == 3:
            mutant[at:at] = mutant[max(0, at - 60) : at]
        elif rng.random() < 0.3:
            del mutant[at:]
    return bytes(mutant)


def _noise(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return rng.randbytes(rng.randint(0, 300))
    return json.dumps(rng.choice(ODD_VALUES)).encode()


def _flipped(rng: random.Random) -> bytes:
    return flip(rng, json.dumps(fresh(rng)).encode())


def _with_odd_field(rng: random.Random) -> bytes:
    whole = fresh(rng)
    target: Any = rng.choice([whole, whole["headers"], whole["properties"], whole["properties"]["delivery_info"]])
    added = ["eta", "expires", "compression", "chord", "callbacks", "errbacks", "stamped_headers", "stamps", "shadow"]
    name = rng.choice([*target, *added])
    if rng.random() < 0.3:
        target.pop(name, None)
    else:
        target[name] = rng.choice(ODD_VALUES)
    return json.dumps(whole).encode()


def _with_odd_arguments(rng: random.Random) -> bytes:
    whole = [rng.choice(ODD_VALUES) for _ in range(rng.randint(0, 4))]
    keywords = rng.choice([{}, {}, {"options": rng.choice(ODD_VALUES)}, {"self": 1}, {"shard": 1}])
    return json.dumps(message(rng.choice([TAG_SHARD, FINISH_RUN, TAG_DOCUMENTS]), body=[whole, keywords, {}])).encode()


def _with_odd_body(rng: random.Random, canary: Path) -> bytes:
    follow: dict[str, Any] = {
        "task": "os.mkdir",
        "args": [str(canary)],
        "kwargs": {},
        "options": {},
        "subtask_type": None,
    }
    documents = [["Ada met Charles."]]
    body: Any = rng.choice(
        [
            [documents, {}, {"callbacks": [follow], "chain": [follow], "errbacks": [follow]}],
            [documents, {}, {rng.choice(["callbacks", "errbacks", "chain", "chord"]): rng.choice([follow, [follow]])}],
            rng.choice(ODD_VALUES),
            [[["x" * rng.choice([10, 1_100_000])]], {}, {}],
        ]
    )
    whole = message(TAG_DOCUMENTS, body=body)
    if rng.random() < 0.2:
        whole["headers"][rng.choice(["callbacks", "errbacks", "chain", "chord"])] = [follow]
    if rng.random() < 0.2:
        whole["body"] = b64encode(b"[" * rng.choice([5, 3000])).decode()
    if rng.random() < 0.2:
        whole["headers"]["compression"] = rng.choice(["application/x-gzip", "gzip", "zlib", "application/x-bz2", "x"])
        whole["body"] = b64encode(zlib.compress(b"[[], {}, {}]" + b" " * 10_000_000)).decode()
    return json.dumps(whole).encode()


def _with_odd_task(rng: random.Random, canary: Path) -> bytes:
    names = ["os.mkdir", "celery.map", "celery.backend_cleanup", "celery.chord", "", "nermill.tag", 5, None, ["x"]]
    return json.dumps(message(rng.choice(names), str(canary))).encode()


def _pickled(rng: random.Random, canary: Path) -> bytes:
    payload = pickle.dumps(([[Touch(canary)]], {}, {}), protocol=rng.randint(2, 5))
    if rng.random() < 0.3:
        return payload
    kinds = ["application/x-python-serialize", "application/json", "application/x-yaml", "application/data", "pickle"]
    whole = {**message(TAG_DOCUMENTS), "content-type": rng.choice(kinds), "content-encoding": "binary"}
    return json.dumps({**whole, "body": b64encode(payload).decode()}).encode()


def input_files(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Mutated inputs of every format: suffix and content."""
    seeds = _inputs()
    for _ in range(count):
        suffix, data = rng.choice(seeds)
        if suffix.endswith((".gz", ".zst")) and rng.random() < 0.5:  # what is packed is broken, not the packing
            pack = gzip.compress if suffix.endswith(".gz") else zstandard.compress
            inner = next(content for plain, content in seeds if plain == suffix.rpartition(".")[0])
            yield suffix, pack(flip(rng, inner))
        else:
            yield rng.choice([suffix, suffix, suffix, "", ".txt"]), flip(rng, data)


def _inputs() -> list[tuple[str, bytes]]:
    records = [{"id": f"d{n}", "text": f"Ada Lövelace met 查尔斯 in Łódź {n} times. 😀", "n": [n]} for n in range(20)]
    jsonl = "".join(json.dumps(r, ensure_ascii=n % 2 == 0) + "\n" for n, r in enumerate(records)).encode()
    words = (
        "-DOCSTART- -X- O O\n\nAda NNP I-NP B-PER\nLövelace NNP I-NP I-PER\nmet VBD I-VP O\n\nTurin NNP I-NP B-LOC\n\n"
    )
    conll = (words * 4).encode()
    pairs = ("Ada S-PER\nmet O\nthe B-ORG\nBig I-ORG\nMill E-ORG\n\n" * 5).encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    plain = [(".jsonl", jsonl), (".conll", conll), (".iob2", pairs), (".txt", "Grüße aus Łódź.\n".encode() * 5)]
    packed = [(f"{suffix}.gz", gzip.compress(data)) for suffix, data in plain]
    packed += [(f"{suffix}.zst", zstandard.compress(data)) for suffix, data in plain]
    return [*plain, *packed, (".parquet", sink.getvalue()), (".parquet", sink.getvalue())]


def read_all(path: Path, options: ReadOptions) -> str:
    """Reads an input as a plan would; returns what it was refused with, or nothing."""
    try:
        for source in open_sources([str(path)], options).sources:
            encode_shard(shard_table(list(source.documents(options))))
    except UsageError as error:
        return str(error)
    return ""


OPTIONS = (
    ReadOptions(),
    ReadOptions(unit="document"),
    ReadOptions(keep_fields=True),
    ReadOptions(lines=True),
    ReadOptions(format="jsonl"),
    ReadOptions(format="conll"),
    ReadOptions(format="parquet"),
)


def fuzz_sources(folder: Path, seed: int, count: int) -> tuple[int, int]:
    """Reads mutated inputs; returns how many were read and how many were refused."""
    rng = random.Random(seed)
    refused = 0
    for number, (suffix, data) in enumerate(input_files(rng, count)):
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        options = rng.choice(OPTIONS)
        try:
            told = read_all(path, options)
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {number}, {suffix}, {options}: {data[:2000]!r}") from error
        assert not told or (str(path) in told and len(told.splitlines()) == 1), told
        refused += bool(told)
        path.unlink()
    return count - refused, refused
