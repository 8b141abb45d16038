"""Sample distillation of pictures: the new base learns to denoise what the old one draws with its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.adapter import Adapter
from regraft.errors import InputError
from regraft.probes.batches import Batch, Batches, Maker
from regraft.probes.diffusion import first_argument, noise_plan, prompts_for, reads_prompts
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.refine.aims import Aim
from regraft.refine.pictures import DRAWN, PreparedBatch, latents_of
from regraft.refine.pictures import STEPS as STEPS
from regraft.refine.prompting import resolution_of
from regraft.refine.useful import useless
from regraft.runtime.applied import applied
from regraft.runtime.both import BothModels
from regraft.runtime.latents import Latents
from regraft.runtime.load import Loaded

#: Pictures to learn from, noise levels of each, and states that are run together.
N_PICTURES, LEVELS, TOGETHER = 64, 16, 16
# Of the pictures to learn from: so many more to look at, and so many by the new base for retention.
_HELD, _KEPT = 1 / 6, 1 / 4
# Pictures, from −1 to 1, whose values vary less than this are blank.
_BLANK = 0.01


@dataclass(frozen=True)
class Drawn:
    """Pictures and what they were drawn for.

    Attributes:
        texts: one prompt each.
        latents: of the model that drew them, (n, channels, height, width).
        pictures: (n, 3, height, width), from −1 to 1.
    """

    texts: tuple[str, ...]
    latents: Tensor
    pictures: Tensor

    def at(self, which: Tensor | slice) -> Drawn:
        chosen = torch.arange(len(self.texts))[which].tolist()
        return Drawn(tuple(self.texts[i] for i in chosen), self.latents[which], self.pictures[which])


#: (prompts, how many pictures, seed) → pictures that a teacher draws.
Painter = Callable[[Sequence[str], int, int], Drawn]


@dataclass(frozen=True)
class PictureBatch(PreparedBatch):
    """Noisy states of pictures in the new base's latents.

    Attributes:
        target: what its scheduler would have it predict: noise, velocity, or the picture, (n, channels, height, width).
        left: of the old base's loss on such pictures, the share that is left with its adapter.
    """

    target: Tensor = field(default_factory=lambda: torch.empty(0))
    left: float = 1.0


@dataclass(frozen=True)
class PictureAim(Aim):
    """Pictures that the old base drew with its adapter, to be denoised by the new one under its own loss.

    How low that loss can be, nobody knows. The adapter leaves a share of the old base's loss on these very pictures,
    each model in its own latents at the same noise levels; the same share of the new base's loss is taken for all that
    is wanted. So 0 is the new base alone and 1 a gain as large as the adapter's was at home; a student may gain more.

    Attributes:
        floor: the loss that stands for all that is wanted.
    """

    floor: float = 0.0

    def distance(self, outputs: Tensor) -> Tensor:
        """The new model's denoising loss, less the one that is all that is wanted."""
        return F.mse_loss(outputs, self.wanted.to(outputs.device)) - self.floor


