"""The generated and the recorded blocks of the documentation.

    python -m tests.reference            writes them
    python -m tests.reference --check    says which pages are out of date; exit code 1 then

A *generated* block stands between ``<!-- generated: NAME ARGUMENT... -->`` and ``<!-- end -->``; it is made from the
code: the options of a command, the settings of the worker, the columns of a schema.

A *recorded* block is a ``console`` block in which lines follow a command: what the command printed on standard
output. All commands of a page run in order in one folder, which holds ``model_build`` and ``README.md``. Numbers,
identifiers and host names are not compared.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import typer

from nermill.producer.local.broker import embedded_broker
from nermill.worker.contracts.document import Reason
from nermill.worker.contracts.schema import PART, REJECTS, SHARD
from nermill.worker.process.launch import SETTINGS
from nermill.worker.process.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "producer/README.md",
    "producer/GUIDE.md",
    "producer/entities/README.md",
    "worker/README.md",
    "worker/contracts/README.md",
    "worker/queue/README.md",
    "model_build/README.md",
    "tests/README.md",
    "deploy/README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
)
COMMAND_SECONDS = 120
SHOWN_BROKER = (
    "redis://localhost:6379/0"  # in the place of the embedded server's socket, as paths in that of the folder's
)
GENERATED = re.compile(r"(<!-- generated: (\w+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def generated(text: str) -> str:
    """The page with its generated blocks made anew."""

    def made(match: re.Match[str]) -> str:
        lines = GENERATORS[match[2]](*match[3].split())
        return match[1] + "\n".join(lines) + "\n" + match[4]

    return GENERATED.sub(made, text)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


def options(program: str, name: str, base: str = "") -> list[str]:
    """Arguments and options of a command of ``nermill`` or ``nermill-build``, from its parser.

    Those that the command ``base`` has too are left out.
    """
    rows = []
    known = {parameter.name for parameter in commands(program)[base].params} if base else set()
    for parameter in commands(program)[name].params:
        if parameter.name in known:
            continue
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        names = f"`{' '.join([*parameter.opts, *parameter.secondary_opts])}`"
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        default = parameter.default() if callable(parameter.default) else parameter.default
        default = "" if default in (None, "", False, ()) else f"`{default}`"
        variable = f"`{parameter.envvar}`" if parameter.envvar else ""
        rows.append((names, "required" if parameter.required else default, variable, parameter.help or ""))
    return table(("option", "default", "variable", "meaning"), rows)


def commands(program: str) -> dict[str, Any]:
    """The commands of a program by name."""
    if program == "nermill":
        from nermill.producer.cli import app
    else:
        from nermill.model_build.cli import app
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def settings() -> list[str]:
    """The settings of a worker process, from the fields and the docstring of ``Settings``."""
    told = dict(re.findall(r"^\s+(\w+): (.+)$", Settings.__doc__ or "", re.MULTILINE))
    rows = []
    for name, default in vars(Settings()).items():
        flag = f"`--{name.replace('_', '-').removesuffix('-url')}`" if name in SETTINGS else ""
        shown = default if isinstance(default, str) else f"{default:g}"
        rows.append((f"`NERMILL_{name.upper()}`", flag, f"`{shown}`" if shown else "", told[name]))
    return table(("variable", "flag", "default", "meaning"), rows)


def columns(name: str, *_: str) -> list[str]:
    """Columns of a schema: name, type, whether it may be null."""
    schema: pa.Schema = {"part": PART, "shard": SHARD, "rejects": REJECTS}[name]
    return table(
        ("column", "type", "null?"),
        [(f"`{field.name}`", f"`{kind(field.type)}`", "yes" if field.nullable else "no") for field in schema],
    )


def kind(type_: pa.DataType) -> str:
    """A type as the tables write it: ``list<string>``, ``struct<start int32, ...>``."""
    if pa.types.is_list(type_):
        return f"list<{kind(type_.value_type)}>"
    if pa.types.is_struct(type_):
        return f"struct<{', '.join(f'{field.name} {kind(field.type)}' for field in type_)}>"
    return {"float": "float32"}.get(str(type_), str(type_))


GENERATORS: dict[str, Callable[..., list[str]]] = {"options": options, "settings": settings, "columns": columns}
REASONS: tuple[str, ...] = get_args(Reason)


@dataclass(frozen=True)
class Step:
    """One command of a page.

    Attributes:
        command: A shell command.
        shown: The output that the page shows; None where it shows none.
    """

    command: str
    shown: list[str] | None


def steps(text: str) -> Iterator[Step]:
    """Commands of a page in order; a block of Python is one of them. ``...`` stands for output not recorded yet."""
    for language, block in BLOCK.findall(text):
        yield from [Step(f"python -c {shlex.quote(block)}", None)] if language == "python" else console_steps(block)


def console_steps(block: str) -> Iterator[Step]:
    """Commands of a ``console`` block, one line each, with the lines below them."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *shown = part.rstrip("\n").split("\n")
        yield Step(command, shown or None)


