from __future__ import annotations

import os
import shlex
import tempfile
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from regraft.cache import cache_folder
from regraft.cli import _options as o
from regraft.cli._sink import emit, err, progress
from regraft.errors import RegraftError, UsageError
from regraft.output import check_writable, write_text
from regraft.report.bench_schema import BenchReport
from regraft.report.speed_schema import SpeedReport

app = typer.Typer(
    help="Measure every method on pairs of bases, beside controls: recovery, retention, time.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

Pairs = Annotated[
    list[str] | None,
    typer.Option("--pairs", metavar="NAME", help="Pairs, or language, diffusion, encoder; repeatable. All by default."),
]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapters", metavar="NAME", help="Of those that the pairs have; repeatable.")
]
Seeds = Annotated[
    list[str] | None,
    typer.Option("--seeds", metavar="N", help="By default, those that the pair is reported with. Tune on 100 and up."),
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="What is trained and measured. By default $REGRAFT_BENCH_CACHE."),
]


@app.callback()
def bench(
    context: typer.Context,
    pairs: Pairs = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="METHOD",
            help="By name, with options where wanted ('effect rank=16 pull=0.5'), refine ('refine start=zero') and "
            "logits ('logits strength=0.85'); repeatable. Every method of port by default.",
        ),
    ] = None,
    adapters: Adapters = None,
    seeds: Seeds = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes, of one thread each.")] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep the cells in the cache, unless their code or content changed."),
    ] = False,
    few_controls: Annotated[
        bool,
        typer.Option(
            "--few-controls", help="Only those that shares are counted from: no best copy, random or empty one."
        ),
    ] = False,
    cache: Cache = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Write the record, as results/bench.json is.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Keep what the --out file says of other pairs, adapters and seeds than those measured now."
        ),
    ] = False,
    report: o.Report = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure every method on pairs of bases, beside controls: recovery, retention, time."""
    if context.invoked_subcommand is not None:
        return
    from regraft.bench.controls import CONTROLS, FEW
    from regraft.bench.results import assemble, kept, load, save
    from regraft.bench.run import known_pairs, run_grid, targets
    from regraft.bench.table import print_table
    from regraft.bench.variants import default_variants, parse_variants

    for file in filter(None, (out, report)):
        check_writable(file, overwrite=True)
    if keep and out is None:
        raise UsageError("--keep needs --out", remedy="Name the record whose other pairs are to be kept.")
    earlier = load(out) if keep and out is not None and out.exists() else None
    folder = _folder(cache)
    wanted = targets(folder, _split(pairs), _split(adapters), _numbers(seeds))
    variants = parse_variants(_split(methods)) if methods else default_variants()
    controls = FEW if few_controls else tuple(CONTROLS)
    with progress("Measuring", quiet=quiet) as tick:
        run_grid(wanted, variants, folder, jobs=jobs, resume=resume, controls=controls, tick=tick)
    given = {"--pairs": pairs, "--methods": methods, "--adapters": adapters, "--seeds": seeds}
    words = [word for name, values in given.items() for value in values or () for word in (name, value)]
    words += ["--few-controls"] * few_controls
    command = shlex.join(["regraft", "bench", *words, "--jobs", str(jobs), "--resume", "--cache", "DIR"])
    command += f" --out {out.name if out.is_absolute() else out}{' --keep' * keep}" if out is not None else ""
    today = datetime.now(timezone.utc).date().isoformat()
    record = assemble(wanted, variants, folder, command=command, date=today, controls=controls)
    lost = record.missing
    if keep:
        nothing = record.model_copy(update={"runs": [], "pairs": [], "groups": []})
        record = kept(record, earlier or nothing, known_pairs(folder))
    if out is not None:
        save(record, out)
    _write_page(record, report)
    emit(record, json=json, quiet=quiet, table=lambda console: print_table(record, console))
    if lost:
        raise RegraftError(
            f"{lost} cells could not be made",
            file=folder / "bench.log",
            remedy="See why; --resume makes what is missing.",
        )


@app.command("make")
def make(pairs: Pairs = None, adapters: Adapters = None, seeds: Seeds = None, cache: Cache = None) -> None:
    """Train or fetch what is missing: bases, adapters, native adapters. Begun again, it goes on where it was."""
    from regraft.bench.run import make as make_missing
    from regraft.bench.run import targets

    o.use_hardware("cpu", "float32", 1)
    folder = _folder(cache)
    wanted = targets(folder, _split(pairs), _split(adapters), _numbers(seeds))
    make_missing(folder, wanted, lambda line: err.print(line, markup=False, soft_wrap=True))


@app.command("speed")
def speed(
    family: Annotated[
        str,
        typer.Option("--family", metavar="NAME", help="sd15, sdxl, ssd1b (from SDXL) or flux, at their true sizes."),
    ] = "sdxl",
    methods: Annotated[
        list[str] | None, typer.Option("--methods", metavar="METHOD", help="By default those that need no models.")
    ] = None,
    curves: Annotated[
        bool, typer.Option("--curves", help="Also how a copy's time and memory grow: modules, width, rank, adapters.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Also what effect and stream take, beside a pass through both models.")
    ] = False,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Of which the median is taken.")] = 1,
    threads: o.Threads = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", help="For the checkpoints, which stay there; else a temporary one."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write the record.")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure seconds and memory at a real family's true size, beside the disk and the plain way."""
    from regraft.bench.speed.curves import curves as measure_curves
    from regraft.bench.speed.making import FAMILIES, geometry
    from regraft.bench.speed.measure import METHODS, measure, running
    from regraft.bench.speed.table import print_speed
    from regraft.bench.variants import parse_variants
    from regraft.hardware import free_processors
    from regraft.methods import get_method

    if family not in FAMILIES:
        raise UsageError(f"--family {family!r} is not known", remedy=f"Known: {', '.join(FAMILIES)}.")
    wanted = _split(methods) or list(METHODS)
    for variant in parse_variants(wanted):
        if get_method(variant.method).runs:
            raise UsageError(
                f"{variant.name} runs both models, which are no more than weights here", remedy="Leave it out."
            )
    if out is not None:
        check_writable(out, overwrite=True)
    threads = threads or free_processors()

    def tell(line: str) -> None:
        if not quiet:
            err.print(line, markup=False, soft_wrap=True)

    flags = {"--curves": curves, "--models": models}
    words = ["regraft", "bench", "speed", "--family", family, *(f"--methods={name}" for name in methods or ())]
    words += [flag for flag, given in flags.items() if given]
    words += ["--runs", str(runs), "--threads", str(threads)]
    command = shlex.join([*words, *(["--out", out.name if out.is_absolute() else str(out)] if out else [])])
    today = datetime.now(timezone.utc).date().isoformat()
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="regraft-speed-")))
        record = measure(
            geometry(family),
            place,
            wanted,
            threads=threads,
            runs=runs,
            command=command,
            date=today,
            tick=tell,
            keep=lambda report: _keep(report, out),
        )
        if models:
            tell("effect and stream")
            record = record.model_copy(update={"running": running(threads=threads)})
            _keep(record, out)
        if curves:
            grown = list(measure_curves(place, method="copy", threads=threads, runs=runs, tick=tell))
            record = record.model_copy(update={"curves": grown})
            _keep(record, out)
    emit(record, json=json, quiet=quiet, table=lambda console: print_speed(record, console))


