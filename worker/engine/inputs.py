"""A batch as a compiled graph wants it: its inputs by name, in its integer type, in a shape it was compiled for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nermill.worker.contracts.errors import ArtifactError, EngineError
from nermill.worker.contracts.manifest import Manifest

if TYPE_CHECKING:
    from nermill.worker.engine import Batch

KNOWN = {
    "packed": ("input_ids", "segments", "position_ids"),
    "plain": ("input_ids", "attention_mask", "token_type_ids"),
    "equal": ("input_ids",),
}


def named_inputs(batch: Batch, manifest: Manifest) -> dict[str, NDArray[np.integer]]:
    """The graph's inputs by name, in the graph's order, each of shape (rows, length).

    Raises:
        EngineError: the batch has a shape that was not compiled, or padding where the graph has no mask.
    """
    shape = batch.input_ids.shape
    if manifest.shapes and shape not in manifest.shapes:
        compiled = ", ".join(f"{rows}x{length}" for rows, length in manifest.shapes)
        raise EngineError(f"shape {shape[0]}x{shape[1]} was not compiled; {manifest.name} takes {compiled}")
    arrays = {"input_ids": batch.input_ids}
    if manifest.layout == "packed":
        arrays |= {"segments": batch.segments, "position_ids": batch.position_ids}
    elif manifest.layout == "equal":
        if not (batch.segments == 1).all():
            raise EngineError(f"{manifest.name} takes rows that one window fills each")
    else:
        arrays |= {"attention_mask": np.minimum(batch.segments, 1), "token_type_ids": np.zeros_like(batch.segments)}
    return {entry.name: np.ascontiguousarray(arrays[entry.name], entry.dtype) for entry in manifest.inputs}


def npu_number(artifact: Path, device: str) -> int:
    """Number of the NPU that a device's name stands for; ``npu`` alone is the first one.

    Raises:
        ArtifactError: the device is no NPU.
    """
    kind, _, number = device.partition(":")
    if kind != "npu":
        raise ArtifactError(f"{artifact}: was compiled for Ascend NPUs; device {device!r} cannot run it")
    return int(number or 0)


def refusal(runtime: str, device: str, batch: Batch, reason: str) -> EngineError:
    """What a device said of a batch, with the batch's shape."""
    rows, length = batch.input_ids.shape
    return EngineError(f"{runtime} on {device} refuses shape {rows}x{length}: {reason}")


def lines_of(error: Exception) -> list[str]:
    """What an error says, or else its type: torch comes to the point in the first line, traced modules in the last."""
    return str(error).strip().splitlines() or [type(error).__name__]


def check_names(manifest: Manifest, graph: list[str]) -> None:
    """Makes sure that the graph takes what the manifest says, in the manifest's order.

    Raises:
        ArtifactError: it does not.
    """
    said = [entry.name for entry in manifest.inputs]
    if sorted(said) != sorted(KNOWN[manifest.layout]):
        raise ArtifactError(f"{manifest.name}: inputs {', '.join(said)} are not those of the layout {manifest.layout}")
    if said != graph:
        raise ArtifactError(
            f"{manifest.name}: the graph takes {', '.join(graph)} and the manifest says {', '.join(said)}; "
            "build the artifact again"
        )
