"""How every command ends: one line for the person, the documented exit code, and no traceback for a user's mistake."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from nermill.worker.contracts.errors import NermillError, UsageError

INTERRUPTED = 3  # not complete; it can be gone on with
_SHELL_INTERRUPTED = 130  # what the parser answers after Ctrl-C
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def exit_code(program: str, command: Callable[[], int | None], aborted: type[Exception]) -> int:
    """Runs a command line and says how it ended.

    Args:
        program: Its name, before each message.
        command: Parses and runs; returns an exit code, or None for 0.
        aborted: What the parser makes of Ctrl-C.

    Raises:
        Exception: a bug of ours, with its traceback.
    """
    try:
        code = command() or 0
        sys.stdout.flush()  # a reader that left is met here, not when the interpreter ends
    except NermillError as error:
        return _fail(program, str(error), error.exit_code)
    except (BrokenPipeError, SystemExit) as error:  # the parser and rich make an exit with 1 of the former
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still buffered
        return 0
    except (KeyboardInterrupt, aborted):
        return INTERRUPTED
    except Exception as error:
        format_message = getattr(error, "format_message", None)  # the parser's errors, whichever click typer carries
        if format_message is None:
            raise
        message = " ".join(format_message().split())
        message += "" if message.endswith((".", "?")) else "."
        return _fail(program, f"{message} See {program} --help.", UsageError.exit_code)
    return INTERRUPTED if code == _SHELL_INTERRUPTED else code


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: {visible(message)}", file=sys.stderr)
    return code


def visible(text: str) -> str:
    """Text of a document, a file name or the broker as it may go to a terminal: control characters could steer it."""
    return _CONTROLS.sub("\ufffd", text)
