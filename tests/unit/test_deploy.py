"""The files of deploy/ are valid by their tools and schemas, and refer to settings and metrics that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from nermill.worker.process.settings import Settings
from nermill.worker.process.supervisor import SILENT_SECONDS, START_SECONDS

kubernetes_validate = pytest.importorskip("kubernetes_validate")
keda = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
compose_spec = pytest.importorskip("compose_spec")

DOCKERFILES = ("Dockerfile.producer", "Dockerfile.worker", "Dockerfile.worker-ascend")
OVERLAYS = ("cpu", "cuda", "ascend")
KUBERNETES = "1.33"
# Variables of the launcher and of the compose files themselves, beside the worker's settings.
OTHER_VARIABLES = {"NERMILL_DEVICES", "NERMILL_PASSWORD", "NERMILL_DATA", "NERMILL_MODELS", "NERMILL_VALKEY_MEMORY"}

Object = dict[str, Any]


@pytest.fixture(scope="module")
def deploy(root: Path) -> Path:
    return root / "deploy"


def documents(path: Path) -> list[Object]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def check(resource: Object) -> None:
    """Raises where a resource does not match its schema or has a field that is not in it."""
    if resource["apiVersion"].startswith("keda.sh/"):
        model = getattr(keda, resource["kind"]).model_validate(resource)
        understood = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert understood["spec"] == resource["spec"]  # the models drop what they do not know
    else:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_accepts_the_image(deploy: Path, name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    answer = subprocess.run([hadolint, deploy / name], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_is_pinned_not_root_and_copies_what_is_sent(root: Path, deploy: Path, name: str) -> None:
    lines = (deploy / name).read_text("utf-8").splitlines()
    (image,) = [line.partition("=")[2] for line in lines if re.match(r"ARG \w+_IMAGE=", line)]
    assert re.search(r":\d[\w.-]*$", image)
    assert [line.split()[1] for line in lines if line.startswith("USER")][-1] == "10001:10001"
    assert sum(line.startswith("HEALTHCHECK") for line in lines) == 1
    sent = {line[1:] for line in (root / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {
        source
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
        if not source.startswith("--")
    }
    assert {"pyproject.toml", "worker"} <= copied <= sent
    assert all((root / source).exists() for source in copied - {"README.md"})


def test_variables_are_settings(deploy: Path) -> None:
    known = {f"NERMILL_{field.name.upper()}" for field in fields(Settings)} | OTHER_VARIABLES
    used = {
        name: str(path)
        for path in deploy.rglob("*")
        if path.is_file() and path.suffix != ".whl"
        for name in re.findall(r"NERMILL_[A-Z]+(?:_[A-Z]+)*", path.read_text("utf-8"))
    }
    assert len(used) > 8
    assert {name: where for name, where in used.items() if name not in known} == {}


def interpolated(path: Path, variables: dict[str, str]) -> Object:
    """A compose file with its ``${NAME:-default}`` filled in and its merge keys resolved."""

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if name in variables:
            return variables[name]
        assert operator != ":?", f"{name} must be given: {rest}"
        return rest or ""

    return yaml.safe_load(re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", fill, path.read_text("utf-8")))


def test_compose_files_fit_the_specification(deploy: Path) -> None:
    variables = {"NERMILL_PASSWORD": "secret", "NERMILL_MODEL": "/models/ner"}
    for name in ("compose.yaml", "compose.ascend.yaml"):
        content = interpolated(deploy / name, variables)
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(content))
        with pytest.raises(ValueError, match="servcies"):
            compose_spec.PyCompose.from_yaml(yaml.safe_dump({**content, "servcies": {}}))


def test_compose_wants_a_password_and_publishes_no_broker(deploy: Path) -> None:
    with pytest.raises(AssertionError, match="NERMILL_PASSWORD"):
        interpolated(deploy / "compose.yaml", {})
    services = interpolated(deploy / "compose.yaml", {"NERMILL_PASSWORD": "secret"})["services"]
    assert "ports" not in services["valkey"]
    assert all(port.startswith("127.0.0.1:") for port in services["worker"]["ports"])
    assert all(service["read_only"] and service["cap_drop"] == ["ALL"] for service in services.values())
    grace = float(services["worker"]["environment"]["NERMILL_GRACE_SECONDS"])
    assert float(services["worker"]["stop_grace_period"].removesuffix("s")) > grace + 5


def manifests(deploy: Path) -> Iterator[Path]:
    return (p for p in (deploy / "kubernetes").rglob("*.yaml") if p.name != "kustomization.yaml")


def test_every_manifest_fits_its_schema(deploy: Path) -> None:
    resources = [resource for path in manifests(deploy) for resource in documents(path)]
    assert {"Deployment", "StatefulSet", "ScaledObject", "NetworkPolicy", "Job"} <= {r["kind"] for r in resources}
    for resource in resources:
        check(resource)


def test_schemas_refuse_what_is_misspelt(deploy: Path) -> None:
    resources = {r["kind"]: r for path in manifests(deploy) for r in documents(path)}
    for kind in ("Deployment", "ScaledObject"):
        with pytest.raises(Exception, match=r"(?i)replcas"):
            check({**resources[kind], "spec": {**resources[kind]["spec"], "replcas": 1}})


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(
    deploy: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Object]:
    """The resources of an overlay as kustomize builds it, by kind; where a kind occurs twice, by kind and name."""
    copy = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(deploy / "kubernetes", copy)
    folder = copy / "overlays" / request.param
    shutil.copy(copy / "overlays" / "secret.env.example", folder / "secret.env")
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            break
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    answer = subprocess.run([*command, folder], capture_output=True, text=True)
    if "components" in answer.stderr and "unknown" in answer.stderr:
        pytest.skip(f"{command[0]} is too old for components")
    assert answer.returncode == 0, answer.stderr
    return {f"{r['kind']}/{r['metadata']['name']}": r for r in yaml.safe_load_all(answer.stdout)}


def one(overlay: dict[str, Object], kind: str, name: str) -> Object:
    (found,) = [r for key, r in overlay.items() if key.startswith(f"{kind}/{name}")]
    return found


def test_overlay_fits_its_schemas(overlay: dict[str, Object]) -> None:
    for resource in overlay.values():
        check(resource)
        assert resource["metadata"]["namespace"] == "nermill"


def test_overlay_names_what_it_makes(overlay: dict[str, Object]) -> None:
    text = yaml.safe_dump(list(overlay.values()))
    secret = one(overlay, "Secret", "nermill-broker")["metadata"]["name"]
    used = set(re.findall(r"nermill-broker-\w+", text))
    assert used == {secret}
    scaled = one(overlay, "ScaledObject", "nermill-worker")["spec"]["scaleTargetRef"]["name"]
    assert f"Deployment/{scaled}" in overlay


def test_overlay_keeps_its_times_in_order(overlay: dict[str, Object]) -> None:
    settings = one(overlay, "ConfigMap", "nermill-worker")["data"]
    pod = one(overlay, "Deployment", "nermill-worker")["spec"]["template"]["spec"]
    scaler = one(overlay, "ScaledObject", "nermill-worker")["spec"]
    assert pod["terminationGracePeriodSeconds"] > float(settings["NERMILL_GRACE_SECONDS"]) + 10
    assert scaler["cooldownPeriod"] > 2 * float(settings["NERMILL_LEASE_SECONDS"])
    (container,) = pod["containers"]
    assert int(settings["NERMILL_METRICS_PORT"]) == container["ports"][0]["containerPort"]


def test_overlay_lets_workers_reach_the_broker_and_nobody_else(overlay: dict[str, Object]) -> None:
    broker = one(overlay, "NetworkPolicy", "nermill-broker")["spec"]
    worker = one(overlay, "Deployment", "nermill-worker")["spec"]["template"]["metadata"]["labels"]
    admitted = broker["ingress"][0]["from"]
    assert admitted[0]["podSelector"]["matchLabels"].items() <= worker.items()
    pods = one(overlay, "StatefulSet", "nermill-valkey")["spec"]["template"]["metadata"]["labels"]
    assert broker["podSelector"]["matchLabels"].items() <= pods.items()


def test_overlay_gives_its_device(overlay: dict[str, Object]) -> None:
    (container,) = one(overlay, "Deployment", "nermill-worker")["spec"]["template"]["spec"]["containers"]
    device = {"cpu": None, "cuda:0": "nvidia.com/gpu", "npu:0": "huawei.com/Ascend310P"}[container["args"][1]]
    limits = container["resources"]["limits"]
    assert set(limits) == {"memory"} | ({device} if device else set())


def test_scaler_asks_for_metrics_and_a_queue_that_exist(deploy: Path) -> None:
    pytest.importorskip("prometheus_client")
    from tokenizers import Tokenizer, models

    from nermill.worker.contracts.message import KEY_PREFIX
    from nermill.worker.process.metrics import Metrics
    from nermill.worker.tagging.pipeline import Pipeline
    from tests.doubles.engine import HashEngine, manifest

    metrics = Metrics()
    pipeline = Pipeline(HashEngine(manifest()), Tokenizer(models.WordLevel()))
    metrics.observe(pipeline, lambda: 0, lambda: None, "cpu")
    pipeline.close()
    exported = {family.name for family in metrics.registry.collect()}
    scaler = documents(deploy / "kubernetes/components/keda/scaledobject.yaml")[0]
    prometheus, redis = (trigger["metadata"] for trigger in scaler["spec"]["triggers"])
    asked = set(re.findall(r"nermill_\w+", prometheus["query"]))
    assert asked
    assert asked <= exported
    assert redis["listName"] == KEY_PREFIX + "sent"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(deploy: Path, tmp_path: Path) -> None:
    unit = (deploy / "systemd" / "nermill-worker@.service").read_text("utf-8")
    settings = (deploy / "systemd" / "worker.env.example").read_text("utf-8")
    assert "/opt/nermill/bin/nermill-worker --devices %i" in unit
    instance = tmp_path / "nermill-worker@cpu.service"  # verify takes a colon for its own syntax
    instance.write_text(unit.replace("/opt/nermill/bin/nermill-worker", "/bin/true"))
    verify = ["systemd-analyze", "verify", "--man=no", str(instance)]
    answer = subprocess.run(verify, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    grace = float(re.findall(r"NERMILL_GRACE_SECONDS=(\d+)", settings)[0])
    assert float(re.findall(r"TimeoutStopSec=(\d+)s", unit)[0]) > grace + 5
    hang = float(re.findall(r"NERMILL_HANG_SECONDS=(\d+)", settings)[0])
    assert "Type=notify" in unit
    assert float(re.findall(r"WatchdogSec=(\d+)s", unit)[0]) > hang + SILENT_SECONDS + 30
    assert 60 * float(re.findall(r"TimeoutStartSec=(\d+)min", unit)[0]) > START_SECONDS
    instance.write_text(
        unit.replace("Restart=always", "Restart=sometimes").replace("/opt/nermill/bin/nermill-worker", "/bin/true")
    )
    assert "sometimes" in subprocess.run(verify, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    "script",
    [
        "ascend-entrypoint.sh",
        "kubernetes/components/sentinel/start-valkey.sh",
        "kubernetes/components/sentinel/start-sentinel.sh",
    ],
)
def test_shell_scripts_parse(deploy: Path, script: str) -> None:
    path = deploy / script
    shell = path.read_text("utf-8").splitlines()[0].removeprefix("#!")
    subprocess.run([shell, "-n", path], check=True)


def test_ascend_entrypoint_becomes_the_worker(deploy: Path, tmp_path: Path) -> None:
    worker = tmp_path / "nermill-worker"
    worker.write_text('#!/bin/sh\necho "pid $$ args $*"\n')
    worker.chmod(0o755)
    command = ["/bin/bash", str(deploy / "ascend-entrypoint.sh"), "--devices", "npu:0"]
    with subprocess.Popen(
        command, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, stdout=subprocess.PIPE, text=True
    ) as process:
        out, _ = process.communicate(timeout=10)
    assert out == f"pid {process.pid} args --devices npu:0\n"


def sections(guide: str) -> dict[str, str]:
    """The text below each third-level heading of the operating guide."""
    pieces = re.split(r"^#{2,3} (.+)$", guide, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_every_alert_has_its_paragraph_with_a_command(deploy: Path) -> None:
    guide = sections((deploy / "README.md").read_text("utf-8"))
    (group,) = documents(deploy / "prometheus" / "alerts.yaml")[0]["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert names == [title for title in guide if title.startswith("Nermill")]
    for rule in group["rules"]:
        assert rule["annotations"]["runbook"] == f"deploy/README.md#{rule['alert'].lower()}"
        assert re.search(r"`(nermill|nermill-worker|systemctl|kubectl|valkey-cli) [^`]+`", guide[rule["alert"]])


def test_the_guide_names_commands_options_and_settings_that_exist(root: Path, deploy: Path) -> None:
    from typer.main import get_command

    from nermill.model_build.cli import app as build
    from nermill.producer.cli import app as producer

    known = {"nermill": get_command(producer), "nermill-build": get_command(build)}
    guide = (deploy / "README.md").read_text("utf-8")
    named = re.findall(r"`(nermill|nermill-build) (\w+)([^`]*)`", guide)
    assert len(named) > 10
    for script, name, rest in named:
        command = known[script].commands[name]  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, (script, name, rest)
