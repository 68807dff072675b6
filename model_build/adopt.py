"""A graph that was converted elsewhere completes its artifact: ``nermill-build adopt ART model.om``."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from nermill.model_build.om import (
    GRAPH_FILE,
    LOG_FILE,
    MAGIC,
    MODEL_FILE,
    RECEIPT,
    SCRIPT_FILE,
    notes,
    try_model,
)
from nermill.worker.contracts.errors import EngineError, StoreError, UsageError
from nermill.worker.contracts.manifest import FILE_NAME, Manifest, file_sha256, load_manifest


def adopt(artifact: Path, model: Path, device: str = "npu:0") -> Manifest:
    """Takes a converted model into the artifact that waits for it; the graph and its script leave the artifact.

    What tells that the model is of this graph is the receipt that ``convert.sh`` wrote beside it, and the golden
    answers where an NPU can be asked. One of the two must be there, and each that is there must agree.

    Raises:
        UsageError: the artifact waits for nothing, or the model is not of its graph.
        StoreError: the artifact's folder does not take it.
    """
    manifest = load_manifest(artifact)
    if manifest.backend != "om" or not manifest.details.get("pending"):
        raise UsageError(f"{artifact}: waits for no model; compile with --backend om --no-atc makes one that does")
    _check_file(model)
    has_receipt = _check_receipt(artifact, manifest, model)
    target = artifact / MODEL_FILE
    was_there, done = target.exists(), False
    try:
        if not (was_there and target.samefile(model)):
            _copy(model, target)
        ready = _completed(manifest, artifact)
        difference, reason = try_model(artifact, ready, device)
        if difference is not None and not difference <= manifest.tolerance:
            raise UsageError(
                f"{model}: is {difference:.3g} away from the golden answers of {artifact} (tolerance "
                f"{manifest.tolerance:.3g}): an offline model of another graph; convert {artifact / GRAPH_FILE}"
            )
        if difference is None and not has_receipt:
            raise UsageError(
                f"{model}: nothing tells of which graph it is ({model.name}{RECEIPT} is not beside it, and it does not "
                f"run here: {reason}); convert with {artifact / SCRIPT_FILE}, or adopt it where an NPU is"
            )
        ready = replace(
            ready, details={**ready.details, "tried": difference is not None, "notes": notes(ready, reason)}
        )
        with tempfile.TemporaryDirectory(dir=artifact) as aside:
            ready.write(Path(aside))
            os.replace(Path(aside) / FILE_NAME, artifact / FILE_NAME)
        done = True
    except EngineError as error:
        raise UsageError(
            f"{model}: does not run as {artifact} says ({error}); convert {artifact / GRAPH_FILE}"
        ) from None
    except OSError as error:
        raise StoreError(f"{artifact}: cannot be written ({error.strerror or error})") from error
    finally:
        if not (done or was_there):
            target.unlink(missing_ok=True)
    for name in (GRAPH_FILE, f"{GRAPH_FILE}.data", SCRIPT_FILE):
        (artifact / name).unlink(missing_ok=True)
    return load_manifest(artifact)


def _check_file(model: Path) -> None:
    try:
        with model.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise UsageError(f"{model}: cannot be read ({error.strerror})") from None
    if magic != MAGIC:
        raise UsageError(f"{model}: is no offline model (it does not begin with {MAGIC.decode()}); atc writes one")


def _check_receipt(artifact: Path, manifest: Manifest, model: Path) -> bool:
    try:
        lines = model.with_name(model.name + RECEIPT).read_text("utf-8").split("\n")
    except OSError:
        return False
    said = {name: digest for digest, _, name in (line.partition("  ") for line in lines if line)}
    if said.get(GRAPH_FILE) != manifest.files[GRAPH_FILE]:
        raise UsageError(f"{model}: was converted from another graph than {artifact / GRAPH_FILE}; convert that one")
    if said.get(MODEL_FILE) != file_sha256(model):
        raise UsageError(f"{model}: is not what {model.name}{RECEIPT} was written for; convert it again")
    return True


def _copy(model: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}")
    try:
        shutil.copyfile(model, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _completed(manifest: Manifest, artifact: Path) -> Manifest:
    details = {key: value for key, value in manifest.details.items() if key != "pending"}
    gone = {GRAPH_FILE, f"{GRAPH_FILE}.data", SCRIPT_FILE}
    kept = {name: digest for name, digest in manifest.files.items() if name not in gone}
    kept |= {name: file_sha256(artifact / name) for name in (MODEL_FILE, LOG_FILE) if (artifact / name).exists()}
    return replace(manifest, model_file=MODEL_FILE, files=kept, details=details)
