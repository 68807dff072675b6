"""A Redis in memory: the commands that the ledger uses, its Lua script run by Lua 5.1, a clock that the world moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from typing import Any

from lupa import lua51
from redis.exceptions import ResponseError

from tests.exploration.state import FOR_PEOPLE, GENERATION, View

Scores = dict[str, float]
MAX_KNOWN = 50_000
NEAR_SECONDS, FAR_SECONDS = 3_000.0, 86_400.0  # no world lasts so long; an ended run's keys end after a day


class Server:
    """Keys and values of one Redis; every method named like a command does what that command does.

    ``tests/integration/test_exploration.py`` compares it with a real server.

    Args:
        view: Says what time it is.

    Attributes:
        version: Number of the content: of equal numbers in any two servers the content is equal.
    """

    _versions = count(1)
    _known: dict[Any, tuple[Any, dict[str, Any], dict[str, float], int]] = {}  # noqa: RUF012  # what calls came to
    _digests: dict[tuple[float, ...], int] = {}  # noqa: RUF012

    def __init__(self, view: View) -> None:
        self._view = view
        self.values: dict[str, Any] = {}
        self.deadlines: dict[str, float] = {}
        self.version = 0

    def remembered(self, call: tuple[Any, ...], effect: Callable[[], Any]) -> Any:
        """What a call answers and changes; made once for the same content, time and arguments."""
        key = self.version, self._view.now, call
        if key not in Server._known:
            if len(Server._known) > MAX_KNOWN:
                Server._known.clear()
            self.values, self.deadlines = dict(self.values), dict(self.deadlines)
            answer = effect()
            Server._known[key] = answer, self.values, self.deadlines, self.version
        answer, self.values, self.deadlines, self.version = Server._known[key]
        return answer

    def _changed(self) -> None:
        self.version = next(Server._versions)

    def forget_all(self) -> None:
        """The server lost its memory."""
        self.values, self.deadlines, self.version = {}, {}, 0

    def digest(self) -> int:
        """A hash of all that the ledger's steps depend on: of turns their order, of far deadlines whether they are."""
        known = self.version, self._view.now, *self._view.generations.values()
        if known not in Server._digests:
            if len(Server._digests) > MAX_KNOWN:
                Server._digests.clear()
            told = [(key, self._ends(key), _told(key, value, self._view)) for key, value in self.values.items()]
            Server._digests[known] = hash(frozenset(told))
        return Server._digests[known]

    def _ends(self, key: str) -> object:
        left = self._view.moment(self.deadlines.get(key, self._view.now))
        return left if left < NEAR_SECONDS * 1e6 else left > FAR_SECONDS * 1e6

    def end_keys(self) -> None:
        """Removes the keys whose time has passed; called whenever the clock moved."""
        now = self._view.now
        if gone := [key for key, deadline in self.deadlines.items() if deadline <= now]:
            self.remembered(("delete", *gone), lambda: self.delete(*gone))

    def _get(self, key: str, kind: Callable[[], Any]) -> Any:
        found = self.values.get(key)
        return kind() if found is None else found

    def _put(self, key: str, kind: Callable[..., Any]) -> Any:
        self._changed()
        found = self.values[key] = kind() if key not in self.values else kind(self.values[key])
        return found

    def _drop_if_empty(self, key: str) -> None:
        if not self.values.get(key):
            self.values.pop(key, None)
            self.deadlines.pop(key, None)

    def time(self) -> list[str]:
        now = round(self._view.now * 1e6)
        return [str(now // 1_000_000), str(now % 1_000_000)]

    def exists(self, key: str) -> int:
        return int(key in self.values)

    def delete(self, *keys: str) -> int:
        gone = 0
        for key in keys:
            if self.values.pop(key, None) is not None:
                gone += 1
                self._changed()
            self.deadlines.pop(key, None)
        return gone

    def expire(self, key: str, seconds: str) -> int:
        if key not in self.values:
            return 0
        self._changed()
        self.deadlines[key] = self._view.now + float(seconds)
        return 1

    def pexpire(self, key: str, milliseconds: int) -> int:
        return self.expire(key, str(milliseconds / 1000))

    def pttl(self, key: str) -> int:
        if key not in self.values:
            return -2
        return round((self.deadlines[key] - self._view.now) * 1000) if key in self.deadlines else -1

    def ttl(self, key: str) -> int:
        left = self.pttl(key)
        return left if left < 0 else round(left / 1000)

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def set(self, key: str, value: str, *, nx: bool, px: int) -> bool:
        if nx and key in self.values:
            return False
        self._changed()
        self.values[key] = value
        self.deadlines[key] = self._view.now + px / 1000
        return True

    def incr(self, key: str) -> int:
        self._changed()
        self.values[key] = str(int(self.values.get(key, "0")) + 1)
        return int(self.values[key])

    def hget(self, key: str, field: str) -> str | None:
        return self._get(key, dict).get(field)

    def hgetall(self, key: str) -> dict[str, str]:
        return dict(sorted(self._get(key, dict).items()))

    def hvals(self, key: str) -> list[str]:
        return list(self.hgetall(key).values())

    def hstrlen(self, key: str, field: str) -> int:
        return len(self._get(key, dict).get(field, "").encode())

    def hkeys(self, key: str) -> list[str]:
        return sorted(self._get(key, dict))

    def hlen(self, key: str) -> int:
        return len(self._get(key, dict))

    def hexists(self, key: str, field: str) -> int:
        return int(field in self._get(key, dict))

    def hset(self, key: str, *pairs: str) -> int:
        content = self._put(key, dict)
        before = len(content)
        content.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(content) - before

    def hsetnx(self, key: str, field: str, value: str) -> int:
        if field in self._get(key, dict):
            return 0
        return self.hset(key, field, value)

    def hdel(self, key: str, *fields: str) -> int:
        gone = [field for field in fields if field in self._get(key, dict)]
        for field in gone:
            del self._put(key, dict)[field]
        self._drop_if_empty(key)
        return len(gone)

    def hincrby(self, key: str, field: str, amount: str) -> int:
        content = self._put(key, dict)
        content[field] = str(int(content.get(field, "0")) + int(amount))
        return int(content[field])

    def sadd(self, key: str, member: str) -> int:
        if member in self._get(key, set):
            return 0
        self._put(key, set).add(member)
        return 1

    def smembers(self, key: str) -> list[str]:
        return sorted(self._get(key, set))

    def zadd(self, key: str, *arguments: str) -> int:
        only_new = arguments[0] == "NX"
        score, member = arguments[-2:]
        content = self._get(key, dict)
        is_new = member not in content
        if is_new or not only_new:
            self._put(key, dict)[member] = float(score)
        return int(is_new)

    def zincrby(self, key: str, amount: str, member: str) -> str:
        content = self._put(key, dict)
        content[member] = content.get(member, 0.0) + float(amount)
        return _number(content[member])

    def zrem(self, key: str, member: str) -> int:
        if member not in self._get(key, dict):
            return 0
        del self._put(key, dict)[member]
        self._drop_if_empty(key)
        return 1

    def zscore(self, key: str, member: str) -> str | None:
        score = self._get(key, dict).get(member)
        return None if score is None else _number(score)

    def zcard(self, key: str) -> int:
        return len(self._get(key, dict))

    def _between(self, key: str, low: str, high: str) -> list[str]:
        content: Scores = self._get(key, dict)
        return [m for m, score in _in_order(content) if _is_above(score, low) and _is_below(score, high)]

    def zcount(self, key: str, low: str, high: str) -> int:
        return len(self._between(key, low, high))

    def zrangebyscore(self, key: str, low: str, high: str, *options: str) -> list[str]:
        members = self._between(key, low, high)
        if "LIMIT" in options:
            at = options.index("LIMIT")
            members = members[int(options[at + 1]) :][: int(options[at + 2])]
        if "WITHSCORES" in options:
            return [text for member in members for text in (member, _number(self.values[key][member]))]
        return members

    def zrange(self, key: str, start: str, stop: str, *options: str) -> list[str]:
        last = int(stop) + 1 or None
        found = _in_order(self._get(key, dict))[int(start) : last]
        if options:
            return [text for member, score in found for text in (member, _number(score))]
        return [member for member, _ in found]

    def zpopmin(self, key: str) -> list[str]:
        found = next(iter(_in_order(self._get(key, dict))), None)
        if found is None:
            return []
        self.zrem(key, found[0])
        return [found[0], _number(found[1])]

    def zremrangebyscore(self, key: str, low: str, high: str) -> int:
        return sum(self.zrem(key, member) for member in self._between(key, low, high))

    @staticmethod
    def script(source: str) -> Callable[[Server, list[str], list[Any]], Any]:
        """A script of Redis as a function of a server, its keys and its arguments.

        Raises:
            ResponseError: by that function, where the script fails or answers an error.
        """
        runtime = lua51.LuaRuntime(unpack_returned_tuples=True, register_eval=False, register_builtins=False)
        table = runtime.table_from
        at: list[Server] = []

        def call(name: str, *arguments: Any) -> Any:
            answer = getattr(at[0], _METHODS.get(name, name.lower()))(*[_text(argument) for argument in arguments])
            if answer is None:
                return False
            return table(answer) if isinstance(answer, list) else answer

        runtime.globals().redis = table({"call": call, "error_reply": lambda text: table({"err": text})})
        program = runtime.eval(f"function(KEYS, ARGV) {source}\nend")

        def run(server: Server, keys: list[str], arguments: list[Any]) -> Any:
            at[:] = [server]
            try:
                answer = program(table(keys), table([_text(argument) for argument in arguments]))
            except lua51.LuaError as error:
                raise ResponseError(str(error)) from None
            return _answer(answer)

        return run


_METHODS = {"DEL": "delete"}  # commands that no method can be named like


def _told(key: str, value: Any, view: View) -> Any:
    """What of a value the ledger's steps depend on."""
    name = key.rpartition(":")[2]
    if isinstance(value, dict):
        if ":turn:" in key:
            return tuple(member for member, _ in _in_order(value))
        if name == "since":
            return frozenset(value)
        pairs = [pair for pair in value.items() if pair[0] not in FOR_PEOPLE]
        return frozenset((GENERATION.sub(view.age, key), _value(told, view)) for key, told in pairs)
    if isinstance(value, set):
        return frozenset(value)
    return None if name == "turns" else value


_MOMENT = re.compile(r"1\d{12}\b")


def _value(value: str | float, view: View) -> object:
    if isinstance(value, float):
        return view.moment(value / 1000) if 1e12 <= value < 1e13 else value
    if text := _MOMENT.match(value):
        return view.moment(int(text[0]) / 1000), GENERATION.sub(view.age, value[text.end() :])
    return view.text(value)


def _in_order(content: Scores) -> list[tuple[str, float]]:
    return sorted(content.items(), key=lambda item: (item[1], item[0]))


def _number(score: float) -> str:
    return str(int(score)) if score == int(score) and abs(score) < 1e17 else f"{score:.17g}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_above(score: float, bound: str) -> bool:
    return score > float(bound[1:]) if bound.startswith("(") else score >= float(bound)


def _is_below(score: float, bound: str) -> bool:
    return score < float(bound[1:]) if bound.startswith("(") else score <= float(bound)


def _answer(value: Any) -> Any:
    """What a client is told of what a script returned."""
    if value is None or value is False:
        return None
    if value is True:
        return 1
    if isinstance(value, float):
        return int(value)
    if lua51.lua_type(value) == "table":
        if (error := value["err"]) is not None:
            raise ResponseError(str(error))
        return [_answer(value[at]) for at in range(1, len(value) + 1)]
    return value
