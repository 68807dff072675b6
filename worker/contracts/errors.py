"""All errors that nermill raises on purpose; every message says what is wrong, where, and what to do.

::

    NermillError
    ├── UsageError          wrong input or option            exit code 2
    │   └── ArtifactError   a model folder that cannot be served
    ├── BrokerError         the queue does not answer        exit code 1
    ├── StoreError          a file could not be read or written
    │   └── UnreachableError    a file is missing or access to it is denied
    ├── EngineError         an accelerator failed
    ├── EvaluationError     scores contradict each other
    ├── MessageError        a message or ledger entry is not valid
    └── LeaseLostError      a lease ended, so that another worker may have it
"""

from __future__ import annotations


class NermillError(Exception):
    """Base of all errors raised on purpose; ``str(error)`` is one line for the user."""

    exit_code = 1


class UsageError(NermillError):
    """A wrong input, option or file; nothing was started."""

    exit_code = 2


class ArtifactError(UsageError):
    """A model artifact that is missing, changed, of another version, or cannot run on this machine."""


class BrokerError(NermillError):
    """The broker cannot be reached, or refuses the connection or a command."""


class StoreError(NermillError):
    """A file could not be read or written; the shard that needed it is released."""


class UnreachableError(StoreError):
    """A file that is missing or may not be read; on another machine it may be readable."""


class EngineError(NermillError):
    """The device or its runtime failed."""


class EvaluationError(NermillError):
    """seqeval's scores and nermill's differ; nothing was written."""


class MessageError(NermillError):
    """A message or ledger entry that is not valid; it is counted and dropped."""


class LeaseLostError(NermillError):
    """The lease of a shard or of a last step ended, so another worker may have it; this one's result is dropped."""