@contextmanager
def stage() -> Iterator[Callable[[str], str]]:
    """A folder and a broker to run a page's commands with; yields a function from a command to its output.

    A command that ends in ``&`` runs until the page's end. A command that ends with another code than 0 raises
    ``AssertionError``; 3 is accepted where the page says so with ``|| [ $? = 3 ]``.
    """
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="nm-") as folder, embedded_broker() as broker:
        for name in ("model_build", "README.md", "tests"):
            (Path(folder) / name).symlink_to(ROOT / name)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "NERMILL_BROKER_URL": broker, "COLUMNS": "100"}

        def run(command: str) -> str:
            if command.endswith("&"):
                words = shlex.split(command.removesuffix("&"))
                running.append(subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.DEVNULL))
                return ""
            done = subprocess.run(
                command,
                shell=True,
                executable="/bin/bash",
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            return done.stdout.replace(f"{folder}/", "").replace(folder, ".").replace(broker, SHOWN_BROKER)

        try:
            yield run
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait(40)


def recorded(text: str, run: Callable[[str], str], skipped: frozenset[str] = frozenset()) -> str:
    """The page with what its commands print now."""

    def made(match: re.Match[str]) -> str:
        lines = []
        if match[1] == "python":
            run(f"python -c {shlex.quote(match[2])}")
            return match[0]
        for step in console_steps(match[2]):
            output = [] if step.command in skipped else run(step.command).rstrip("\n").split("\n")
            lines += [f"$ {step.command}", *([line.rstrip() for line in output] if step.shown else [])]
        return "```console\n" + "\n".join(lines) + "\n```"

    return BLOCK.sub(made, text)


def comparable(text: str) -> str:
    """Text without what differs between two runs of one command: numbers, identifiers, hosts, white space."""
    text = re.sub(r"@[\w.-]+", "@host", re.sub(r"\b[0-9a-f]{12,64}\b", "ID", text))
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "TIME", text)
    return " ".join(re.sub(r"\d[\d,.]*", "0", text).split())


def main() -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description="Generated and recorded blocks of the documentation.")
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--generated", action="store_true", help="leave recorded blocks as they are")
    wanted = parser.parse_args()
    stale = []
    for page in wanted.pages:
        old = (ROOT / page).read_text("utf-8")
        new = generated(old)
        if not wanted.generated and not wanted.check:
            with stage() as run:
                new = recorded(new, run, SKIPPED)
        if new != old:
            stale.append(page)
            if not wanted.check:
                (ROOT / page).write_text(new, "utf-8")
    print("\n".join(stale) or "nothing to change")
    return 1 if wanted.check and stale else 0


SKIPPED = frozenset(["make demo", "make test", "make test-all", "make lint", "make acceptance", "make bench"])

if __name__ == "__main__":
    sys.exit(main())
