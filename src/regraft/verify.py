"""Did the adapter survive? Old base, old + original, new base, new + ported on the same inputs, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.changes import is_copied
from regraft.errors import RegraftError
from regraft.probes import Probe, make_probe
from regraft.probes.controls import random_like
from regraft.probes.effects import compare, interval
from regraft.probes.pictures import ContactSheet, makes_pictures
from regraft.report.schema import Effect, Interval, VerifyReport
from regraft.runtime import Loaded, applied, fitting, load_model, quiet_libraries

#: Called with (steps done, steps in all, what is at work now).
Tick = Callable[[int, int, str], None]


def verify(
    original: Adapter,
    ported: Adapter,
    old: str | Path,
    new: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    n_inputs: int | None = None,
    pictures: int = 0,
    seed: int = 0,
    config: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    tick: Tick | None = None,
) -> VerifyReport:
    """Compare what ``original`` does to the old base with what ``ported`` does to the new one.

    Args:
        original: the adapter as it was trained on ``old``.
        ported: the adapter for ``new``.
        old: folder or weights file of the old base.
        new: the same of the new base.
        prompts: texts to run instead of inputs that the old base makes itself.
        n_inputs: how many inputs; see `regraft.probes.make_probe`.
        pictures: how many prompts to draw as well, from the first on; none where either base makes no pictures.
        seed: of the inputs, the pictures, the random control and the bootstrap.
        config: for bare weights files; see `regraft.runtime.load_model`.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: dtype that the models run in.
        tick: told of progress.

    Raises:
        InputError: a base can't be loaded, or an adapter has modules that its base lacks.
        RegraftError: a needed library is missing, an output holds NaN or Inf, or a picture can't be drawn.
    """
    started = perf_counter()
    runs = _Runs(tick)

    model = load_model(old, config=config, device=device, dtype=dtype)
    probe = make_probe(model, original, prompts=prompts, n_inputs=n_inputs, seed=seed)
    sheet = ContactSheet(probe.prompts[:pictures] if makes_pictures(model) else [], seed, runs.step)
    runs.total = len(probe) * 6 + len(sheet.prompts) * 5
    without = list(runs(probe, model, None, "old base"))
    before = list(zip(without, runs(probe, model, original, "old base + original"), strict=True))
    sheet.draw_old(model, original)
    del model

    model = load_model(new, config=config, device=device, dtype=dtype)
    with quiet_libraries():
        carried, mismatch = probe.carried_to(model)
    base = list(runs(carried, model, None, "new base"))
    measure = _Measure(before, base, carried.logits, mismatch or _other_shape(before[0][0], base[0]), seed)

    effect, pooled = measure(runs(carried, model, ported, "new base + ported"))
    random = random_like(model.components, ported, seed)
    controls = {
        "none": measure(base, no_effect="there is no adapter, so no effect")[0],
        "copy": _copy_control(original, model, measure, lambda copy: runs(carried, model, copy, "new base + copy")),
        "random": measure(runs(carried, model, random, "new base + random"))[0],
    }
    sheet.draw_new(model, original, ported)
    return VerifyReport(
        regraft_version=__version__,
        original=_name(original),
        ported=_name(ported),
        source=str(old),
        target=str(new),
        model_class=model.name,
        n_inputs=len(probe),
        inputs=probe.made,
        effect_cosine=effect.effect_cosine,
        effect_norm_ratio=effect.effect_norm_ratio,
        kl=effect.kl,
        controls=controls,
        summary=summarise(effect, controls, pooled),
        prompts=probe.prompts,
        pictures=sheet.columns,
        seconds=perf_counter() - started,
    )


def _copy_control(
    original: Adapter, model: Loaded, measure: _Measure, run: Callable[[Adapter], Iterator[Tensor]]
) -> Effect:
    # SVDiff's and LoRA-X's numbers belong to the old weight's singular values.
    can = {ref: update for ref, update in original.updates.items() if is_copied(update)}
    if not can:
        return measure.nothing("an adapter of its kind can't be copied to another base")
    copied = fitting(model.components, replace(original, updates=can))
    lost, total = len(original.updates) - len(copied.updates), len(original.updates)
    if lost == total:
        return measure.nothing("no module of the original has its name and shape in the new base")
    return measure(run(copied), note=f"{lost} of {total} modules have no place in the new base" if lost else None)[0]


@dataclass
class _Runs:
    """Runs inputs through a model and tells of each."""

    tick: Tick | None
    total: int = 0
    done: int = 0

    def __call__(self, probe: Probe, model: Loaded, adapter: Adapter | None, what: str) -> Iterator[Tensor]:
        with applied(model.components, adapter), quiet_libraries():
            for output in probe.outputs(model):
                if not bool(torch.isfinite(output).all()):
                    raise RegraftError(
                        f"the output of {what} holds NaN or Inf",
                        file=model.path,
                        remedy="Run it with --dtype float32; if it stays, the weights are damaged.",
                    )
                self.step(what)
                yield output

    def step(self, what: str) -> None:
        self.done += 1
        if self.tick is not None:
            self.tick(self.done, self.total, what)


@dataclass(frozen=True)
class _Measure:
    """One adapter's outputs on the new base → its figures beside the original's.

    Attributes:
        before: the old base's outputs without and with the original.
        base: the new base's outputs.
        logits: whether they are logits.
        mismatch: why outputs of the two bases can't be compared, if so.
        seed: of the bootstrap.
    """

    before: list[tuple[Tensor, Tensor]]
    base: list[Tensor]
    logits: bool
    mismatch: str | None
    seed: int

    def __call__(
        self, outputs: Iterable[Tensor], *, no_effect: str = "no effect on the new base", note: str | None = None
    ) -> tuple[Effect, Interval]:
        """The adapter's figures, and the cosine on the pooled output."""
        figures = [
            compare(pair, (base, output), comparable=self.mismatch is None, logits=self.logits)
            for pair, base, output in zip(self.before, self.base, outputs, strict=True)
        ]
        acts = any(bool((without != with_original).any()) for without, with_original in self.before)
        why = no_effect if acts else "the original has no effect on the old base"
        relative = f"each norm relative to its own model's output: {self.mismatch}" if self.mismatch else None
        notes = "; ".join(part for part in (note, relative) if part) or None

        def over(values: list[float | None], undefined: str, note: str | None) -> Interval:
            return interval(values, seed=self.seed, undefined=undefined, note=note)

        effect = Effect(
            effect_cosine=over([f.cosine for f in figures], self.mismatch or why, note),
            effect_norm_ratio=over([f.ratio for f in figures], why, notes),
            kl=over([f.kl for f in figures], self.mismatch or why, note) if self.logits else None,
        )
        return effect, over([f.pooled for f in figures], self.mismatch or why, None)

    def nothing(self, reason: str | None) -> Effect:
        """Every figure undefined for the one reason."""
        null = Interval(mean=None, low=None, high=None, reason=reason)
        return Effect(effect_cosine=null, effect_norm_ratio=null, kl=null if self.logits else None)


