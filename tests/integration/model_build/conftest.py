"""Checkpoints to build from, and a torch that keeps to one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Writes a checkpoint into a new folder: ``make_checkpoint("electra", pickled=True)``."""
    from tests.checkpoints import write_checkpoint

    def make(family: str = "bert", **options: Any) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(family), family, **options)

    return make


@pytest.fixture(scope="session")
def bert(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("bert")


@pytest.fixture(scope="session")
def compiled(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The small BERT as an artifact, built once for each order: ``compiled("onnx", layout="plain")``."""
    from nermill.model_build.artifact import Order, compile_artifact

    built: dict[Order, Path] = {}

    def artifact(backend: str, **options: Any) -> Path:
        order = Order(backend, **options)  # type: ignore[arg-type]
        if order not in built:
            built[order] = tmp_path_factory.mktemp("compiled") / "artifact"
            compile_artifact(str(bert), built[order], order)
        return built[order]

    return artifact
