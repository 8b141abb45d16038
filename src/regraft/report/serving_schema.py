"""The index of a library that was ported for servers: ``serving.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.report.schema import Forecast, Record, Verdict, VersionedRecord

Server = Literal["vllm", "sglang", "lorax", "tgi"]


class Blocker(Record):
    """Why some servers can't serve an adapter, or would serve another one than was ported."""

    servers: list[Server]
    reason: str


class ServingFacts(Record):
    """What a server needs to know of one PEFT folder, found when it was written."""

    kind: str = Field(description="kinds of its updates, as `inspect` names them, joined by `+`")
    rank: int | None = Field(description="the one rank of all of its modules; null where it has none")
    target_modules: list[str] = Field(description="last parts of the modules' names")
    blockers: list[Blocker] = Field(default_factory=list)


class LoadRequest(Record):
    """Body of a request to a running vLLM (`/v1/load_lora_adapter`) or SGLang (`/load_lora_adapter`)."""

    lora_name: str
    lora_path: str


class LoraxParameters(Record):
    """What a request to LoRAX has among its `parameters`."""

    adapter_id: str
    adapter_source: Literal["local", "s3"]


class ServedAdapter(ServingFacts):
    """One ported adapter."""

    name: str = Field(description="that requests ask for; of letters, digits, `.`, `_` and `-`, unique in the index")
    folder: str = Field(description="PEFT folder beside the index")
    adapter: str = Field(description="its name in the library")
    source: str = Field(alias="from", description="fingerprint of the old base")
    verdict: Verdict | None = None
    forecast: Forecast | None = None
    reason: str = Field(default="", description="what the verdict rests on")
    method: str | None = None
    hash: str = Field(description="of the folder's bytes")
    served_by: list[Server] = Field(description="servers that nothing blocks")
    load: LoadRequest | None = Field(default=None, description="null where its path is none of a disk")
    lorax: LoraxParameters | None = None


class UnservedAdapter(Record):
    """One that was not ported."""

    adapter: str = Field(description="its name in the library")
    status: Literal["refused", "failed"]
    tier: Literal["port", "refine", "bridge"] | None = Field(default=None, description="the advised one")
    reason: str
    next: str = Field(description="what can be done")


class ServedBase(Record):
    """A new base with the adapters that were ported to it, and how servers of it are started.

    A server's line holds the adapters that nothing blocks on it, and is null where there are none.
    """

    path: str = Field(description="as it was given")
    fingerprint: str | None
    family: str | None
    max_lora_rank: int | None = Field(description="the least `--max-lora-rank` of vLLM that takes them all")
    adapters: list[ServedAdapter]
    not_served: list[UnservedAdapter]
    vllm: list[str] | None = Field(description="arguments of `vllm`")
    sglang: list[str] | None = Field(description="arguments of `python -m sglang.launch_server`")
    tgi: str | None = Field(description="value of the environment variable `LORA_ADAPTERS`")
    lines: dict[str, str] = Field(description="the same, by server, quoted for a shell")


class ServingReport(VersionedRecord):
    """``serving.json`` of ``regraft batch --serve``; the same library gives the same bytes."""

    root: str = Field(description="the folder of the adapters, as the servers find it")
    bases: list[ServedBase]
