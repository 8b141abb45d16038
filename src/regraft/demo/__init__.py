"""The main job on the tiny bases that ship with the package: inspect, check, port, verify, and a page of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.base import open_base
from regraft.carry import Settings
from regraft.check import check, check_migration
from regraft.demo.refining import FAR, cost, refine_far
from regraft.demo.style import style_share
from regraft.errors import InputError
from regraft.formats import load_adapter
from regraft.inspection import inspect_adapter
from regraft.memory import peak_mb
from regraft.methods.task import Running
from regraft.port import apply_migration, fit_for
from regraft.probes.pictures import Images, draw, png
from regraft.report.demo_schema import DemoReport, FarUpgrade, LabelledCheck, NearUpgrade
from regraft.report.schema import InspectReport, Picture, VerifyReport
from regraft.runtime.libraries import library, quiet_libraries
from regraft.updates import LowRank
from regraft.verify import verify

#: Called with (steps done, steps in all, what is at work now).
Ticker = Callable[[int, int, str], None]

STYLE = "style-v1"

INTRO = (
    "v1 is a tiny text-to-image model, and the LoRA was trained on it: it draws in pale ink on dark blue paper. v2 is "
    "v1 trained on; v2-retrained has v2's shapes, trained from scratch; v3 has another width and depth. Along a row, "
    "every picture starts from the same prompt and the same noise. The style share below a column is measured from the "
    "pixels: how much of the pictures lies on the style's palette."
)


@dataclass(frozen=True)
class Column:
    """One column of the contact sheet: a base, and what is loaded on it."""

    group: str
    title: str
    base: str
    lora: Path | None
    note: str = ""


def data_folder() -> Path:
    """Where the demo's models lie.

    Raises:
        InputError: this installation came without them.
    """
    folder = Path(str(files("regraft.demo").joinpath("data")))
    if not (folder / "demo.json").is_file():
        raise InputError("the demo's models are missing", file=folder, remedy="Install regraft again.")
    return folder


def run_demo(out: Path, tick: Ticker | None = None, *, refine: bool = False) -> DemoReport:
    """Run the main job on the embedded bases and write the ported LoRA to ``out`` (an existing folder).

    Args:
        out: where to write.
        tick: told of each step.
        refine: also distil the LoRA into the bases that a port is refused for.

    Raises:
        RegraftError: the libraries of the ``run`` extra are missing, or the models are.
    """
    library("diffusers")
    with quiet_libraries():
        return _run(out, tick, refine)


def _run(out: Path, tick: Ticker | None, refine: bool) -> DemoReport:
    started = perf_counter()
    data = data_folder()
    facts: dict[str, Any] = json.loads((data / "demo.json").read_text(encoding="utf-8"))
    adapter = load_adapter(data / "loras" / f"{STYLE}.safetensors")
    ported_file = out / f"{STYLE}-for-v2.safetensors"
    columns = _columns(data, ported_file)
    # A refine is a step of its own, and so are the pictures of what it made.
    steps = _Steps(tick, total=6 + len(columns) + 2 * len(FAR) * refine)

    steps("inspect the LoRA")
    inspected = inspect_adapter(adapter.path or data)
    steps("check v1 → v2")
    v1, v2 = open_base(data / "v1"), open_base(data / "v2")
    settings = Settings(running=Running(prompts=_other_prompts(facts)))
    migration = fit_for(adapter, v1, v2, running=settings.running)
    checked = check_migration(adapter, migration)
    steps("port v1 → v2")
    result = apply_migration(adapter, migration, settings, old=v1, new=v2, started=started)
    written = result.save(ported_file, overwrite=True)
    port_report = result.report.model_copy(update={"outputs": [str(file) for file in written]})
    steps("verify v1 → v2")
    measured = verify(adapter, load_adapter(ported_file), v1.path, v2.path)

    refusals = []
    for name, label in (("v2-retrained", "v1 → v2-retrained"), ("v3", "v1 → v3")):
        steps(f"check {label}")
        refusals.append(LabelledCheck(label=label, check=check(adapter, v1, open_base(data / name))))

    refined = []
    for far in FAR if refine else ():
        steps(f"refine v1 → {far.base}")
        file = out / f"{STYLE}-refined-for-{far.base}.safetensors"
        asked = _other_prompts(facts), facts["report"]["guidance"]
        refined.append(refine_far(far, adapter, v1, data / far.base, file, *asked, steps.say))

    pictures, loaded = [], _Pipelines(data, facts)
    for column in _with_refined(columns, refined):
        steps(f"pictures of {column.group}, {column.title}")
        pictures.append(loaded.pictures(column))
    same = _same(pictures)
    return DemoReport(
        regraft_version=__version__,
        title="A LoRA, and four versions of its base",
        intro=f"{INTRO} {_about(inspected)}",
        inspect=inspected,
        near=NearUpgrade(check=checked, port=port_report, verify=measured),
        refusals=refusals,
        refined=refined,
        prompts=list(facts["report"]["prompts"]),
        columns=pictures,
        same_columns=same,
        same_reason=_same_reason(adapter, load_adapter(ported_file), port_report.method_reason) if same else "",
        notes=_notes(pictures, refusals, refined, measured),
        seconds=perf_counter() - started,
        peak_mb=peak_mb(),
    )


def _other_prompts(facts: dict[str, Any]) -> tuple[str, ...]:
    """Prompts in the words that the bases know; none of those that are drawn."""
    concepts, grounds, drawn = facts["concepts"], facts["backgrounds"], facts["report"]["prompts"]
    prompts = [
        f"{concepts[i]} on {grounds[(i + shift) % len(grounds)]}" for shift in (0, 2) for i in range(len(concepts))
    ]
    return tuple(prompt for prompt in prompts if prompt not in drawn)


def _about(lora: InspectReport) -> str:
    modules = sum(component.modules for component in lora.components.values())
    ranks = ", ".join(str(rank) for component in lora.components.values() for rank in component.ranks)
    return f"The LoRA is a {lora.format} file: {modules} modules of the {', '.join(lora.components)}, rank {ranks}."


def _columns(data: Path, ported: Path) -> list[Column]:
    style, loras = data / "loras" / f"{STYLE}.safetensors", data / "loras"
    return [
        Column("v1, the old base", "v1", "v1", None),
        Column("v1, the old base", "v1 + LoRA", "v1", style, "what the LoRA was trained to do"),
        Column("v2, trained on from v1", "v2", "v2", None),
        Column("v2, trained on from v1", "v2 + copied", "v2", style, "the same file, loaded as it is"),
        Column("v2, trained on from v1", "v2 + ported", "v2", ported, "what regraft wrote"),
        Column("v2, trained on from v1", "v2 + native", "v2", loras / "style-v2.safetensors", "trained anew on v2"),
        Column("v2-retrained, from scratch", "v2-retrained", "v2-retrained", None),
        Column("v2-retrained, from scratch", "v2-retrained + copied", "v2-retrained", style, "loads without an error"),
        Column("v3, another shape", "v3", "v3", None, "the LoRA's tensors do not fit"),
    ]


def _with_refined(columns: Sequence[Column], refined: Sequence[FarUpgrade]) -> list[Column]:
    """The columns, and behind each base's own what was refined for it."""
    found = list(columns)
    for far in refined:
        if far.refine is not None:
            base = far.title.removesuffix(" + refined")
            last = max(i for i, column in enumerate(found) if column.base == base)
            found.insert(last + 1, Column(found[last].group, far.title, base, Path(far.refine.outputs[0]), cost(far)))
    return found


