"""`stream` for denoisers: attention blocks by a map of the old base's streams, then the last convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapter import ModuleRef
from regraft.errors import InputError
from regraft.methods._stream_solve import Sums, Write, rank_of
from regraft.methods._stream_states import States, check_pipelines, make_states, same_space
from regraft.methods._stream_text import applied_twin
from regraft.methods.task import AdapterTask
from regraft.runtime.both import Side, modules_of, twin
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded
from regraft.runtime.record import input_rows, output_rows

_RIDGE_OF_MAPS = 0.01


@dataclass(frozen=True)
class PictureSettings:
    """How the writes are solved.

    Attributes:
        pull: μ.
        ridge: λ of the attention blocks' writes, in mean squares of their inputs; the last write's is a tenth.
    """

    pull: float
    ridge: float


@torch.no_grad()
def carry_pictures(task: AdapterTask, n: int, settings: PictureSettings) -> tuple[list[Write], dict[str, float], str]:
    """Solve the attention blocks' writes from the first to the last, then the last convolution.

    Returns:
        The writes; figures: what is left of the wanted change of the predictions on held-out states; and how the
        states were made.
    """
    check_pipelines(task)
    fit, held, made = make_states(task, n, task.seed)
    ported = twin(task.models.new)
    sites, last = find_sites(task, ported)
    with applied_twin(task) as adapted:
        if not any(_acts(task, adapted, states) for states in fit):
            return [], {}, made
        streams = _wanted_streams(task, adapted, fit, list(sites), settings.pull)
        targets = [_wanted_predictions(task, adapted, states, settings.pull) for states in (*fit, *held)]
    clock = perf_counter()
    for states in fit:
        states.styled["new"].run(task.models.new, "new")
    pass_seconds = perf_counter() - clock
    writes: list[Write] = []
    for done, (site, write) in enumerate((site, write) for site, write in sites.items() if site in streams):
        task.tick(done, len(sites) + 1, str(write.ref))
        sums = Sums.of(write.module)
        for states, wanted in zip(fit, streams[site], strict=True):
            seen, _ = _run(ported, "new", states.styled["new"], {site: _module(ported, site)}, write.module)
            sums.add(seen["x"], wanted - seen[site])
        _put(write, sums, settings.ridge)
        writes.append(write)
    sums = Sums.of(last.module)
    for states, target in zip(fit, targets, strict=False):
        seen, out = _run(ported, "new", states.styled["new"], {}, last.module)
        sums.add(seen["x"], output_rows(last.module, target - out))
    _put(last, sums, settings.ridge / 10)
    figures = {"seconds_one_pass": pass_seconds, **_figures(task, ported, held, targets[len(fit) :])}
    return [*writes, last], figures, made


def _put(write: Write, sums: Sums, ridge: float) -> None:
    write.put(*sums.solve(ridge, bias=True))
    write.cut(sums.metric(ridge, bias=True))


def find_sites(task: AdapterTask, model: Loaded) -> tuple[dict[str, Write], Write]:
    """Attention blocks that both denoisers have under one name → the projection that writes their output; the last one.

    Raises:
        InputError: the new base's denoiser has no last convolution that is known.
    """
    component, rank = model.main_name, rank_of(task)
    there = dict(task.models.old.main.named_modules())
    blocks = [
        path
        for path, module in model.main.named_modules()
        if type(module).__name__ == "Transformer2DModel" and hasattr(module, "proj_out") and path in there
    ]
    names = [ModuleRef(component, f"{path}.proj_out") for path in blocks]
    last = ModuleRef(component, "conv_out")
    found = modules_of(model, [*names, last])
    if last not in found:
        raise InputError(
            f"a {type(model.main).__name__} has no last convolution (conv_out)",
            file=model.path,
            remedy="Take another method; stream knows U-Nets.",
        )
    sites = {path: Write(ref, found[ref], rank) for path, ref in zip(blocks, names, strict=True) if ref in found}
    order = _in_order(model, sites)
    return {path: sites[path] for path in order}, Write(last, found[last], rank)


def _in_order(model: Loaded, sites: dict[str, Write]) -> list[str]:
    """U-Nets run down, through the middle and up, and don't list their blocks so."""

    def place(path: str) -> tuple[int, str]:
        for i, part in enumerate(("down_blocks", "mid_block", "up_blocks")):
            if path.startswith(part):
                return i, path
        return 3, path

    return sorted(sites, key=place)