def _other_shape(old: Tensor, new: Tensor) -> str | None:
    if old.shape == new.shape:
        return None
    return f"the outputs have different shapes, {tuple(old.shape)} and {tuple(new.shape)}"


def _name(adapter: Adapter) -> str:
    return str(adapter.path) if adapter.path is not None else "(in memory)"


def summarise(effect: Effect, controls: Mapping[str, Effect], pooled: Interval) -> str:
    """The figures in a sentence or two, and nothing beyond them."""
    cosine, ratio, copy = effect.effect_cosine, effect.effect_norm_ratio, controls["copy"].effect_cosine
    strength = f"{ratio.mean:.2f} times as strong" if ratio.mean is not None else None
    if cosine.mean is None:
        said = f"The direction of the ported adapter's effect can't be compared ({cosine.reason})"
        return f"{said}; its effect is {strength} as the original's." if strength else f"{said}."
    said = f"The ported adapter's effect has a cosine of {_figure(cosine)} with the original's"
    said += f" and is {strength}" if strength else ""
    said += f"; a plain copy: {copy.mean:.2f}" if copy.mean is not None else f"; no plain copy ({copy.reason})"
    if pooled.mean is not None:
        said += f"; on the pooled embedding: {_figure(pooled)}"
    if effect.kl is not None and effect.kl.mean is not None:
        none = controls["none"].kl
        beside = f", without an adapter {none.mean:.3g}" if none is not None and none.mean is not None else ""
        said += f". KL from old + original: {effect.kl.mean:.3g} nats{beside}"
    return said + "."


def _figure(value: Interval) -> str:
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"