def picture_samples(
    models: BothModels,
    adapter: Adapter,
    n: int | None,
    seed: int,
    prompts: Sequence[str] | None,
    *,
    kept: bool,
    dropped: float = 0.0,
    guidance: float | None = None,
    painter: Painter | None = None,
) -> Batches:
    """Noisy states, in the new base's latents, of pictures by the old base with its adapter, and by the new base.

    Args:
        models: both bases, pipelines with autoencoders.
        adapter: for the old one.
        n: states to fit on, `LEVELS` of each picture.
        seed: same seed, same pictures.
        prompts: in place of general ones.
        kept: the new base's own pictures are among those to fit on.
        dropped: share of the pictures drawn that is left out: those on which the adapter matters least.
        guidance: that both bases draw with; None: each pipeline's own default.
        painter: draws the pictures in the old base's place.

    Raises:
        InputError: pictures can't be handed from one base to the other, or are blank or no numbers.
    """
    check_pipelines(models)
    count = max(4, -(-n // LEVELS)) if n else N_PICTURES
    held = max(2, round(_HELD * count))
    drawn = round((count + held) / (1 - dropped))
    given = list(prompts if prompts is not None else PICTURE_PROMPTS)
    if painter is not None:
        by_adapter = painter(given, drawn, seed)
    with models.turn("old"):
        if painter is None:
            with applied(models.old.components, adapter):
                by_adapter = draw_pictures(models.old, given, drawn, seed, resolution_of(adapter), guidance)
        _check_useful(by_adapter, adapter)
        before, after = _own_losses(models.old, adapter, by_adapter, seed)
    if dropped:
        best = (before - after).topk(count + held).indices.sort().values
        by_adapter, before, after = by_adapter.at(best), before[best], after[best]
    left = float(after.sum() / before.sum())
    with models.turn("new"):
        fit = _noised(models.new, by_adapter.at(slice(count)), "adapter", seed, left)
        held_out = _noised(models.new, by_adapter.at(slice(count, None)), "adapter", seed + 100, left)
    who = "the old base drew with its adapter" if painter is None else "the bridge drew"
    made = f"{count} pictures that {who} in {STEPS} steps"
    if dropped:
        made += f", out of {drawn}, those on which the adapter matters most"
    if kept:
        own, apart = max(2, round(_KEPT * count)), max(1, held // 2)
        with models.turn("new"):
            by_new = draw_pictures(models.new, given, own + apart, seed + 10_000, guidance=guidance)
            fit += _noised(models.new, by_new.at(slice(own)), "new", seed + 1)
            held_out += _noised(models.new, by_new.at(slice(own, None)), "new", seed + 101)
        made += f"; {own} by the new base, for retention"
    made += f"; read by the new base's autoencoder, {LEVELS} noise levels of each, seed {seed}"
    return Batches(tuple(fit), tuple(held_out), made)


def check_pipelines(models: BothModels) -> None:
    for model in (models.old, models.new):
        if getattr(model.pipeline, "vae", None) is None or not Latents(model).noise_is_known:
            raise InputError(
                f"a {model.name} {'alone' if model.pipeline is None else 'here'} has no autoencoder, or no noise "
                "schedule that is known: no pictures can be handed over",
                file=model.path,
                remedy="Give both bases as pipeline folders (with model_index.json, autoencoder and scheduler).",
            )
        if not reads_prompts(model):
            raise InputError(f"a {type(model.pipeline).__name__} reads no prompts", file=model.path)


@torch.no_grad()
def draw_pictures(
    model: Loaded,
    given: Sequence[str],
    n: int,
    seed: int,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
) -> Drawn:
    """Pictures for some prompts of a size (height, width) and guidance; by default as the pipeline draws them."""
    texts, (height, width) = prompts_for(given, n, seed), size or (None, None)
    latents, pictures = [], []
    for made in latents_of(model, texts, seed, STEPS, height=height, width=width, guidance_scale=guidance):
        if made.dim() != 4:
            raise InputError(
                f"a {type(model.pipeline).__name__} keeps its latents in a form of its own, which no picture can be "
                "brought into here",
                file=model.path,
            )
        latents.append(made.float().cpu())
        pictures.append(Latents(model).decode(made).cpu())
    return Drawn(tuple(texts), torch.cat(latents), torch.cat(pictures))


def _check_useful(drawn: Drawn, adapter: Adapter) -> None:
    """Raises InputError where nothing could be learnt from what was drawn."""
    if not bool(drawn.pictures.isfinite().all()):
        what = "draws pictures that are no numbers (NaN)"
    elif float(drawn.pictures.flatten(1).std(1).max()) < _BLANK:
        what = "draws nothing but blank pictures"
    else:
        return
    raise useless(adapter.path, what)


@torch.no_grad()
def _own_losses(model: Loaded, adapter: Adapter, drawn: Drawn, seed: int) -> tuple[Tensor, Tensor]:
    """Each picture's denoising loss in the old base's own latents, without and with the adapter, (pictures,) each."""
    batches = _noised(model, drawn, "adapter", seed, known=drawn.latents, mixed=False)

    def losses() -> Tensor:
        said = [(batch.run(model, "old").float().cpu() - batch.target).square().flatten(1).mean(1) for batch in batches]
        return torch.cat(said).reshape(len(drawn.texts), LEVELS).mean(1)

    before = losses()
    with applied(model.components, adapter):
        return before, losses()


@torch.no_grad()
def _noised(
    model: Loaded,
    drawn: Drawn,
    maker: Maker,
    seed: int,
    left: float = 1.0,
    *,
    known: Tensor | None = None,
    mixed: bool = True,
) -> list[PictureBatch]:
    """Every picture at `LEVELS` noise levels of a model's scheduler (see `regraft.probes.diffusion.noise_plan`).

    Args:
        model: whose latents and noise.
        drawn: pictures.
        maker: who drew them.
        seed: of noise and levels.
        left: see `PictureBatch`.
        known: their latents, where they are known.
        mixed: put into another order, so that a step sees several pictures.
    """
    space, generator = Latents(model), torch.Generator().manual_seed(seed)
    clean = encoded(model, drawn.pictures) if known is None else known
    which, times, prompts = noise_plan(drawn.texts, LEVELS, space.steps, generator)
    noise = torch.randn(len(which), *clean.shape[1:], generator=generator)
    alpha, sigma = space.levels(times)
    states, target = alpha * clean[which] + sigma * noise, space.target(clean[which], noise, times)
    n = len(which)
    order = torch.randperm(n, generator=generator) if mixed else torch.arange(n)
    name = first_argument(model)
    return [
        PictureBatch(
            (name, states[part]), times[part], tuple(prompts[int(i)] for i in part), maker, seed,
            target=target[part], left=left,
        )
        for part in torch.split(order, TOGETHER)
    ]  # fmt: skip


def encoded(model: Loaded, pictures: Tensor) -> Tensor:
    """Latents of pictures at the size that the pipeline draws by default, where it tells one."""
    sample = getattr(model.main.config, "sample_size", None)
    factor = getattr(model.pipeline, "vae_scale_factor", None)
    if sample is not None and factor is not None:
        height, width = (sample, sample) if isinstance(sample, int) else sample
        size = (height * factor, width * factor)
        if size != tuple(pictures.shape[2:]):
            # A student that is taught at another size than it draws at learns another thing.
            pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    return torch.cat([Latents(model).encode(part).cpu() for part in torch.split(pictures, DRAWN)])


@torch.no_grad()
def picture_aims(
    models: BothModels,
    batches: Sequence[Batch],
    *,
    tick: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Aim]:
    """A `PictureAim` for the adapter's pictures; on those of the new base, its own predictions are wanted."""
    aims: list[Aim] = []
    for i, batch in enumerate(batches):
        tick(i, len(batches), "the new base without the adapter")
        assert isinstance(batch, PictureBatch)
        with models.turn("new"):
            own = batch.run(models.new, "new").float().cpu()
        if batch.made_by == "new":
            aims.append(Aim(batch, own, None, False, 0.0, True))
            continue
        alone = float(F.mse_loss(own, batch.target))
        floor = batch.left * alone
        aims.append(PictureAim(batch, batch.target, None, False, alone - floor, False, floor))
    return aims