def _module(model: Loaded, path: str) -> nn.Module:
    module: nn.Module = model.main.get_submodule(path)
    return module


def _acts(task: AdapterTask, adapted: Loaded, states: States) -> bool:
    batch = states.styled["old"]
    return not torch.equal(batch.run(task.models.old, "old"), batch.run(adapted, "old"))


def _run(
    model: Loaded, side: Side, batch: Any, sites: dict[str, nn.Module], write: nn.Module | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of some modules, (rows, channels) each, what a write read (``x``), and the prediction."""
    seen: dict[str, Tensor] = {}
    with _keeping(seen, sites, write):
        out: Tensor = batch.run(model, side).float().cpu()
    return seen, out


@contextmanager
def _keeping(seen: dict[str, Tensor], sites: dict[str, nn.Module], write: nn.Module | None) -> Iterator[None]:
    def output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensor = out if isinstance(out, Tensor) else out[0]
            seen[name] = output_rows(module, tensor).cpu()

        return hook

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = input_rows(module, args[0]).cpu()

    hooks = [module.register_forward_hook(output(name)) for name, module in sites.items()]
    if write is not None:
        hooks.append(write.register_forward_pre_hook(read))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wanted_streams(
    task: AdapterTask, adapted: Loaded, fit: Sequence[States], sites: list[str], pull: float
) -> dict[str, list[Tensor]]:
    """Per site and batch what its output should be, (rows, channels).

    The map M from the old stream to the new one is fitted on plain states, which both bases know; wanted is
    s_new + (s_old+adapter − s_old) M + μ (s_old M − s_new), on styled states.
    """
    old, new = task.models.old, task.models.new
    here, there = ({site: _module(model, site) for site in sites} for model in (old, new))
    with_it = {site: _module(adapted, site) for site in sites}
    maps: dict[str, Sums] = {}
    for states in fit:
        a, _ = _run(old, "old", states.plain["old"], here)
        b, _ = _run(new, "new", states.plain["new"], there)
        for site in sites:
            if len(a[site]) == len(b[site]):
                maps.setdefault(site, Sums.sized(b[site].shape[1], a[site].shape[1])).add(a[site], b[site])
    solved = {site: sums.solve(_RIDGE_OF_MAPS, bias=True) for site, sums in maps.items()}
    wanted: dict[str, list[Tensor]] = {site: [] for site in solved}
    for states in fit:
        a, _ = _run(old, "old", states.styled["old"], here)
        b, _ = _run(adapted, "old", states.styled["old"], with_it)
        c, _ = _run(new, "new", states.styled["new"], there)
        for site, (turn, shift) in solved.items():
            change = (b[site] - a[site]) @ turn.T
            wanted[site].append(c[site] + change + pull * (a[site] @ turn.T + shift - c[site]))
    return wanted


def _wanted_predictions(task: AdapterTask, adapted: Loaded, states: States, pull: float) -> Tensor:
    """The predictions that the new base should make of styled states: through the pictures that they stand for."""
    old, new = Latents(task.models.old), Latents(task.models.new)
    here, there = states.styled["old"], states.styled["new"]
    times, same = here.timesteps, same_space(task)

    def brought(model: Loaded) -> Tensor:
        clean = old.clean(here.run(model, "old").float().cpu(), here.latents[1], times)
        return clean if same else new.encode(old.decode(clean)).cpu()

    own = new.clean(there.run(task.models.new, "new").float().cpu(), there.latents[1], times)
    after = brought(adapted)
    if pull != 1:
        before = brought(task.models.old)
        after = own + (after - before) + pull * (before - own)
    return new.prediction(after, there.latents[1], times)


def _figures(task: AdapterTask, ported: Loaded, held: Sequence[States], targets: Sequence[Tensor]) -> dict[str, float]:
    left = none = 0.0
    for states, target in zip(held, targets, strict=True):
        batch = states.styled["new"]
        left += float((batch.run(ported, "new").float().cpu() - target).square().sum())
        none += float((batch.run(task.models.new, "new").float().cpu() - target).square().sum())
    return {"held_out_error": left / max(none, 1e-30)}
