"""``nermill-build``: the model builder's command line; every error is one line and a documented exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from nermill.worker.contracts.console import exit_code
from nermill.worker.contracts.errors import UsageError
from nermill.worker.contracts.manifest import load_manifest, resolve_artifact
from nermill.worker.contracts.processor import has_int8_products, processor_name

BEYOND_TOLERANCE = 4

Artifact = Annotated[str, typer.Argument(help="The artifact's folder, or demo: the bundled model.", show_default=False)]
Device = Annotated[str, typer.Option("--device", envvar="NERMILL_DEVICE", help="cpu, cuda:N or npu:N.")]
Threads = Annotated[
    int, typer.Option("--threads", envvar="NERMILL_THREADS", min=0, help="Compute threads on a CPU; 0 takes all cores.")
]
Json = Annotated[bool, typer.Option("--json", envvar="NERMILL_JSON", help="One JSON object on standard output.")]


def compile_(
    checkpoint: Annotated[
        str, typer.Argument(help="Hugging Face folder, or OWNER/NAME@REVISION of the hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.", show_default=False)],
    backend: Annotated[str, typer.Option("--backend", help="Who runs it: onnx, torch, openvino, aie or om.")] = "onnx",
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="packed rows, plain (input_ids, attention_mask, token_type_ids), or equal (windows of one length, for "
            "CPUs); default: equal for onnx int8 with free shapes, else packed.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="fp32, fp16, bf16 or int8; default: fp32, for aie and om fp16.", show_default=False
        ),
    ] = None,
    shapes: Annotated[str, typer.Option("--shapes", help="auto, or rows x length: 32x64,8x512.")] = "auto",
    index_dtype: Annotated[str, typer.Option("--index-dtype", help="Type of the inputs: int64 or int32.")] = "int64",
    soc: Annotated[str, typer.Option("--soc", help="Ascend chip, for aie and om.")] = "Ascend310P3",
    name: Annotated[str, typer.Option("--name", help="Its name; default: the checkpoint's.", show_default=False)] = "",
    atc: Annotated[
        bool, typer.Option("--atc/--no-atc", help="For om: compile here, or write graph, command and script.")
    ] = True,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="For int8 of onnx and openvino: texts like yours (CoNLL, JSONL or plain lines) to find scales with.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint into an artifact, checked against its golden answers."""
    from nermill.model_build.artifact import Order, compile_artifact

    order = Order(backend, layout, precision, shapes, index_dtype, soc, name, atc, calibrate)  # type: ignore[arg-type]
    manifest = compile_artifact(checkpoint, out, order)
    _built(out, manifest, as_json)
    if backend == "onnx" and manifest.precision == "int8" and calibrate is None:
        _note("it computes a scale for each token; --calibrate FILE with texts like yours makes fixed ones: faster")
    if backend == "openvino" and manifest.precision == "int8":
        if calibrate is None:
            _note("its scales are of the golden texts alone; --calibrate FILE with texts like yours is more exact")
        if not has_int8_products():
            _note(f"this CPU ({processor_name()}) has no VNNI: let bench say whether --backend onnx is faster here")
    if manifest.details.get("pending"):
        _note(f"run {out}/convert.sh on a machine with CANN, then nermill-build adopt {out} {out}/model.om")


def adopt(
    artifact: Artifact,
    model: Annotated[Path, typer.Argument(help="The file that atc or convert.sh made.", show_default=False)],
    device: Annotated[str, typer.Option("--device", envvar="NERMILL_DEVICE", help="npu:N to try it on.")] = "npu:0",
    as_json: Json = False,
) -> None:
    """Complete an artifact of compile --no-atc with the offline model that was made of its graph."""
    from nermill.model_build.adopt import adopt as complete

    folder = resolve_artifact(artifact)
    _built(folder, complete(folder, model, device), as_json)


