"""The real worker application around an engine without a model: ``celery -A tests.benchmarks.app worker``.

- ``BENCH_RATE``: windows a second of a paced engine; 0, the default, for the null engine.
- ``BENCH_COSTS``: a table of costs that paces the engine shape by shape instead.
- ``BENCH_BUSY``: file in which that engine keeps account of the seconds for which it was busy.
- ``BENCH_SHAPES``: the shapes that are compiled for it, as in ``nermill-build compile --shapes``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import nermill.worker.tagging.pipeline
from nermill.model_build.shapes import parse_shapes
from nermill.worker.contracts.costs import load_costs
from nermill.worker.contracts.manifest import load_manifest
from nermill.worker.engine import Engine
from tests.benchmarks.engines import NullEngine, PacedEngine, as_of_a_device, by_shape, windows_per_second

RATE = float(os.environ.get("BENCH_RATE", "0"))


def load_engine(artifact: Path, device: str = "cpu", threads: int = 0) -> Engine:
    """The engine that the environment describes; everything else is the artifact's."""
    manifest = as_of_a_device(load_manifest(artifact))
    if table := os.environ.get("BENCH_COSTS"):
        shapes = parse_shapes(os.environ["BENCH_SHAPES"], manifest.max_length, manifest.backend)
        account = Path(os.environ["BENCH_BUSY"])
        return PacedEngine(replace(manifest, shapes=shapes), by_shape(load_costs(table).seconds), account)
    return PacedEngine(manifest, windows_per_second(RATE)) if RATE else NullEngine(manifest)


nermill.worker.tagging.pipeline.load_engine = load_engine  # before nermill.worker.app loads anything

import nermill.worker.app  # noqa: E402

app = nermill.worker.app.app
