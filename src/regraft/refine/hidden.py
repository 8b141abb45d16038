"""A further aim beside the outputs: the change that the adapter makes to the hidden states after some of the blocks.

With h the hidden states after a block of the new base and h' those after the old base's block that answers to it, the
student is taught h_new + T (h'_old+adapter − h'_old). T is the identity where the old base's hidden states are the new
base's but for a drift, and otherwise their least-squares map on the same inputs. Hidden states of paired layers as a
teacher: Romero et al. 2015, "FitNets", eq. 3; here their change alone, so that the new base keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from regraft.adapter import Adapter, ModuleRef
from regraft.base import Base
from regraft.errors import UsageError
from regraft.methods._moments import Moments
from regraft.pairing import pair_bases
from regraft.refine.aims import Aim
from regraft.refine.shared import unshared
from regraft.refine.states import HiddenAim, picked, watching
from regraft.runtime.applied import applied
from regraft.runtime.both import BothModels, Side, modules_of
from regraft.runtime.load import Loaded

#: Blocks that are matched, evenly spread over the depth.
BLOCKS = 4
# Of the variance of the new base's hidden states, the least that the old ones must explain, as they are or mapped.
_EXPLAINED = 0.5
# λ of the map's least squares, in mean squares of the old base's hidden states; every so many batches, one that the
# map is not fitted on but judged by.
_RIDGE, _APART = 1e-3, 4
_LEAST = 1e-30

Tick = Callable[[int, int, str], None]
#: Block → how many rows its output has, and some of them (k, width).
_Rows = dict[str, tuple[int, Tensor]]


def paired_blocks(models: BothModels, old: Base, new: Base) -> dict[str, str]:
    """Block of the old base's main model → block of the new one's, by name or by depth (`regraft.pairing`).

    A block is a numbered member of a list of modules, the outermost one.
    """
    counterparts = pair_bases(old, new).counterparts
    answers = {ref: answer.module for ref, answer in counterparts.items() if answer.module is not None}
    ours, theirs = _blocks_of(models.old, answers), _blocks_of(models.new, answers.values())
    return {ours[ref]: theirs[answer] for ref, answer in answers.items() if ref in ours and answer in theirs}


def _blocks_of(model: Loaded, refs: Iterable[ModuleRef]) -> dict[ModuleRef, str]:
    named = dict(model.main.named_modules())
    names = {module: name for name, module in named.items()}
    found: dict[ModuleRef, str] = {}
    for ref, module in modules_of(model, refs).items():
        parts = names.get(module, "").split(".")
        for i in range(1, len(parts)):
            if parts[i].isdigit() and isinstance(named[".".join(parts[:i])], nn.ModuleList):
                found[ref] = ".".join(parts[: i + 1])
                break
    return found


def spread(blocks: Mapping[str, str]) -> dict[str, str]:
    """At most `BLOCKS` of them, evenly over the depth, the last one among them."""
    pairs, n = list(blocks.items()), min(BLOCKS, len(blocks))
    return dict(pairs[-(-len(pairs) * (i + 1) // n) - 1] for i in range(n))


@torch.no_grad()
def with_hidden(
    models: BothModels,
    adapter: Adapter,
    bases: tuple[Base, Base],
    aims: Sequence[Aim],
    *,
    stay: float = 0.0,
    tick: Tick = lambda done, total, what: None,
) -> tuple[list[Aim], str]:
    """The aims with those of hidden states beside them; and which these are, in words.

    Args:
        models: both bases.
        adapter: for the old one.
        bases: the same two.
        aims: to learn from.
        stay: see `regraft.refine.aims.aims_of`.
        tick: called with (done, in all, what).

    Raises:
        UsageError: the bases read other tokens or latents, no blocks of theirs answer to each other, or the hidden
            states of one say too little of the other's.
    """
    why = unshared(models)
    if why:
        raise _useless(f"compares hidden states on the same inputs, and {why}")
    answers = {theirs: ours for ours, theirs in paired_blocks(models, *bases).items()}
    with models.turn("new"), watching(models.new, answers) as seen:
        aims[0].batch.run(models.new, "new")
    # In the order of execution, and without those that give no hidden states.
    pairs = spread({answers[theirs]: theirs for theirs in seen})
    if not pairs:
        raise _useless("needs blocks of both bases that answer to each other, and none do, by name or by depth")

    def read(side: Side, what: str, part: int) -> list[_Rows]:
        names, found = list(pairs if side == "old" else pairs.values()), []
        for i, aim in enumerate(aims):
            tick(part * len(aims) + i, 3 * len(aims), f"hidden states of {what}")
            with watching(models.side(side), names) as seen:
                aim.batch.run(models.side(side), side)
            found.append({name: (len(rows), rows[picked(len(rows), i)].cpu()) for name, rows in seen.items()})
        return found

    with models.turn("old"):
        with applied(models.old.components, adapter):
            after = read("old", "the old base with its adapter", 0)
        before = read("old", "the old base without it", 1)
    with models.turn("new"):
        here = read("new", "the new base", 2)
    wanted: list[dict[str, Tensor]] = [{} for _ in aims]
    sizes: dict[str, float] = {}
    ways: list[str] = []
    for ours, theirs in pairs.items():
        if not all(_alike(one.get(ours), other.get(theirs)) for one, other in zip(before, here, strict=True)):
            continue
        x, y = [part[ours][1] for part in before], [part[theirs][1] for part in here]
        map_, share = _map_between(x, y)
        if share < _EXPLAINED:
            continue
        changes = [_mapped(part[ours][1] - rows, map_) for part, rows in zip(after, x, strict=True)]
        task = [change.square().mean() for aim, change in zip(aims, changes, strict=True) if not aim.retention]
        sizes[theirs] = max(float(torch.stack(task).mean()), _LEAST)
        for into, aim, rows, change in zip(wanted, aims, y, changes, strict=True):
            into[theirs] = _half(rows + (1 - stay if aim.retention else 1) * change)
        ways.append(f"{theirs} ({'as it is' if map_ is None else 'mapped'}, {share:.0%})")
    if not sizes:
        raise _useless(
            f"needs the old base's hidden states to explain {_EXPLAINED:.0%} of the variance of the new one's, and "
            "after no block they do"
        )
    found = [
        replace(aim, hidden=HiddenAim(parts, i, sizes)) for i, (aim, parts) in enumerate(zip(aims, wanted, strict=True))
    ]
    return found, f"after {', '.join(ways)}"


def _alike(one: tuple[int, Tensor] | None, other: tuple[int, Tensor] | None) -> bool:
    return one is not None and other is not None and one[0] == other[0]


def _map_between(x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor | None, float]:
    """The linear map of changes of x to changes of y; None is the identity. And the share of y's variance that it has.

    Args:
        x: batches of the old base's hidden states, (k, width).
        y: the new base's, (k, width').
    """
    if x[0].shape[1] == y[0].shape[1] and (share := _share(x, y)) >= _EXPLAINED:
        return None, share
    apart = [i for i in range(len(x)) if i % _APART == _APART - 1] or list(range(len(x)))
    fit = [i for i in range(len(x)) if i not in apart] or apart
    means = [torch.cat([parts[i] for i in fit]).mean(0) for parts in (x, y)]
    moments = Moments.of(y[0].shape[1], x[0].shape[1])
    for i in fit:
        moments.add(x[i] - means[0], y[i] - means[1])
    map_ = moments.solve(torch.zeros_like(moments.cross), _RIDGE).float()
    return map_, _share([_mapped(x[i] - means[0], map_) + means[1] for i in apart], [y[i] for i in apart])


def _mapped(rows: Tensor, map_: Tensor | None) -> Tensor:
    return rows if map_ is None else rows @ map_.T


def _share(guess: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """1 − ‖y − guess‖² / ‖y − mean‖²."""
    mean = torch.cat(list(y)).mean(0)
    left = sum(float((b - a).square().sum()) for a, b in zip(guess, y, strict=True))
    return 1 - left / max(sum(float((b - mean).square().sum()) for b in y), _LEAST)


def _half(rows: Tensor) -> Tensor:
    """In float16; in bfloat16 where values are too large for it."""
    small = rows.half()
    return small if bool(small.isfinite().all()) else rows.bfloat16()


def _useless(why: str) -> UsageError:
    return UsageError(f"--hidden {why}", remedy="Leave --hidden out.")