def accept(
    checkpoint: Annotated[
        str, typer.Argument(help="Hugging Face folder, or OWNER/NAME@REVISION of the hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.json and report.html.", show_default=False)],
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Try a device with all that a worker needs of it, and write one report. Exit code 4 if a step fails."""
    from nermill.model_build.accept import Step, write_report
    from nermill.model_build.accept import accept as try_device
    from nermill.model_build.artifact import folder_at_once
    from nermill.model_build.checkpoint import open_checkpoint

    def told(step: Step) -> None:
        print(f"{step.state:<8} {step.name}: {step.detail} ({step.seconds:.1f} s)", file=sys.stderr, flush=True)

    open_checkpoint(checkpoint)  # what is wrong with it is said once, before anything is tried
    with folder_at_once(out) as folder:
        report = try_device(checkpoint, device, told)
        write_report(report, folder)
    _answer({"report": str(out), **report}, as_json, [f"{out}: {'passed' if report['passed'] else 'FAILED'}"])
    if not report["passed"]:
        raise typer.Exit(BEYOND_TOLERANCE)


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Hugging Face folder, or OWNER/NAME@REVISION of the hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="File to make; must not exist.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="torchscript or onnx.")] = "onnx",
    layout: Annotated[
        str, typer.Option("--layout", help="packed rows, or plain: input_ids, attention_mask, token_type_ids.")
    ] = "packed",
    shapes: Annotated[
        str, typer.Option("--shapes", help="auto: free; or rows x length: one is fixed, several are checked.")
    ] = "auto",
    index_dtype: Annotated[str, typer.Option("--index-dtype", help="Type of the inputs: int64 or int32.")] = "int64",
    as_json: Json = False,
) -> None:
    """Write the graph alone, checked against the eager checkpoint, for a tool chain of your own."""
    from nermill.model_build.artifact import Order
    from nermill.model_build.graph import export_graph

    order = Order("onnx", layout, "fp32", shapes, index_dtype)  # type: ignore[arg-type]
    body = export_graph(checkpoint, out, form, order)  # type: ignore[arg-type]
    inputs = ", ".join(f"{entry['name']} {entry['dtype']}" for entry in body["inputs"])
    lines = [
        f"{out}: {form} {layout}, {body['bytes'] / 1e6:.1f} MB, at most {body['difference']:.2g} from the checkpoint",
        f"inputs       {inputs}, in this order, each (rows, length)",
        f"output       logits float32 (rows, length, {len(body['output']['labels'])})",
        f"masked       {body['masked']:g}",
    ]
    _answer(body, as_json, lines)


def verify(
    artifact: Artifact,
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Further texts: CoNLL, JSONL or plain lines.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="The checkpoint it came from, run eagerly.", show_default=False)
    ] = None,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Compare an artifact with its checkpoint: logits, tags, padding, packing. Exit code 4 beyond tolerance."""
    from nermill.model_build.corpus import read_texts
    from nermill.model_build.verify import report
    from nermill.model_build.verify import verify as check

    folder = resolve_artifact(artifact)
    texts = read_texts(inputs or [])
    checks = check(folder, checkpoint=checkpoint, texts=texts, device=device, threads=threads)
    rows = [
        (c.name, f"{c.value:.3g}", "" if c.limit is None else f"{c.limit:.3g}", "ok" if c.passed else "FAILED", c.note)
        for c in checks
    ]
    body = report(folder, checks)
    _answer(body, as_json, _table(("check", "value", "limit", "", ""), rows))
    if not body["passed"]:
        raise typer.Exit(BEYOND_TOLERANCE)


def bench(
    artifact: Artifact,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts like yours (default: the sample), to compare ways of filling rows on.", show_default=False
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Measure every shape of an artifact, beside the machine's own matrix product; compare ways to fill the rows."""
    from nermill.model_build.advice import lines_of_ways
    from nermill.model_build.bench import bench as measure
    from nermill.model_build.corpus import read_texts

    texts = read_texts(inputs or [])
    body = measure(resolve_artifact(artifact), device, threads, texts=texts)
    rows = [
        (f"{s['rows']}x{s['length']}", "refused", s["refused"], "", "", "")
        if "refused" in s
        else (
            f"{s['rows']}x{s['length']}",
            f"{s['seconds'] * 1e3:.1f}",
            f"{s['documents_per_second']:,.0f}",
            f"{s['tokens_per_second']:,.0f}",
            f"{s['gflops']:,.1f}",
            "" if s["peak_share"] is None else f"{s['peak_share']:.0%}",
        )
        for s in body["shapes"]
    ]
    peak = f"largest product alone: {body['peak_gflops'] or 'unknown'} GFLOP/s"
    table = _table(("shape", "ms", "documents/s", "tokens/s", "GFLOP/s", "of peak"), rows)
    told = f"{body['documents']:,} documents by these times of {body['layout']} rows:"
    _answer(body, as_json, [peak, *table, *([told] if body["ways"] else []), *lines_of_ways(body["ways"], "computed")])


def shapes(
    inputs: Annotated[list[str], typer.Argument(help="The corpus: CoNLL, JSONL or plain lines.", show_default=False)],
    max_shapes: Annotated[int, typer.Option("--max-shapes", min=1, max=100, help="Shapes to compile at most.")] = 2,
    costs: Annotated[
        str, typer.Option("--costs", help="Table by name, or a file of bench --json.")
    ] = "310p3-bert-large",
    model: Annotated[str, typer.Option("--model", help="Artifact whose tokenizer counts.")] = "demo",
    target: Annotated[
        float | None, typer.Option("--target", help="Documents/s to serve: how many devices?", show_default=False)
    ] = None,
    unit: Annotated[str, typer.Option("--unit", help="A document of CoNLL: sentence or document.")] = "sentence",
    as_json: Json = False,
) -> None:
    """Which shapes to compile for a corpus, and what padded, bucketed and packed rows of them will give."""
    from nermill.model_build.advice import advise

    body, lines = advise(inputs, max_shapes, costs, resolve_artifact(model), target, unit)
    _answer(body, as_json, lines)


def inspect(artifact: Artifact, as_json: Json = False) -> None:
    """Show what an artifact swears to, its hashes checked."""
    folder = resolve_artifact(artifact)
    manifest = load_manifest(folder)
    shapes = ", ".join(f"{rows}x{length}" for rows, length in manifest.shapes) or "free"
    rows = [
        ("name", manifest.name),
        ("sha256", manifest.sha256),
        ("kind", _kind(manifest)),
        ("inputs", ", ".join(f"{entry.name} {entry.dtype}" for entry in manifest.inputs)),
        ("shapes", shapes if manifest.shapes else f"{shapes}, {manifest.token_budget} tokens a batch"),
        ("length", f"{manifest.max_length} tokens, {'lowercased' if manifest.lowercase else 'cased'}"),
        ("labels", f"{', '.join(manifest.labels)} ({manifest.scheme})"),
        ("source", f"{manifest.source['name']} @ {manifest.source['revision']}"),
        ("built with", ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())),
        ("tolerance", f"{manifest.tolerance:g}"),
        *(("file", f"{name} {digest[:16]}…") for name, digest in manifest.files.items()),
    ]
    body = {"artifact": str(folder), "bytes": _size(folder), **asdict(manifest)}
    _answer(body, as_json, [f"{name:<11} {value}" for name, value in rows])


def _built(out: Path, manifest: Any, as_json: bool) -> None:
    details = manifest.details
    body = {"artifact": str(out), "sha256": manifest.sha256, "bytes": _size(out), "files": manifest.files}
    lines = [f"{out}: {manifest.name}, {_kind(manifest)}, {_size(out) / 1e6:.1f} MB"]
    if "atc" in details:
        lines.append(f"atc          {details['atc']['log']} ({details['atc']['seconds']:g} s; {out / 'atc.log'})")
    if "calibration" in details:
        body |= {"calibration": details["calibration"]}
        lines.append(
            f"calibrated   with {details['calibration']['windows']} windows of {details['calibration']['texts']}"
        )
    if "command" in details:
        body |= {key: details.get(key) for key in ("command", "cann", "tried", "notes")}
        lines.append(f"command      {details['command']}")
    _answer(body, as_json, lines)
    for note in details.get("notes", ()):
        _note(note)


def _note(text: str) -> None:
    print(f"nermill-build: {text}", file=sys.stderr)


def _kind(manifest: Any) -> str:
    return f"{manifest.backend} {manifest.precision} {manifest.layout}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def _answer(body: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    print(json.dumps(body, ensure_ascii=False) if as_json else "\n".join(lines), flush=True)


app = typer.Typer(
    name="nermill-build",
    help="From a checkpoint to a compiled model that can be trusted.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command, name, example in (
    (compile_, "compile", "nermill-build compile ./bert-large-NER --out ner-int8 --backend onnx --precision int8"),
    (verify, "verify", "nermill-build verify ner-int8 valid.txt --checkpoint ./bert-large-NER"),
    (bench, "bench", "nermill-build bench ner-int8 --json > costs.json"),
    (shapes, "shapes", "nermill-build shapes valid.txt --max-shapes 2 --costs 310p3-bert-large --target 5000"),
    (inspect, "inspect", "nermill-build inspect demo"),
    (accept, "accept", "nermill-build accept ./bert-large-NER --device npu:0 --out report"),
    (export, "export", "nermill-build export ./bert-large-NER --format onnx --layout plain --out bert.onnx"),
    (adopt, "adopt", "nermill-build adopt ner-om ner-om/model.om"),
):
    app.command(name, epilog=f"Example: {example}")(command)


def main() -> None:
    """Entry point of ``nermill-build``."""
    sys.exit(exit_code("nermill-build", _command, typer.Abort))


def _command() -> int | None:
    try:
        code: int | None = app(sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="nermill-build")
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; pip install 'nermill[build]'") from None
    return code


if __name__ == "__main__":
    main()
