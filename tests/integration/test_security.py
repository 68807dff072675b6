"""TLS, users with few rights, and passwords that nobody gets to see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nermill.producer.runs.queue import Queue
from nermill.producer.runs.run import send
from nermill.worker.contracts.broker import celery_app, redacted
from nermill.worker.contracts.errors import BrokerError, StoreError
from tests.doubles.tls import make_certificate, tls_proxy
from tests.harness import DOUBLE, Harness, rows, texts

PASSWORD = "s3cret-pass"
USERS = (Path(__file__).parents[2] / "deploy" / "users.acl").read_text("utf-8").splitlines()
(RIGHTS,) = [line.split()[4:] for line in USERS if line.startswith("user worker ")]  # behind name, state and password


@pytest.fixture
def user_url(fleet: Harness) -> str:
    """The server's URL for a user with few rights; nobody else may enter."""
    with fleet.server.client() as client:
        client.execute_command("ACL", "SETUSER", "fleet", "on", f">{PASSWORD}", *RIGHTS)
        client.execute_command("ACL", "SETUSER", "default", "off")
    return f"redis+socket://fleet:{PASSWORD}@{fleet.server.socket}"


@contextmanager
def tls_url(fleet: Harness, user: str = "") -> Iterator[str]:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command makes the certificate")
    key, certificate = make_certificate(fleet.folder)
    with tls_proxy(fleet.server.socket, key, certificate) as port:
        yield f"rediss://{user}localhost:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={certificate}"


def test_a_run_over_tls_as_a_user_with_few_rights(fleet: Harness, user_url: str) -> None:
    with tls_url(fleet, f"fleet:{PASSWORD}@") as url:
        fleet.server.url = url
        fleet.worker()
        run, plan = fleet.submit(texts(200))
        fleet.wait(run, plan)
        assert len(rows(run)) == 200
        fleet.workers[0].terminate()
    assert PASSWORD not in fleet.logs()
    assert "localhost" in fleet.logs(), "the log says where the worker is connected"


def test_a_certificate_that_nobody_vouches_for_is_refused(fleet: Harness) -> None:
    with tls_url(fleet) as url, pytest.raises(BrokerError, match="certificate verify failed"):
        Queue(url.partition("&ssl_ca_certs")[0])


@pytest.mark.parametrize("user", ["", "fleet:wrong-one@", "default:@"])
def test_without_the_password_nobody_enters(fleet: Harness, user_url: str, user: str) -> None:
    with pytest.raises(BrokerError, match="does not answer") as caught:
        Queue(f"redis+socket://{user}{fleet.server.socket}")
    assert "wrong-one" not in str(caught.value)


def test_no_password_is_seen_from_outside(fleet: Harness, user_url: str) -> None:
    """Neither in process titles, nor in logs, nor in what commands print, whichever way the URL was given."""
    environment = {**os.environ, "NERMILL_ALLOWED_ROOTS": str(fleet.out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nermill.worker.process.launch", "--devices", "cpu", "--broker", user_url]
    with (fleet.folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        fleet.server.url = user_url
        run, plan = fleet.submit(texts(20))
        fleet.wait(run, plan)
        supervisor = psutil.Process(process.pid)
        titles = [" ".join(one.cmdline()) for one in [supervisor, *supervisor.children(recursive=True)]]
    finally:
        process.terminate()
        process.wait(40)
    assert len(titles) == 2
    assert not [title for title in titles if PASSWORD in title]
    assert PASSWORD not in (fleet.folder / "worker.log").read_text()
    for arguments in (["status", run.uri, "--json"], ["doctor", "--json"], ["resume", run.uri]):
        asked = subprocess.run(
            [sys.executable, "-m", "nermill.producer.cli", *arguments],
            env={**environment, "NERMILL_BROKER_URL": user_url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert asked.stdout + asked.stderr
        assert PASSWORD not in asked.stdout + asked.stderr


def test_a_link_in_a_runs_folder_leads_nowhere(fleet: Harness) -> None:
    outside = fleet.folder / "outside"
    outside.mkdir()
    run, plan = fleet.plan(["Ada met Charles in London.", ""])
    Path(run.path("_rejects")).symlink_to(outside)
    send(run, plan, fleet.queue())
    fleet.worker()
    with pytest.raises(StoreError, match="outside the allowed roots; allow it with NERMILL_ALLOWED_ROOTS"):
        fleet.wait(run, plan)
    assert not list(outside.iterdir())
    assert not run.committed()
    Path(run.path("_rejects")).unlink()
    send(run, plan, fleet.queue())
    assert fleet.wait(run, plan).rejected == 1


def test_a_worker_whose_server_goes_away_tells_no_password(fleet: Harness, user_url: str) -> None:
    worker = fleet.worker(DOUBLE, NERMILL_BROKER_URL=user_url)
    wait_for(fleet, "Connected to redis+socket://fleet:**@")
    worker.await_ready()  # a connection that is lost earlier is told with other words
    fleet.server.kill()
    wait_for(fleet, "Connection to broker lost")
    worker.kill()
    assert PASSWORD not in worker.log.read_text()


def wait_for(fleet: Harness, words: str) -> None:
    fleet.until(lambda: words in fleet.logs(), 30)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}@host/0",
        f"redis://user:with/slash{PASSWORD}@host:1/0?x=1",
        f"sentinel://:{PASSWORD}@one;sentinel://:{PASSWORD}@two/0?master_name=m",
        f"redis://host/0?password={PASSWORD}&x=1",
        f"redis+socket://user:{PASSWORD}@/run/valkey.sock",
    ],
)
def test_urls_in_messages_have_no_password(url: str) -> None:
    assert PASSWORD not in redacted(url)
    assert redacted(url).partition(":")[0] == url.partition(":")[0]


def test_celery_takes_the_sentinels_service_apart_from_their_hosts() -> None:
    app = celery_app("sentinel://:test-password@one:26379;sentinel://:test-password@two:26379/0?master_name=m")
    assert app.conf.broker_url == "sentinel://:test-password@one:26379;sentinel://:test-password@two:26379/0"
    assert app.conf.broker_transport_options["master_name"] == "m"
