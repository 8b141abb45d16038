"""Training a mapper for a pair of bases, on a folder of pictures or on what the two draw themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from regraft._version import __version__
from regraft.base import Base
from regraft.bridge.adapted import check_kinds
from regraft.bridge.latent_spaces import own_shape, resized
from regraft.bridge.x_adapter.files import save_mapper
from regraft.bridge.x_adapter.lesson import BridgeLesson, PairedPictures
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.bridge.x_adapter.settings import MapperSettings
from regraft.bridge.x_adapter.strip import MapperStrip
from regraft.bridge.x_adapter.variety import varied
from regraft.errors import InputError, having_room
from regraft.memory import peak_mb
from regraft.migration import summarise
from regraft.output import check_writable, undisturbed
from regraft.probes.sentences import PICTURE_PROMPTS
from regraft.refine.drawn import check_pipelines, draw_pictures
from regraft.report.bridge_schema import BridgeTrainReport, MapperLevel
from regraft.runtime.both import BothModels
from regraft.runtime.latents import Latents
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.room import TRAINING
from regraft.runtime.training_state import keep, kept_file, taken_up
from regraft.training import rows_of
from regraft.training.lessons import split
from regraft.training.loop import Heard, Look, run
from regraft.training.picture_data import pixel_groups, read_captions

#: Called with (done, in all, what is at work).
Tick = Callable[[int, int, str], None]

# What may differ between a run and the one that goes on from it.
_FREE = ("steps", "budget", "look", "device", "precision", "checkpointing")
_REMEDY = "Take a smaller --batch, --gradient-checkpointing, --dtype bfloat16 or --precision bf16."
# Pictures that are encoded together, and channels at which the learning rate is 1e-3.
_TOGETHER, _CHANNELS = 16, 64


def train_mapper(
    old: Base,
    new: Base,
    output: Path,
    data: Path | None = None,
    settings: MapperSettings = MapperSettings(),
    *,
    overwrite: bool = False,
    state: Path | None = None,
    tick: Tick = lambda done, total, what: None,
    heard: Heard = lambda look: None,
    strip: Path | None = None,
) -> BridgeTrainReport:
    """Train a mapper from one base to another, and write it.

    Args:
        old: the base that plug-ins are for.
        new: the base that is bridged to.
        output: a ``.safetensors`` file.
        data: a folder of pictures with captions; None: the bases draw their own.
        settings: see `MapperSettings`.
        overwrite: replace what is there.
        state: a file that the state of the training is kept in, and gone on from; by default `state_file`.
        tick: told of what is at work.
        heard: called after each look.
        strip: a PNG of a few prompts through the bridge over the training; see `regraft.bridge.x_adapter.strip`.

    Raises:
        InputError: a base or the data can't be used, or the training comes to nothing.
        OutputError: the output can't be written.
    """
    began = perf_counter()
    for file in (output, strip):
        if file is not None:
            check_writable(file, overwrite=overwrite)
    state = state or state_file(old, new, data, settings)
    with quiet_libraries(), having_room("the training takes more memory than there is", new.path, _REMEDY):
        tick(0, settings.steps, "loading the bases")
        models = BothModels.load(old, new, settings.config, settings.device, dtype=settings.dtype, remedy=TRAINING)
        check_kinds(models.old, models.new, "denoiser", "diffusion model")
        check_pipelines(models)
        torch.manual_seed(settings.seed)
        config = mapper_config(
            models.old,
            models.new,
            settings.levels,
            blocks=settings.blocks,
            fusion=settings.fusion,
            timed=settings.timed,
            lead=settings.lead,
        )
        learner = Averaged(Mapper(config).to(settings.device), settings.average)
        pictures, made = paired_pictures(models, data, settings, state.with_suffix(".pictures.pt"), tick)
        fit, apart = _split(pictures, settings)
        lesson = BridgeLesson(
            models.old,
            models.new,
            learner.mapper,
            pictures,
            fit,
            apart,
            prompted=settings.prompted,
            dropped=settings.dropped,
            seed=settings.seed,
        )
        lesson.settle(models.new, settings.seed)
        rate = settings.rate or 1e-3 * _CHANNELS / max(level.outer for level in config.levels)
        if strip is not None:
            heard = _drawn_beside(models, learner, strip, settings, heard)
        try:
            course = run(models.new, learner, lesson, settings, settings.batch, rate, heard, state)
        finally:
            lesson.close()
        learner.eval()
        told = {"pictures": made, "steps": course.looks[-1].step, "seed": settings.seed}
        written = save_mapper(learner.mapper, output, old, new, told=told, overwrite=overwrite)
    if not course.more:
        state.unlink(missing_ok=True)
        state.with_suffix(".pictures.pt").unlink(missing_ok=True)
    return BridgeTrainReport(
        regraft_version=__version__,
        source=summarise(old),
        target=summarise(new),
        outputs=[str(file) for file in (written, strip) if file is not None],
        data=made,
        learnt=len(fit),
        levels=[MapperLevel(**asdict(level)) for level in config.levels],
        fusion=config.fusion,
        trained=sum(p.numel() for p in learner.mapper.parameters()),
        batch=settings.batch,
        rate=rate,
        steps=course.looks[-1].step,
        stopped=course.stopped,
        unkept=course.unkept,
        looks=rows_of(course),
        seconds=perf_counter() - began,
        peak_mb=peak_mb(),
    )


def state_file(old: Base, new: Base, data: Path | None, settings: MapperSettings) -> Path:
    """Where the state of a training between these bases, on this data and with these settings is kept.

    Raises:
        InputError: there is no such data.
    """
    files: list[Path] = []
    if data is not None:
        if not data.is_dir():
            raise InputError("no such folder", file=data, remedy="Check the path of the data.")
        files = sorted(file for file in data.rglob("*") if file.is_file())
    content = {
        "old": str(old.prints),
        "new": str(new.prints),
        "data": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "settings": {name: value for name, value in asdict(settings).items() if name not in _FREE},
    }
    return kept_file("bridge", content)


def _drawn_beside(models: BothModels, learner: Averaged, file: Path, settings: MapperSettings, heard: Heard) -> Heard:
    """What is called with a look: the strip first, then ``heard``."""
    strip = MapperStrip(file, settings.prompts or PICTURE_PROMPTS, settings.seed)
    strip.before(models, learner.mapper)

    def both(look: Look) -> None:
        strip.at(look)
        heard(look)

    return both


class Averaged:
    """A mapper, and the mean of its values over the steps: what is measured and kept.

    Attributes:
        mapper: holds the values of the last step while it is trained, and else their mean.
    """

    def __init__(self, mapper: Mapper, decay: float) -> None:
        """Begin with the mapper as it is.

        Args:
            mapper: to train.
            decay: of the mean at a step, once it has seen many.
        """
        self.mapper, self.decay = mapper, decay
        self._other = copy.deepcopy(mapper).requires_grad_(False)
        self._steps, self._training = 0, True

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.mapper.parameters()

    def train(self) -> None:
        self._turn(training=True)

    def eval(self) -> None:
        self._turn(training=False)

    def kept(self) -> dict[str, Tensor]:
        self.train()
        values, means = self.mapper.state_dict(), dict(self._other.named_parameters())
        found = {
            f"{which}.{name}": part for which, of in (("now", values), ("mean", means)) for name, part in of.items()
        }
        return {**found, "steps": torch.tensor(self._steps)}

    def take(self, kept: dict[str, Tensor]) -> None:
        self.train()
        parts = {which: _below(kept, f"{which}.") for which in ("now", "mean")}
        self.mapper.load_state_dict(parts["now"])
        with torch.no_grad():
            for name, value in self._other.named_parameters():
                value.copy_(parts["mean"][name])
        self._steps = int(kept["steps"])

    @torch.no_grad()
    def stepped(self) -> None:
        # At first the mean forgets faster, or it would hold the start for as long as its decay says.
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        for mean, value in zip(self._other.parameters(), self.mapper.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)

    @torch.no_grad()
    def _turn(self, *, training: bool) -> None:
        if training is not self._training:
            # An interrupt in the middle would leave half of either.
            with undisturbed():
                for mean, value in zip(self._other.parameters(), self.mapper.parameters(), strict=True):
                    held = value.clone()
                    value.copy_(mean)
                    mean.copy_(held)
                self._training = training
        self.mapper.train(training)


def paired_pictures(
    models: BothModels, data: Path | None, settings: MapperSettings, kept: Path | None, tick: Tick
) -> tuple[PairedPictures, str]:
    """What is learnt from, in both bases' latents, and how it was made.

    Args:
        models: both bases.
        data: a folder of pictures with captions; None: half the pictures by each base.
        settings: how many, of what, in how many versions.
        kept: a file that they are kept in, and read from where it is there; None for none.
        tick: told of what is at work.

    Raises:
        InputError: there are none, or a base has no such latents.
    """
    made = f"{settings.pictures} pictures, half by each base" if data is None else str(data)
    if settings.varied:
        made += f"; each in {settings.varied} more versions of other colours"
    if kept is not None and kept.is_file():
        with taken_up(kept) as read:
            return PairedPictures(read["old"], read["new"], tuple(read["captions"])), made
    if data is None:
        prompts = settings.prompts or PICTURE_PROMPTS
        parts = []
        for number, (side, count) in enumerate(
            (("old", settings.pictures - settings.pictures // 2), ("new", settings.pictures // 2))
        ):
            tick(0, settings.steps, f"the {side} base draws {count} pictures")
            model = models.old if side == "old" else models.new
            parts.append(draw_pictures(model, list(prompts), count, settings.seed + 10_000 * (number + 1)))
        size = parts[1].pictures.shape[2:]
        pixels = [resized(part, list(size)) for drawn in parts for part in torch.split(drawn.pictures, _TOGETHER)]
        captions = tuple(text for drawn in parts for text in drawn.texts)
        groups: Iterable[Tensor] = pixels
    else:
        groups, captions = pixel_groups(data, models.new, settings.size), read_captions(data, settings.caption)
    tick(0, settings.steps, "encoding the pictures")
    found = _encoded(models, groups, captions, settings)
    if kept is not None:
        keep({"old": found.old, "new": found.new, "captions": list(found.captions)}, kept)
    return found, made


@torch.no_grad()
def _encoded(
    models: BothModels, groups: Iterable[Tensor], captions: tuple[str, ...], settings: MapperSettings
) -> PairedPictures:
    """Pictures in both bases' latents, all as they are, then all in each other version; a group is held at a time."""
    generator = torch.Generator().manual_seed(settings.seed)
    found: dict[str, list[list[Tensor]]] = {side: [[] for _ in range(1 + settings.varied)] for side in ("old", "new")}
    for pixels in groups:
        for number in range(1 + settings.varied):
            shown = pixels if number == 0 else varied(pixels, generator)
            for side, model in (("old", models.old), ("new", models.new)):
                factor = getattr(model.pipeline, "vae_scale_factor", 8)
                height, width = own_shape(model, (shown.shape[2], shown.shape[3]))
                fitted = resized(shown, [height * factor, width * factor])
                found[side][number].append(Latents(model).encode(fitted).cpu())
    old, new = (torch.cat([part for version in found[side] for part in version]) for side in ("old", "new"))
    return PairedPictures(old, new, captions * (1 + settings.varied))


def _split(pictures: PairedPictures, settings: MapperSettings) -> tuple[list[int], list[int]]:
    """Numbers to learn from and to measure on; all versions of a picture go together.

    Raises:
        InputError: there is nothing to learn from.
    """
    n = len(pictures) // (1 + settings.varied)
    fit, apart = split(n, settings.held, settings.seed)
    if not fit:
        raise InputError("all of the pictures are held out", remedy="Lower --held-out.")
    first, second = ([i + n * version for version in range(1 + settings.varied) for i in part] for part in (fit, apart))
    return first, second


def _below(named: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}
