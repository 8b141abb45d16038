"""What ``regraft demo --refine`` adds: the LoRA distilled into the two bases that a port is refused for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.adapter import Adapter
from regraft.base import Base, open_base
from regraft.errors import InputError, Refused
from regraft.refine import Look, RefineSettings, refine
from regraft.report.demo_schema import FarUpgrade


@dataclass(frozen=True)
class Far:
    """A base that no map of weights leads to, and how the LoRA is distilled into it.

    Attributes:
        base: its folder.
        pictures: that the old base draws, to learn from.
        levels: noisy states that are made of each; the objective says how many it takes.
        steps: of the training, at most.
    """

    base: str
    pictures: int
    levels: int
    steps: int

    @property
    def title(self) -> str:
        """Of its column."""
        return f"{self.base} + refined"

    def settings(self, prompts: Sequence[str], guidance: float) -> RefineSettings:
        """For about a minute on two threads."""
        inputs = self.pictures * self.levels
        return RefineSettings(n_inputs=inputs, steps=self.steps, rate=RATE, prompts=tuple(prompts), guidance=guidance)


#: v2-retrained has v1's latents, so its outputs are matched; v3 reads pictures by an autoencoder of its own, and learns
#: to draw the old base's.
FAR = (Far("v2-retrained", 48, 6, 80), Far("v3", 48, 16, 120))
#: Higher than a refine's own default: it begins without effect, and is to be there in few steps.
RATE = 5e-3


def refine_far(
    far: Far,
    adapter: Adapter,
    old: Base,
    new: Path,
    file: Path,
    prompts: Sequence[str],
    guidance: float,
    say: Callable[[str], None],
) -> FarUpgrade:
    """Refine ``adapter`` for one of `FAR` and write it; or say why that is not possible, which does not end the demo.

    Args:
        far: which, and how.
        adapter: as it was trained on ``old``.
        old: the old base.
        new: folder of the new base.
        file: to write to.
        prompts: in the words that the bases know.
        guidance: that the demo's pictures are drawn with.
        say: told of what is at work.
    """
    label = f"{old.path.name} → {far.base}"

    def heard(look: Look) -> None:
        say(f"refine {label}: step {look.step} of {far.steps}, {look.recovered:.0%} of what is wanted")

    try:
        result = refine(
            adapter,
            old,
            open_base(new),
            # From a start without effect: quicker than a port across architectures, and a demo has minutes.
            start="zero",
            settings=far.settings(prompts, guidance),
            tick=lambda done, total, what: say(f"refine {label}: {what}"),
            heard=heard,
        )
    except (InputError, Refused) as error:
        return FarUpgrade(label=label, title=far.title, reason=error.what)
    written = [str(path) for path in result.save(file, overwrite=True)]
    report = result.report.model_copy(update={"outputs": written})
    return FarUpgrade(label=label, title=far.title, refine=report, self_made=far.pictures)


def cost(far: FarUpgrade) -> str:
    """What a refined column took, in a few words; empty where there is none."""
    if far.refine is None:
        return ""
    return f"{far.refine.seconds:.0f} s, {far.self_made} self-made pictures, {far.refine.steps} steps"
