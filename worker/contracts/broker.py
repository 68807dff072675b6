"""How both sides reach the broker: one URL, one Celery configuration, one Redis client for the ledger.

celery and redis are imported when they are asked for, not before.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from nermill.worker.contracts.errors import BrokerError, UsageError
from nermill.worker.contracts.message import PRIORITY_STEPS, QUEUE

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
RESULT_SECONDS = 3600.0
# An unreachable backend costs a result, and holds up a worker's thread no longer than this.
_BACKEND_OPTIONS: dict[str, Any] = {"retry_policy": {"timeout": 5.0, "max_retries": 3}}
_SECRETS = re.compile(r"(?<=://)[^;]*(?=@)|(?<=password=)[^&;]*")
DEFAULT_SENTINEL_SERVICE = "mymaster"
_NO_CLUSTER = (
    "Redis Cluster cannot carry Celery's queues (their keys hash to different slots); "
    "use one Redis or Valkey, or Sentinel"
)

# Found sound one by one for a worker on threads whose tasks may be killed at any moment.
CELERY_SETTINGS: dict[str, Any] = {
    "task_default_queue": QUEUE,
    "task_serializer": "json",
    "accept_content": ["json"],
    "result_serializer": "json",
    "result_accept_content": ["json"],
    "task_track_started": True,
    "task_send_sent_event": True,
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_acks_on_failure_or_timeout": True,
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
}
TRANSPORT_OPTIONS: dict[str, Any] = {
    "priority_steps": PRIORITY_STEPS,
    "queue_order_strategy": "round_robin",
    "polling_interval": 0.1,  # seconds that one BRPOP waits: a queue that is consumed from again joins the next one
    "visibility_timeout": 3600,  # a message that comes twice finds its shard recorded, so nothing depends on this
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 15,
    "max_connections": 256,
}


def check_url(url: str) -> str:
    """The scheme of a broker URL.

    Raises:
        UsageError: a scheme that cannot be served, with the reason.
    """
    scheme = urlsplit(url).scheme
    if scheme.startswith("redis+cluster") or scheme.startswith("rediss+cluster"):
        raise UsageError(f"{redacted(url)}: {_NO_CLUSTER}")
    if {"username", "password"} & parse_qs(urlsplit(url).query).keys():
        raise UsageError(f"{redacted(url)}: user and password stand before the host: redis://USER:PASSWORD@HOST")
    if scheme not in SCHEMES:
        raise UsageError(f"{redacted(url)}: broker URLs begin with {', '.join(s + '://' for s in SCHEMES)}")
    return scheme


def redacted(url: str) -> str:
    """The URL, or list of them, without user and password, for messages and logs."""
    return _SECRETS.sub("***", url)


def celery_app(url: str, *, results: bool = False, result_seconds: float = RESULT_SECONDS) -> Celery:
    """A Celery application on that broker; JSON alone goes in and out.

    Args:
        url: Broker URL.
        results: Whether it stores and reads results, in the same Redis. An application that only sends needs none:
            with a result backend, each message that it sends would subscribe it to that message's result.
        result_seconds: How long results are kept.

    Raises:
        UsageError: a URL that cannot be served.
    """
    scheme = check_url(url)
    from celery import Celery

    options = dict(TRANSPORT_OPTIONS)
    if scheme == "sentinel":
        options["master_name"] = _sentinel_service(url)
        url = ";".join(host.partition("?")[0] for host in url.split(";"))  # kombu falls over it at the next host
    app = Celery("nermill", broker=url, set_as_current=False)
    app.conf.update(CELERY_SETTINGS, broker_transport_options=options)
    if results:
        app.conf.update(
            result_backend=_backend_url(scheme, url),
            result_expires=result_seconds,
            result_backend_transport_options={**_BACKEND_OPTIONS, **_only(options, "master_name")},
        )
    return app


def _only(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: options[name]} if name in options else {}


def _backend_url(scheme: str, url: str) -> str:
    if scheme != "rediss" or "ssl_cert_reqs" in url:
        return url
    return url + ("&" if "?" in url else "?") + "ssl_cert_reqs=required"  # Celery's backend asks for it by name


def redis_client(url: str, *, patient: bool = True) -> Redis:
    """A Redis client for the ledger, with text answers; it connects when it is first used.

    Args:
        url: Broker URL.
        patient: Whether it tries again, for some seconds, before it says that nobody answers.

    Raises:
        UsageError: a URL that cannot be served.
    """
    scheme = check_url(url)
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    common: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "replace",  # what is not UTF-8 is not ours; whoever parses it says so
        "socket_timeout": TRANSPORT_OPTIONS["socket_timeout"],
        "socket_connect_timeout": TRANSPORT_OPTIONS["socket_connect_timeout"],
        "health_check_interval": TRANSPORT_OPTIONS["health_check_interval"],
    }
    if not patient:
        common["retry"] = Retry(NoBackoff(), 0)
    parts = urlsplit(url)
    try:
        if scheme == "redis+socket":
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            return Redis(
                unix_socket_path=unquote(parts.path),
                db=int(query.get("virtual_host", "0").strip("/")),
                username=unquote(parts.username) if parts.username else None,
                password=unquote(parts.password) if parts.password else None,
                **common,
            )
        if scheme == "sentinel":
            hosts = [urlsplit(one if "://" in one else f"sentinel://{one}") for one in url.split(";")]
            sentinel = Sentinel(  # type: ignore[no-untyped-call]
                [(host.hostname or "localhost", host.port or 26379) for host in hosts],
                sentinel_kwargs={"socket_timeout": 5},
            )
            last = hosts[-1]
            return sentinel.master_for(  # type: ignore[no-any-return, no-untyped-call]
                _sentinel_service(url), db=int(last.path.strip("/") or 0), password=last.password, **common
            )
        return Redis.from_url(url, **common)  # type: ignore[no-any-return]
    except (RedisError, ValueError) as error:
        raise UsageError(f"{redacted(url)}: not a broker URL ({error})") from None


def check_broker(url: str) -> Redis:
    """A client whose server answered, and is one that can be used.

    Raises:
        BrokerError: nobody answers, or not for us, in one line without the password.
        UsageError: a URL that cannot be served.
    """
    from redis.exceptions import RedisError

    try:
        with redis_client(url, patient=False) as client:
            client.ping()
            server = client.info("server")
    except (RedisError, OSError) as error:
        raise BrokerError(
            f"{redacted(url)}: the broker does not answer ({error}); start it, or correct --broker / NERMILL_BROKER_URL"
        ) from None
    version = str(server.get("redis_version", "0"))
    if "cluster" in (server.get("redis_mode"), server.get("server_mode")):
        raise BrokerError(f"{redacted(url)}: {_NO_CLUSTER}")
    if tuple(int(n) for n in version.split(".")[:2]) < (6, 2):
        raise BrokerError(f"{redacted(url)}: Redis {version} is too old; 6.2 or Valkey is needed")
    return redis_client(url)


def _sentinel_service(url: str) -> str:
    query = parse_qs(urlsplit(url.split(";")[-1]).query)
    return query.get("master_name", [DEFAULT_SENTINEL_SERVICE])[-1]


def first_version(client: Redis) -> str:
    """What the first version of nermill left at a broker, in one line with what to do; empty where there is nothing.

    Its ledger keys begin with ``nermill:run:``, ``nermill:runs`` and ``nermill:workers``, its queue is the list
    ``nermill:nermill``; this version touches none of them.
    """
    runs, workers = client.zcard("nermill:runs"), client.zcard("nermill:workers")
    bells = client.exists("nermill:nermill")
    if not (runs or workers or bells):
        return ""
    return (
        f"nermill 1 is at this broker too ({runs} runs, {workers} workers): its runs and workers are not served from "
        "here; let its workers finish its runs, or submit them again with this version and stop its workers"
    )
