from __future__ import annotations

from typing import Annotated

import typer

from regraft.cli import _options as o
from regraft.cli._sink import emit, err, progress
from regraft.errors import RegraftError, UsageError


def batch(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[check] LORAS…",
            help="Folders, globs, manifests (csv, jsonl, parquet), files or URLs (s3://…). With the word check before "
            "them, all are forecast and nothing is ported.",
        ),
    ],
    old: Annotated[
        str | None, typer.Option("--from", metavar="OLD", help="The base that they were trained on; or a column.")
    ] = None,
    new: Annotated[
        str | None, typer.Option("--to", metavar="NEW", help="The base that they are to run on; or a column.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FOLDER", help="For outputs and tables: a folder or a URL.")
    ] = None,
    migration: Annotated[
        str | None,
        typer.Option(
            "--migration", metavar="M", help="A saved one of the pair, in place of fitting: a file or hub id."
        ),
    ] = None,
    method: o.MethodOption = "auto",
    subspace_rank: o.SubspaceRank = None,
    energy: o.Energy = None,
    threshold: o.Threshold = None,
    edge: o.Edge = None,
    pull: o.Pull = None,
    ridge: o.Ridge = None,
    n_inputs: o.NInputs = None,
    seed: o.Seed = 0,
    run_models: Annotated[
        bool,
        typer.Option("--run-models", help="auto: under drift, run both bases for each adapter, as `port` does."),
    ] = False,
    strength: Annotated[float, typer.Option("--strength", help="Factor on each whole update.")] = 1.0,
    block_strength: o.BlockStrength = None,
    rank: Annotated[str | None, typer.Option("--rank", metavar="N|SHARE|keep|full", help="Of the outputs.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="Of the outputs; by default each input's.")] = None,
    save_dtype: Annotated[str | None, typer.Option("--save-dtype", help="Of the outputs' tensors.")] = None,
    strip_private: Annotated[bool, typer.Option("--strip-private", help="As `port` does.")] = False,
    removed: o.Removed = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    components: o.Components = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Leave the unknown behind.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Port against refusals; recorded in the files.")] = False,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Of language models: PEFT folders for vLLM, SGLang, LoRAX and TGI, and an index."),
    ] = False,
    serve_from: Annotated[
        str | None, typer.Option("--serve-from", metavar="FOLDER", help="Where the servers find --out, if elsewhere.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Processes, of one thread each; by default the free processors.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="auto|local|ADDRESS", help="Run on a Ray cluster: this machine's, or another."),
    ] = None,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="How often a row is begun again whose worker died.")
    ] = 2,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout", metavar="10m", help="Most time for a row (seconds, 10m, 2h); then as if its worker had died."
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take an output folder that holds other things.")
    ] = False,
) -> None:
    """Whole libraries: port or check every adapter, with each pair of bases fitted once. Begun again, it goes on."""
    from regraft.batch import expand, run_batch
    from regraft.batch.local import LocalExecutor
    from regraft.batch.options import parse_options
    from regraft.batch.places import is_url, path_of
    from regraft.batch.run import Executor
    from regraft.batch.serving import serving_rows
    from regraft.report.batch_table import batch_table

    check, named = sources[0] == "check", sources[sources[0] == "check" :]
    if not named:
        raise UsageError("no adapters are named", remedy="Give a folder; one that is called check is ./check.")
    longest = o.seconds(timeout, "--timeout")
    if out is None and not check:
        reached = " that every machine of the cluster reaches" if ray is not None else ""
        remedy = f"Name a folder or URL{reached} for the ported adapters: --out s3://bucket/ported."
        raise UsageError("--out is missing", remedy=remedy)
    if check and (serve or serve_from):
        raise UsageError("batch check ports nothing that could be served", remedy="Leave --serve out.")
    place = out if out is None or is_url(out) else str(path_of(out).absolute())
    given = {
        **{"migration": migration, "method": method, "subspace_rank": subspace_rank, "energy": energy},
        **{"threshold": threshold, "edge": edge, "pull": pull, "ridge": ridge, "n_inputs": n_inputs, "seed": seed},
        **{"weights_only": not run_models, "strength": strength, "block_strength": block_strength, "rank": rank},
        **{"format": format, "save_dtype": save_dtype, "strip_private": strip_private, "removed": removed},
        **{name: ",".join(globs) for name, globs in _lists(include, exclude, components).items()},
        **{"allow_partial": allow_partial, "force": force},
    }
    rows = expand(named, old, new, parse_options(given), without=place)
    rows = serving_rows(rows) if serve or serve_from else rows
    workers = jobs or o.free_processors()
    # For the fits, which the driver makes.
    o.use_hardware("cpu", "float32", None)
    executor: Executor | None = None
    if ray is not None:
        from regraft.batch.on_ray import connect

        executor = connect(ray, workers, retries, longest)
        if executor is None and not quiet:
            err.print("Ray is not installed: the processors of this machine do it.", markup=False, soft_wrap=True)
    executor = executor or LocalExecutor(workers, retries, longest)
    with progress("Checking" if check else "Porting", quiet=quiet) as tick:
        record = run_batch(
            rows, executor, out=place, check=check, overwrite=overwrite, serve_from=serve_from, tick=tick
        )
    emit(record, json=json, quiet=quiet, table=lambda console: batch_table(record, console))
    if place is not None and not any(table.endswith(".parquet") for table in record.tables) and not quiet:
        err.print("No parquet table without pyarrow: pip install 'regraft[batch]'.", markup=False, soft_wrap=True)
    if record.counts.failed:
        where = record.tables[0] if record.tables else None
        remedy = "The table says why; the same command again tries these once more."
        raise RegraftError(f"{record.counts.failed} of {record.counts.rows} adapters failed", file=where, remedy=remedy)


def _lists(include: list[str] | None, exclude: list[str] | None, components: list[str] | None) -> dict[str, list[str]]:
    return {"include": include or [], "exclude": exclude or [], "components": components or []}