class _Steps:
    def __init__(self, tick: Ticker | None, total: int) -> None:
        self.tick, self.done, self.total = tick, 0, total

    def __call__(self, what: str) -> None:
        if self.tick is not None:
            self.tick(self.done, self.total, what)
        self.done += 1

    def say(self, what: str) -> None:
        """What is at work within the step."""
        if self.tick is not None:
            self.tick(self.done, self.total, what)


class _Pipelines:
    """One pipeline in memory at a time: neighbouring columns share their base."""

    def __init__(self, data: Path, facts: dict[str, Any]) -> None:
        self.data, self.facts = data, facts
        self.name = ""
        self.pipeline: Any = None

    def pictures(self, column: Column) -> Picture:
        images = self._run(column)
        return Picture(
            title=column.title,
            group=column.group,
            png=[png(image) for image in images],
            note=column.note,
            figures={"style_share": round(float(style_share(images).mean()), 3)},
        )

    def _run(self, column: Column) -> Images:
        diffusers = library("diffusers")
        diffusers.utils.logging.disable_progress_bar()
        if self.name != column.base:
            self.pipeline = None
            self.pipeline = diffusers.DiffusionPipeline.from_pretrained(
                self.data / column.base, local_files_only=True, torch_dtype=torch.float32
            )
            self.pipeline.set_progress_bar_config(disable=True)
            self.name = column.base
        pipeline = self.pipeline
        pipeline.unload_lora_weights()
        if column.lora is not None:
            pipeline.load_lora_weights(str(column.lora))
        fixed = self.facts["report"]
        return draw(
            pipeline,
            fixed["prompts"],
            fixed["seeds"],
            steps=fixed["steps"],
            guidance_scale=fixed["guidance"],
            height=self.facts["size"],
            width=self.facts["size"],
        )


def _same(pictures: list[Picture]) -> list[tuple[str, str]]:
    """Pairs of neighbouring columns whose pictures are the same to the last bit."""
    # A refine that gained nothing says so itself.
    pairs = [(left, right) for left, right in pairwise(pictures) if not right.title.endswith("+ refined")]
    return [(left.title, right.title) for left, right in pairs if left.png == right.png]


def _same_reason(adapter: Adapter, ported: Adapter, reason: str) -> str:
    equal = all(
        torch.equal(update.up.load(), other.up.load()) and torch.equal(update.down.load(), other.down.load())
        for update, other in zip(adapter.updates.values(), ported.updates.values(), strict=True)
        if isinstance(update, LowRank) and isinstance(other, LowRank)
    )
    return f"`auto` chose a copy: {reason}. The ported tensors are the original's." if equal else reason


def _notes(
    pictures: list[Picture], refusals: list[LabelledCheck], refined: list[FarUpgrade], measured: VerifyReport
) -> list[str]:
    share = {picture.title: picture.figures["style_share"] for picture in pictures}
    lost, kept = share["v2-retrained + copied"], share["v1 + LoRA"]
    notes = [
        f"On v2-retrained the copied file loads without an error, and the style share is {lost:.2f} where it is "
        f"{kept:.2f} on v1: `regraft check` says so before anything is written."
    ]
    cosine = measured.effect_cosine.mean
    if cosine is not None:
        notes.append(
            "The style share looks at colours alone, not at whether a picture still shows what was asked for. The "
            f"effect of the ported LoRA on v2 has a cosine of {cosine:.2f} with that of the original on v1."
        )
    refused = [refusal.label for refusal in refusals if refusal.check.verdict == "refused"]
    if refused:
        notes.append(f"Refused, without an output file: {', '.join(refused)}.")
    for far in refined:
        base = far.title.removesuffix(" + refined")
        if far.refine is None:
            notes.append(f"No refine for {base} yet: {far.reason}.")
        else:
            notes.append(f"Refined for {base}, the style share goes from {share[base]:.2f} to {share[far.title]:.2f}.")
    return notes


__all__ = ["DemoReport", "data_folder", "run_demo"]
