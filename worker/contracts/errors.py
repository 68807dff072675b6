"""The one tree of errors; every message says what is wrong, where, and what to do.

::

    NermillError
    ├── UsageError          wrong input or option            exit code 2
    │   └── ArtifactError   a model folder that cannot be served
    ├── BrokerError         the queue does not answer        exit code 1
    ├── StoreError          a folder or store that does not take or give files
    │   └── UnreachableError    a file that is not there, or not for us
    ├── EngineError         an accelerator that failed
    ├── EvaluationError     scores that contradict each other
    ├── MessageError        a queue or ledger entry that is not ours
    └── LeaseLostError      the shard is another worker's by now
"""

from __future__ import annotations


class NermillError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is one line for the person at the terminal."""

    exit_code = 1


class UsageError(NermillError):
    """A wrong input, option or file: nothing was started."""

    exit_code = 2


class ArtifactError(UsageError):
    """A model artifact that is missing, changed, foreign or unfit for this machine."""


class BrokerError(NermillError):
    """The broker cannot be reached or refuses us."""


class StoreError(NermillError):
    """A file could not be read or written; the shard that needed it is handed back."""


class UnreachableError(StoreError):
    """A file that is missing or must not be read; on another machine it may be there."""


class EngineError(NermillError):
    """The device or its runtime failed."""


class EvaluationError(NermillError):
    """seqeval's scores and ours differ; nothing was written."""


class MessageError(NermillError):
    """A message or ledger entry that does not fit the contract; it is counted and dropped."""


class LeaseLostError(NermillError):
    """The shard went to another worker while we held it; what we made of it is dropped."""
