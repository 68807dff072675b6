"""The engine on Ascend NPUs through an offline model and ``ais_bench``'s ``InferSession``.

Written against the documentation and the samples of ais_bench; it has not run on an NPU. The session lives in one
thread, since what ACL knows of a device belongs to a thread; the callers wait for it.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError, EngineError
from nermill.worker.contracts.manifest import Manifest
from nermill.worker.engine import Batch
from nermill.worker.engine.inputs import KNOWN, lines_of, named_inputs, npu_number, refusal

GEAR_INPUT = "ascend_mbatch_shape_data"  # of CANN's own, in a model with gears; the session fills it


def import_session() -> Any:
    """The class ``InferSession``.

    Raises:
        ArtifactError: one of the two wheels is missing, is for another Python, or is another package.
    """
    python = f"Python {platform.python_version()}"
    try:
        from ais_bench.infer.interface import InferSession
    except ModuleNotFoundError as error:
        if error.name == "aclruntime":
            raise ArtifactError(
                f"ais_bench needs the wheel aclruntime, which is built for one Python: install the one for {python}, "
                "or run the worker on the wheel's Python"
            ) from None
        if error.name != "ais_bench" and (error.name or "").startswith("ais_bench"):
            raise ArtifactError(
                "the ais_bench that is installed has no InferSession (PyPI's ais-bench-benchmark is another tool); "
                "install the wheels ais_bench and aclruntime of Ascend's tools"
            ) from None
        raise ArtifactError(
            f"backend om needs {error.name}, which is not installed for {python}; install the wheels ais_bench and "
            "aclruntime of Ascend's tools (they are not on PyPI)"
        ) from None
    except ImportError as error:
        raise ArtifactError(
            f"ais_bench does not load ({lines_of(error)[0]}); source CANN's set_env.sh, or install wheels for {python}"
        ) from None
    return InferSession


class OmEngine:
    """An offline model on one NPU; see ``nermill.worker.engine.Engine``. One process serves one chip."""

    at_once = 1
    in_flight = 2  # one computes, the next waits for the session's thread with its arrays made

    def __init__(self, artifact: Path, manifest: Manifest, device: str = "npu:0") -> None:
        self.manifest = manifest
        self.device = device
        number = npu_number(artifact, device)
        if manifest.details.get("pending"):
            raise ArtifactError(
                f"{artifact}: its graph is not converted yet; run {artifact}/convert.sh on a machine with CANN, then "
                f"nermill-build adopt {artifact} model.om"
            )
        self._mode = "dymdims" if len(manifest.shapes) > 1 else "static"
        self._thread = _OneThread("npu")
        try:
            path = str(artifact / manifest.model_file)
            self._session = self._thread.call(lambda: import_session()(number, path))
            self._dtypes = self._thread.call(self._read_inputs)
        except ArtifactError as error:
            self._thread.stop()
            raise ArtifactError(f"{artifact}: {error}") from None
        except Exception as error:
            self._thread.stop()
            raise ArtifactError(f"{artifact}: {device} does not load it ({lines_of(error)[0]})") from None

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits of shape (rows, length, labels)."""
        named = named_inputs(batch, self.manifest)
        feeds = [np.ascontiguousarray(named[name], dtype) for name, dtype in self._dtypes.items()]
        try:
            (answer, *_) = self._thread.call(lambda: self._session.infer(feeds, mode=self._mode))
            logits = np.asarray(answer, np.float32)
        except Exception as error:
            raise refusal("ais_bench", self.device, batch, lines_of(error)[0]) from error.with_traceback(None)
        expected = (*batch.input_ids.shape, len(self.manifest.labels))
        if logits.shape != expected:
            raise EngineError(f"{self.device} answers with shape {logits.shape} instead of {expected}")
        return logits

    def close(self) -> None:
        """Frees the model and finalizes ACL: the last call of this process."""
        self._thread.call(self._free)
        self._thread.stop()

    def _read_inputs(self) -> dict[str, str]:
        """Integer type of each input by name, in the model's own order."""
        entries = [entry for entry in self._session.get_inputs() if entry.name != GEAR_INPUT]
        dtypes = {entry.name: str(entry.datatype).rpartition(".")[2] for entry in entries}
        wanted = [entry.name for entry in self.manifest.inputs]
        if sorted(dtypes) != sorted(wanted) or sorted(wanted) != sorted(KNOWN[self.manifest.layout]):
            raise ArtifactError(
                f"the offline model takes {', '.join(dtypes)} and the manifest says {', '.join(wanted)}; "
                "build the artifact again"
            )
        for name, dtype in dtypes.items():
            if dtype not in ("int32", "int64"):
                raise ArtifactError(f"the offline model takes {name} as {dtype}; ids are int32 or int64")
        return dtypes

    def _free(self) -> None:
        session = self._session
        del self._session
        for name in ("free_resource", "free_device"):  # the newer name, and the older one
            if hasattr(session, name):
                getattr(session, name)()
                break
        if hasattr(session, "finalize"):
            session.finalize()


class _OneThread:
    """Runs functions in a thread of its own, one after another; a call that hangs keeps no process alive."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, or raises."""
        future: Future[Any] = Future()
        self._work.put((future, function))
        return future.result()

    def stop(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while work := self._work.get():
            future, function = work
            try:
                future.set_result(function())
            except BaseException as error:  # whoever waits is to hear of it
                future.set_exception(error)
