"""An artifact's manifest: every file by hash, none outside its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nermill.worker.contracts.errors import ArtifactError
from nermill.worker.contracts.manifest import FILE_NAME, load_manifest, resolve_artifact

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A copy of the demo artifact that a test may change."""
    return Path(shutil.copytree(resolve_artifact("demo"), tmp_path / "artifact"))


def change(artifact: Path, how: Change) -> None:
    path = artifact / FILE_NAME
    body = json.loads(path.read_text())
    how(body)
    path.write_text(json.dumps(body))


def test_the_demo_swears_to_what_it_serves(artifact: Path) -> None:
    manifest = load_manifest(artifact)
    assert {manifest.model_file, "tokenizer.json"} <= manifest.files.keys()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "folder/file", "..", ".", "", "a\0b"])
def test_names_that_lead_out_of_the_folder_are_refused(artifact: Path, name: str) -> None:
    (artifact.parent / "secret").touch()
    change(artifact, lambda body: body["files"].update({name: "0" * 64}))
    with pytest.raises(ArtifactError, match="files must be in the artifact's own folder"):
        load_manifest(artifact)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda body: body.update(model_file="../model.onnx"), "no sha256 of ../model.onnx"),
        (lambda body: body["files"].pop("model.onnx"), "no sha256 of model.onnx"),
        (lambda body: body["files"].pop("tokenizer.json"), "no sha256 of tokenizer.json"),
        (lambda body: body["files"].update({"tokenizer.json": "0" * 64}), "changed since it was built"),
        (lambda body: body["files"].update({"more.bin": "0" * 64}), "No such file"),
        (lambda body: body.update(schema_version=99), "schema version 99"),
        (lambda body: body.update(surprise=1), "unknown surprise"),
        (lambda body: body.pop("labels"), "labels"),
        (lambda body: body.update(files=[]), "not a manifest"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused_in_one_line(artifact: Path, how: Change, message: str) -> None:
    change(artifact, how)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_manifest(artifact)
    assert len(str(caught.value).splitlines()) == 1
    assert str(artifact) in str(caught.value)