def _keep(record: SpeedReport, out: Path | None) -> None:
    """Write what is measured so far: what comes after may not get through."""
    if out is not None:
        write_text(record.to_json() + "\n", out, overwrite=True)


@app.command("table")
def table_again(
    file: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="A record that `bench --out` wrote.")],
    markdown: Annotated[
        list[Path] | None,
        typer.Option(
            "--markdown",
            metavar="FILE.md",
            help="Write the page of the benchmark, or, in a file that has the marks for it, the summary; repeatable.",
        ),
    ] = None,
    report: o.Report = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show a record again: as tables here, as Markdown, or as one HTML page."""
    from regraft.bench import logits_table, portable_table, refine_table, table
    from regraft.bench.results import load

    record = load(file)
    forms = (refine_table.WRITTEN, portable_table.WRITTEN, logits_table.WRITTEN, table.WRITTEN)
    written = next(form for form in forms if form.is_of(record))
    for target in markdown or ():
        text = target.read_text(encoding="utf-8") if target.is_file() else ""
        write_text(written(text, record), target, overwrite=True)
    _write_page(record, report)
    emit(record, json=json, quiet=quiet, table=lambda console: table.print_table(record, console))


def _write_page(record: BenchReport, report: Path | None) -> None:
    if report is not None:
        from regraft.report.bench_page import render_bench

        write_text(render_bench(record), report, overwrite=True)


def _folder(cache: Path | None) -> Path:
    given = cache or os.environ.get("REGRAFT_BENCH_CACHE")
    return Path(given).expanduser().absolute() if given else cache_folder() / "bench"


def _split(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _numbers(values: list[str] | None) -> list[int]:
    words = _split(values)
    for word in words:
        if not word.isdecimal():
            raise UsageError(f"--seeds {word!r} is no number", remedy="Give 0, or 0,1,2.")
    return [int(word) for word in words]
