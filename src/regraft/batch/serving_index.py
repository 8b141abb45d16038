"""``serving.json``: which adapters a server of the new base can load, by which names, and how it is started."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence

from regraft.batch.places import is_url
from regraft.batch.serving import ServedModel, least_rank
from regraft.report.batch_schema import BatchPair, BatchReport, BatchRow
from regraft.report.schema import BaseSummary
from regraft.report.serving_schema import (
    Blocker,
    LoadRequest,
    LoraxParameters,
    ServedAdapter,
    ServedBase,
    Server,
    ServingReport,
    UnservedAdapter,
)

_SERVERS: tuple[Server, ...] = ("vllm", "sglang", "lorax", "tgi")
# A refusal against a forecast of so much is one of the file, not of the weights: a port of a port, another base's.
_ENOUGH = 0.5
_ON = {
    "refine": "`regraft refine` teaches the new base what the old one does with it.",
    "bridge": "Keep it on servers of the old base, or train it anew.",
}


def serving_index(record: BatchReport, root: str) -> ServingReport:
    """The index of a batch whose rows were `regraft.batch.serving.serving_rows`; it tells no time and no order.

    Args:
        record: of the batch.
        root: the output folder as the servers find it.
    """
    targets = sorted({row.target for row in record.rows})
    bases = [
        _base(target, [row for row in record.rows if row.target == target], record.pairs, root) for target in targets
    ]
    return ServingReport(regraft_version=record.regraft_version, root=root, bases=bases)


def _base(target: str, rows: Sequence[BatchRow], pairs: Sequence[BatchPair], root: str) -> ServedBase:
    new = next((pair.new for pair in pairs if pair.target == target and pair.new is not None), None)
    olds = {pair.source: pair.old for pair in pairs if pair.target == target and pair.old is not None}
    adapters = sorted((one for row in rows for one in _adapters(row, olds, root)), key=lambda one: one.name)
    lost = [_lost(row) for row in rows if row.status != "ported"]
    loaded = {server: [one for one in adapters if server in one.served_by and one.load] for server in _SERVERS}
    rank = least_rank([one.rank for one in loaded["vllm"] if one.rank])
    model = ServedModel.of(target)
    vllm, sglang, tgi = _vllm(model, loaded["vllm"], rank), _sglang(model, loaded["sglang"]), _tgi(loaded["tgi"])
    if not model.whole:
        vllm = sglang = tgi = None
    lines = {
        "vllm": vllm and shlex.join(["vllm", *vllm]),
        "sglang": sglang and shlex.join(["python", "-m", "sglang.launch_server", *sglang]),
        "tgi": tgi
        and f"LORA_ADAPTERS={shlex.quote(tgi)} "
        + shlex.join(["text-generation-launcher", "--model-id", model.name, *_revision(model)]),
    }
    return ServedBase(
        path=target,
        fingerprint=None if new is None else new.fingerprint,
        family=None if new is None else new.family,
        max_lora_rank=rank,
        adapters=adapters,
        not_served=sorted(lost, key=lambda one: one.adapter),
        vllm=vllm,
        sglang=sglang,
        tgi=tgi,
        lines={server: line for server, line in lines.items() if line},
    )


def _adapters(row: BatchRow, olds: Mapping[str, BaseSummary], root: str) -> list[ServedAdapter]:
    found = []
    for folder, content, facts in zip(row.outputs, row.output_hashes, row.serving, strict=False):
        if row.verdict == "refused":
            forced = Blocker(servers=list(_SERVERS), reason="ported against a refusal (--force)")
            facts = facts.model_copy(update={"blockers": [*facts.blockers, forced]})
        blocked = {server for blocker in facts.blockers for server in blocker.servers}
        servers = [server for server in _SERVERS if server not in blocked]
        place = f"{root}/{folder}"
        local = not is_url(root)
        source = "local" if local else "s3" if root.startswith("s3://") else None
        found.append(
            ServedAdapter(
                **facts.model_dump(),
                name=folder,
                folder=folder,
                adapter=row.name,
                source=olds[row.source].fingerprint,
                verdict=row.verdict,
                forecast=row.forecast,
                reason=row.reason,
                method=row.method,
                hash=content,
                served_by=servers,
                load=LoadRequest(lora_name=folder, lora_path=place) if local else None,
                lorax=LoraxParameters(adapter_id=place, adapter_source=source) if source else None,
            )
        )
    return found


def _lost(row: BatchRow) -> UnservedAdapter:
    status = "refused" if row.status == "refused" else "failed"
    on = _ON.get(row.tier or "refine", "") if status == "refused" else ""
    if on and row.forecast is not None and row.forecast.recovery > _ENOUGH:
        on = "The weights would allow it: do what the reason says."
    return UnservedAdapter(
        adapter=row.name,
        status=status,
        tier=row.tier,
        reason=row.reason,
        next=on or row.remedy or "The reason says it.",
    )


def _revision(model: ServedModel) -> list[str]:
    return ["--revision", model.revision] if model.revision else []


def _vllm(base: ServedModel, adapters: Sequence[ServedAdapter], rank: int | None) -> list[str] | None:
    if not adapters:
        return None
    # As JSON: in the form name=path it takes neither a comma nor a second =.
    told = [
        {"name": one.name, "path": one.load.lora_path, "base_model_name": base.name} for one in adapters if one.load
    ]
    modules = [json.dumps(one) for one in told]
    return [
        "serve",
        base.name,
        *_revision(base),
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
        "--lora-modules",
        *modules,
    ]


def _sglang(base: ServedModel, adapters: Sequence[ServedAdapter]) -> list[str] | None:
    if not adapters:
        return None
    paths = [f"{one.name}={one.load.lora_path}" for one in adapters if one.load]
    return ["--model-path", base.name, *_revision(base), "--enable-lora", "--lora-paths", *paths]


def _tgi(adapters: Sequence[ServedAdapter]) -> str | None:
    # Commas, = and @ divide its list, and there is no way to write them.
    paths = [one.load.lora_path for one in adapters if one.load]
    if not paths or any(re.search("[,=@]", path) for path in paths):
        return None
    return ",".join(f"{one.name}={one.load.lora_path}" for one in adapters if one.load)
