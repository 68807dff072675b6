"""A strict double of ais_bench's ``InferSession``: it runs what the double of atc wrote, through onnxruntime.

It refuses inputs in another order, type or shape than the offline model's, arrays that are not contiguous, calls
from another thread than the one that made the session, and anything after ``finalize``. Every refusal is also kept in
``violations``, and in the file ``AIS_DOUBLE_VIOLATIONS``, so that an adapter that swallows one is seen.

- ``AIS_DOUBLE_SECONDS``: how long each call takes at least.
- ``AIS_DOUBLE_HANGS``: a file; the process that makes it hangs in its 15th call for ever.
- ``AIS_DOUBLE_FAILS_OVER``: the most tokens of a batch for which the device has memory.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import aclruntime
import numpy as np
import onnxruntime

MAGIC = b"IMOD"
violations: list[str] = []
calls: list[str] = []
_state = {"finalized": False}


def reset() -> None:
    """Another process begins."""
    violations.clear()
    calls.clear()
    _state["finalized"] = False


def refuse(message: str) -> NoReturn:
    violations.append(message)
    if file := os.environ.get("AIS_DOUBLE_VIOLATIONS"):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(message + "\n")
    raise RuntimeError(message)


class InferSession:
    def __init__(
        self, device_id: int, model_path: str, acl_json_path: str | None = None, debug: bool = False, loop: int = 1
    ) -> None:
        if _state["finalized"]:
            refuse("a session after finalize")
        if type(device_id) is not int or type(model_path) is not str:
            refuse(f"InferSession({device_id!r}, {model_path!r})")
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        if visible is not None and device_id >= len(visible.split(",")):
            raise RuntimeError(f"[ERROR] ACL: invalid device {device_id} (107001)")  # its right, no fault of the caller
        content = Path(model_path).read_bytes()
        if not content.startswith(MAGIC):
            raise RuntimeError("[ERROR] load model from file failed (500002)")
        about, _, graph = content[len(MAGIC) :].partition(b"\n")
        self._about = json.loads(about)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._thread = threading.get_ident()
        self._calls = 0
        self._freed = False
        calls.append(f"load({device_id})")

    def get_inputs(self) -> list[Any]:
        self._check("get_inputs")
        return [
            SimpleNamespace(
                name=name,
                shape=[-1, -1] if self._about["is_dynamic"] else self._about["gears"][0][name],
                datatype=getattr(aclruntime.dtype, dtype),
                realsize=0,
            )
            for name, dtype in self._about["inputs"]
        ]

    def get_outputs(self) -> list[Any]:
        self._check("get_outputs")
        return [SimpleNamespace(name="logits", datatype=aclruntime.dtype.float32)]

    def infer(self, feeds: Any, mode: str = "static", custom_sizes: int = 100000) -> list[Any]:
        self._check("infer")
        wanted = "dymdims" if self._about["is_dynamic"] else "static"
        if mode != wanted:
            refuse(f"mode {mode!r} on a model of mode {wanted!r}")
        if type(feeds) is not list or len(feeds) != len(self._about["inputs"]):
            refuse("feeds is a list with one array for each input")
        for array, (name, dtype) in zip(feeds, self._about["inputs"], strict=True):
            if not isinstance(array, np.ndarray):
                refuse(f"{name} is no array")
            if array.dtype != dtype:
                refuse(f"{name} is {dtype}, and {array.dtype} came")
            if not array.flags.c_contiguous:
                refuse(f"{name} is not contiguous")
        given = {name: list(array.shape) for array, (name, _) in zip(feeds, self._about["inputs"], strict=True)}
        if given not in self._about["gears"]:
            refuse(f"shapes {given} are not among the gears")
        self._check_order(dict(zip(given, feeds, strict=True)))
        self._calls += 1
        self._misbehave(feeds[0].size)
        calls.append("infer")
        return self._session.run(None, dict(zip(given, feeds, strict=True)))  # type: ignore[no-any-return]

    def free_resource(self) -> None:
        self._check("free_resource")
        self._freed = True
        calls.append("free_resource")

    @staticmethod
    def finalize() -> None:
        if _state["finalized"]:
            refuse("finalize twice")
        _state["finalized"] = True
        calls.append("finalize")

    def _check(self, what: str) -> None:
        if _state["finalized"] or self._freed:
            refuse(f"{what} after it was freed")
        if threading.get_ident() != self._thread:
            refuse(f"{what} from another thread")

    def _check_order(self, feeds: dict[str, Any]) -> None:
        """The arrays have no names; what is in them tells: a mask is 0 and 1, a position or token type begins at 0."""
        for name in ("attention_mask", "segments"):
            if name in feeds and not (np.diff(feeds[name], axis=1) <= 1).all():
                refuse(f"{name} is none: the feeds come in another order")
        if "token_type_ids" in feeds and feeds["token_type_ids"].any():
            refuse("token_type_ids are 0 in a task on one text: the feeds come in another order")

    def _misbehave(self, tokens: int) -> None:
        time.sleep(float(os.environ.get("AIS_DOUBLE_SECONDS", "0")))
        if (most := os.environ.get("AIS_DOUBLE_FAILS_OVER")) and tokens > int(most):
            raise RuntimeError("[ERROR] malloc device memory failed (207001)")
        if (hangs := os.environ.get("AIS_DOUBLE_HANGS")) and self._calls == 15:
            try:
                Path(hangs).touch(exist_ok=False)
            except FileExistsError:
                return
            while True:
                time.sleep(1)
