"""What two worlds have in common that go on alike: a hash of values, of where an actor waits, of a file's content.

Times count from the present, and random ids by who made them when, so two worlds are alike where all of one happened
some time later. Left out is what the product writes for people and never decides by: see ``FOR_PEOPLE``.
"""

from __future__ import annotations

import dis
import enum
import io
import json
import re
from collections import deque
from dataclasses import fields, is_dataclass
from functools import cache, lru_cache
from types import CodeType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Names of fields, keys and variables: times and tallies for people.
_OF_THE_LEDGER = ("opened", "started", "finished", "redeliveries", "duplicates", "waited", "claimed")
_OF_PARTS = ("seconds", "queue_seconds", "write_seconds", "worker", "workers", "host", "device")
FOR_PEOPLE = frozenset((*_OF_THE_LEDGER, *_OF_PARTS))
_PLAIN = frozenset((type(None), bool, int, float))
_DEEP = 40
GENERATION = re.compile(r"\b(w\d)\.(\d+)\b")  # in a worker's name
BEGIN = 1_000_000_000.0  # Unix seconds at which every world begins; what is greater is a time


class View:
    """How the values of a world are seen.

    Attributes:
        opaque: Types whose state is told elsewhere, or never changes.
        now: Seconds.
        ids: Who made each random id, and when.
        generations: Of each process that may begin again, how often it did.
    """

    opaque: tuple[type, ...] = ()
    now: float
    ids: dict[str, tuple[str, float]]
    generations: dict[str, int]

    def moment(self, seconds: float) -> int:
        """A time as microseconds from now: numbers of seconds would not do, as -1 and -2 have the same hash."""
        return round((seconds - self.now) * 1e6)

    def text(self, text: str) -> object:
        """A text; of an id who made it, and when; of a worker process how many came after it."""
        if text.startswith(("w", '{"name": "w')):  # perhaps of a worker process
            return GENERATION.sub(self.age, text)
        if text not in self.ids:
            return text
        maker, since = self.ids[text]
        return maker, self.moment(since)

    def age(self, name: re.Match[str]) -> str:
        return f"{name[1]}-{self.generations[name[1]] - int(name[2])}"


class UnknownError(Exception):
    """A value whose state cannot be told."""


def digest(value: Any, view: View, depth: int = 0) -> int:
    """A hash of a value by what it contains: anything that the product's code or the world's holds in a variable.

    Raises:
        UnknownError: it contains something of another kind.
    """
    kind = type(value)
    if kind is str:
        return hash(view.text(value))
    if kind is float and value >= BEGIN:
        return hash(("moment", view.moment(value)))
    if kind in _PLAIN:
        return hash(value)
    if depth > _DEEP:
        raise UnknownError("too deep, or a circle")

    def of(inner: Any) -> int:
        return digest(inner, view, depth + 1)

    def named(pairs: Any) -> int:
        return hash(tuple((name, of(inner)) for name, inner in pairs if name not in FOR_PEOPLE))

    if isinstance(value, (*view.opaque, type, ModuleType, CodeType)) or kind is object:
        return hash(type(value).__qualname__)
    if isinstance(value, bytes):
        return content(value)
    if isinstance(value, (list, tuple, deque)):
        return hash((len(value), *map(of, value)))
    if isinstance(value, (set, frozenset)):
        return hash((len(value), frozenset(map(of, value))))
    if isinstance(value, dict):
        return hash(tuple((of(key), of(inner)) for key, inner in value.items() if key not in FOR_PEOPLE))
    if isinstance(value, enum.Enum):
        return hash(value.value)
    if is_dataclass(value):
        return named((field.name, getattr(value, field.name)) for field in fields(value))
    if isinstance(value, MethodType):
        return hash((value.__func__.__qualname__, of(value.__self__)))
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return hash((value.__qualname__, named((name, cell.cell_contents) for name, cell in cells)))
    if isinstance(value, GeneratorType):
        if value.gi_frame is None:
            return hash("over")
        return hash((value.__qualname__, value.gi_frame.f_lasti, named(sorted(value.gi_frame.f_locals.items()))))
    if isinstance(value, BaseException):
        return hash((type(value).__qualname__, str(value)))
    if isinstance(value, pa.Table):
        return hash(str(value.to_pydict()))
    if isinstance(value, pa.Schema):
        return hash(str(value))
    if isinstance(value, SimpleNamespace) or type(value).__module__.startswith(("nermill.", "tests.", "contextlib")):
        return hash((type(value).__qualname__, named(vars(value).items())))
    raise UnknownError(f"{type(value).__module__}.{type(value).__qualname__}")


def position(frame: Any, view: View) -> int:
    """A hash of where code waits: of each function of the stack its instruction and its variables.

    Raises:
        UnknownError: a variable's state cannot be told, or a ``for`` loop goes on, whose iterator no variable has.
    """
    told: list[Any] = []
    while frame is not None:
        if any(begin < frame.f_lasti < end for begin, end in _loops(frame.f_code)):
            raise UnknownError(f"a loop in {frame.f_code.co_qualname}")
        variables = dict(sorted(frame.f_locals.items()))  # in whose own order is when somebody looked at them
        told.append((frame.f_code.co_name, frame.f_lasti, digest(variables, view)))
        frame = frame.f_back
    return hash(tuple(told))


@cache
def _loops(code: CodeType) -> tuple[tuple[int, int], ...]:
    found = (instruction for instruction in dis.get_instructions(code) if instruction.opname == "FOR_ITER")
    return tuple((instruction.offset, instruction.argval) for instruction in found)


_NOBODY = View()
_NOBODY.now, _NOBODY.ids, _NOBODY.generations = 0.0, {}, {}


@lru_cache(maxsize=10_000)
def content(data: bytes) -> int:
    """A hash of a file; of a part, its rows, and what it says of itself but for people."""
    if not data.startswith(b"PAR1"):
        return hash(data)
    with pq.ParquetFile(io.BytesIO(data)) as file:
        table, metadata = file.read(use_threads=False), dict(file.schema_arrow.metadata or {})
    stats = json.loads(metadata.pop(b"nermill.stats", b"{}"))
    return hash((str(table.to_pydict()), str(metadata), digest(stats, _NOBODY)))
