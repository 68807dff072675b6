"""The producer in Python: send documents one by one, submit files, wait for the tables."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, get_args

from nermill.producer.entities.tagging import REQUEST_SECONDS, request_annotations
from nermill.producer.runs import by_value
from nermill.producer.runs import run as runs
from nermill.producer.runs.base_stream import BaseStream
from nermill.producer.runs.planning import Request, make_plan
from nermill.producer.runs.queue import DEFAULT_BROKER, HIGH_WATER, Queue
from nermill.producer.runs.shards import ShardLimits
from nermill.producer.runs.status import Status, look
from nermill.producer.runs.stream import Stream
from nermill.producer.runs.stream_by_value import StreamByValue
from nermill.producer.sources import ReadOptions
from nermill.producer.sources.options import text_document
from nermill.worker.contracts.document import Annotation, Document
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.plan import Options, Priority


class Producer:
    """Brings documents to the workers at a broker.

    ::

        with Producer("tagged", broker="redis://queue:6379/0") as producer:
            producer.send("Ada Lovelace met Charles Babbage.", id="letter-1")
            status = producer.wait()
        print(status.run, status.ok)

    Leaving the ``with`` block ends the stream of sent documents; what was sent is durable then.

    Args:
        out: Folder or URI that holds runs; not needed for ``tag``.
        broker: Broker URL; None takes ``NERMILL_BROKER_URL``, else the local default.
        model: Artifact, by name or path, that must tag the documents; None leaves it to the workers.
        options: How documents are tagged.
        limits: When a shard is full.
        linger: Seconds that a sent document waits at most for its shard to fill.
        high_water: Unfinished documents above which sending waits.
        priority: ``high``, ``normal`` or ``low``: shards of a higher priority go first.
        by_value: Documents travel through the broker: ``out`` is as the workers see it, and is not looked at. What
            was sent is durable once a worker has stored it there.

    Raises:
        UsageError: an argument that cannot be served.
        BrokerError: nobody answers at the broker.
    """

    def __init__(
        self,
        out: str | None = None,
        *,
        broker: str | None = None,
        model: str | None = None,
        options: Options | None = None,
        limits: ShardLimits | None = None,
        linger: float = 1.0,
        high_water: int = HIGH_WATER,
        priority: Priority = "normal",
        by_value: bool = False,
    ) -> None:
        if priority not in get_args(Priority):
            raise UsageError(f"priority {priority!r}: say high, normal or low")
        self._priority, self._by_value = priority, by_value
        self._out, self._model, self._linger, self._high_water = out, model, linger, high_water
        self._options, self._limits = options or Options(), limits or ShardLimits()
        self._queue = Queue(broker or os.environ.get("NERMILL_BROKER_URL", DEFAULT_BROKER))
        self._stream: BaseStream | None = None
        self._opening = threading.Lock()  # of several threads that send first, one opens the stream

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(
        self,
        document: str | Sequence[str],
        *,
        id: str | None = None,  # the field's own name for it
        fields: Mapping[str, Any] | None = None,
    ) -> int:
        """Sends one document: a text, or words that were split before. Safe from several threads.

        Args:
            document: The text, or its words.
            id: Its name in the table; default: its index.
            fields: Kept in the table where ``Options.keep_fields`` says so.

        Returns:
            The document's index in the stream's run.

        Raises:
            StoreError: the output takes no more.
        """
        name, kept = id or "", None if fields is None else dict(fields)
        if isinstance(document, str):
            return self._open_stream().add(text_document(name, document, kept))
        return self._open_stream().add(Document(name, words=tuple(document), fields=kept))

    def flush(self) -> None:
        """Makes what was sent durable now, without waiting for full shards."""
        if self._stream is not None:
            self._stream.flush()

    def submit(self, *inputs: str, read: ReadOptions | None = None) -> str:
        """Plans and sends a run over files; the same files again resume their run.

        Args:
            inputs: Files, folders, globs or URIs.
            read: Formats, columns, units.

        Returns:
            The run's folder or URI, for ``wait`` and ``status``.

        Raises:
            UsageError: a wrong input; nothing was written.
        """
        read = read or ReadOptions()
        request = Request(inputs, self._needed_out(), self._model, read, self._options, self._limits, self._priority)
        if self._by_value:
            with by_value.packed(request) as packed:
                by_value.send(packed, self._queue)
            return packed.run.uri
        run, plan = make_plan(request)
        runs.resume(run, plan, self._queue, self._high_water)
        return run.uri

    def tag(
        self, documents: Sequence[str] | Sequence[Sequence[str]], *, timeout: float = REQUEST_SECONDS
    ) -> list[Annotation]:
        """Has the running workers tag a few documents at once, in the same batches as shards.

        Args:
            documents: Texts, or lists of words; at most 1,000 and a million characters together.
            timeout: Seconds to wait for the answer.

        Returns:
            One annotation a document, in order; ``fault`` is set where one could not be tagged.

        Raises:
            TypeError: ``documents`` is a single text.
            UsageError: the workers refuse the request, with the reason.
            BrokerError: no answer in time.
        """
        if isinstance(documents, (str, bytes)):
            raise TypeError(f"a single text: pass a list of texts, [{documents[:20]!r}]")
        return request_annotations(self._queue, documents, self._options, model=self._model, timeout=timeout)

    def wait(self, run: str | None = None) -> Status:
        """Follows a run to its end; without a name, ends the stream of sent documents and follows that.

        Raises:
            UsageError: no such run, or nothing was sent.
            BrokerError: the broker stays away.
        """
        if run is None:
            run = self._sent_run()
            self.close()
        folder, plan = by_value.open_seen_or_not(run, lambda: self._queue)
        own = self._stream if self._stream is not None and self._stream.run.uri == folder.uri else None
        return runs.wait(folder, plan, self._queue, send_again=own.send_again if own else None)

    def status(self, run: str | None = None) -> Status:
        """A run's status now; without a name, that of the stream of sent documents."""
        folder, plan = by_value.open_seen_or_not(run or self._sent_run(), lambda: self._queue)
        return look(folder, plan, self._queue)

    def close(self) -> None:
        """Ends the stream of sent documents; a repeated call does nothing."""
        if self._stream is not None and not self._stream.is_closed:
            self._stream.close()

    def _open_stream(self) -> BaseStream:
        with self._opening:
            if self._stream is None or self._stream.is_closed:
                self._stream = (StreamByValue if self._by_value else Stream)(
                    self._needed_out(),
                    self._queue,
                    model=self._model,
                    options=self._options,
                    limits=self._limits,
                    linger=self._linger,
                    high_water=self._high_water,
                    source="nermill.producer.Producer",
                    priority=self._priority,
                )
            return self._stream

    def _needed_out(self) -> str:
        if self._out is None:
            raise UsageError("Producer(out): name the folder or URI that holds runs; only tag works without one")
        return self._out

    def _sent_run(self) -> str:
        if self._stream is None:
            raise UsageError("nothing was sent; name a run, or send a document first")
        return self._stream.run.uri
