"""The manifest of a model artifact: its files by hash, labels, shapes, special tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from nermill.worker.contracts.errors import ArtifactError, UsageError
from nermill.worker.contracts.plan import Options

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
GOLDEN_FILE = "golden.json"

Backend = Literal["onnx", "torch", "openvino", "aie", "om"]
Layout = Literal["packed", "plain", "equal"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One input of the compiled graph, bound by name.

    Attributes:
        name: Such as ``input_ids``.
        dtype: ``int32`` or ``int64``.
    """

    name: str
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of an artifact.

    Attributes:
        name: Name for people.
        backend: The engine that runs it.
        model_file: The compiled graph, relative to the artifact's folder.
        layout: ``packed``: several windows a row, inputs ``input_ids, segments, position_ids``. ``plain``: one window
            a row, inputs ``input_ids, attention_mask, token_type_ids``. ``equal``: one window a row, all of the same
            length, so that there is no padding and no mask; input ``input_ids``.
        precision: Number format in which the graph computes.
        inputs: Inputs in the graph's order, all of shape (rows, length).
        shapes: The (rows, length) pairs that were compiled; empty where shapes are free.
        token_budget: Most tokens of one batch, padding included, where shapes are free.
        max_length: Longest window in tokens, special tokens included.
        labels: Label of each logit, by index.
        scheme: Tag scheme of the labels.
        lowercase: Whether the tokenizer folds case.
        cls_id, sep_id, pad_id: Special token ids.
        position_offset: Position id of a window's first token (0; RoBERTa counts from padding_idx + 1).
        source: Checkpoint that it was built from: name, revision, sha256.
        libraries: Versions of the libraries that built it.
        files: sha256 of every file, by name relative to the folder.
        tolerance: Largest accepted absolute difference of a golden logit.
        details: Further values for the backend, such as the SoC and the architecture.
        sha256: Of manifest.json itself; identifies the artifact in every part. Not stored in the file.
    """

    name: str
    backend: Backend
    model_file: str
    layout: Layout
    precision: Precision
    inputs: tuple[GraphInput, ...]
    shapes: tuple[tuple[int, int], ...]
    token_budget: int
    max_length: int
    labels: tuple[str, ...]
    scheme: str
    lowercase: bool
    cls_id: int
    sep_id: int
    pad_id: int
    source: dict[str, str]
    libraries: dict[str, str]
    files: dict[str, str]
    tolerance: float
    position_offset: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch, padding included."""
        return max((rows * length for rows, length in self.shapes), default=self.token_budget)

    @property
    def window(self) -> int:
        """Length in tokens of the longest window that fits a batch, special tokens included."""
        return min(self.max_length, max((length for _, length in self.shapes), default=self.max_length))

    def check_overlap(self, overlap: int) -> None:
        """Checks that windows are longer than their overlap; the default overlap is accepted for every model.

        Args:
            overlap: Tokens that neighbouring windows share.

        Raises:
            UsageError: windows are not longer than that.
        """
        if overlap >= self.window and overlap != Options().overlap:
            raise UsageError(f"--overlap {overlap}: windows of {self.name} have {self.window} tokens; name fewer")

    def write(self, folder: Path) -> None:
        """Writes ``manifest.json`` into the artifact's folder."""
        body = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        del body["sha256"]
        (folder / FILE_NAME).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")


def load_manifest(folder: Path) -> Manifest:
    """Reads an artifact's manifest and checks the hash of every file.

    Args:
        folder: The artifact's folder.

    Raises:
        ArtifactError: the folder is no artifact, its schema version is another, or a file was changed or is missing.
    """
    path = folder / FILE_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{folder}: no model artifact ({FILE_NAME}: {error.strerror}); build one with nermill-build compile"
        ) from None
    try:
        body = json.loads(raw)
        version = body.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: schema version {version!r}, this nermill reads {SCHEMA_VERSION}; build the artifact again"
            )
        manifest = _parse(body, hashlib.sha256(raw).hexdigest())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a manifest ({error}); build the artifact again") from None
    for name, expected in manifest.files.items():
        if file_sha256(folder / name) != expected:
            raise ArtifactError(
                f"{folder / name}: changed since it was built (sha256 differs); build or copy the artifact again"
            )
    return manifest


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal.

    Raises:
        ArtifactError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; build or copy the artifact again") from None
    return digest.hexdigest()


def _parse(body: dict[str, Any], sha256: str) -> Manifest:
    known = {f.name for f in fields(Manifest)}
    if unknown := body.keys() - known:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    for name, kind in (("backend", Backend), ("layout", Layout), ("precision", Precision)):
        if body[name] not in get_args(kind):
            raise ValueError(f"{name} {body[name]!r}: this nermill knows {', '.join(get_args(kind))}")
    body["inputs"] = tuple(GraphInput(**entry) for entry in body["inputs"])
    body["shapes"] = tuple((int(rows), int(length)) for rows, length in body["shapes"])
    body["labels"] = tuple(body["labels"])
    for name in body["files"]:
        if not _is_plain(name):
            raise ValueError(f"file name {name!r}: files must be in the artifact's own folder")
    if unhashed := {body["model_file"], TOKENIZER_FILE} - body["files"].keys():
        raise ValueError(f"no sha256 of {', '.join(sorted(unhashed))}")
    if not (isinstance(body["token_budget"], int) and body["token_budget"] > 0):
        raise ValueError(f"token_budget {body['token_budget']!r}: at least 1")
    return Manifest(**body, sha256=sha256)


def _is_plain(name: str) -> bool:
    return name == Path(name).name and "\0" not in name and name not in ("", "..")


def resolve_artifact(model: str) -> Path:
    """The folder of an artifact.

    Args:
        model: ``demo`` for the bundled model, else a path, which is not checked.

    Raises:
        ArtifactError: the bundled model is not installed.
    """
    if model != "demo":
        return Path(model)
    spec = find_spec("nermill.model_build")
    if spec is None or spec.origin is None:
        raise ArtifactError("the bundled demo model is not installed; name an artifact with --model")
    return Path(spec.origin).parent / "demo" / "artifact"
