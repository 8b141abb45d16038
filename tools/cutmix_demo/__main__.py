"""Does Cut-Mix-Unmix keep two new subjects apart?

    python -m tools.cutmix_demo --cache DIR --out results/cutmix.json --strip docs/cutmix.png

Two emoji that the demo's v1 has not seen, a tiger and a panda, are taught as "<v1> cat" and "<v2> dog". The first steps
show each alone; then the training goes on without collages, with them, and with the regulariser beside them: the same
steps, batches and seeds. Then pictures of both are asked for in words that were not trained, and a judge of halves says
whether exactly one of each is there, apart from the other. What is done is kept in the cache.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tools.cutmix_demo import judge as judging
from tools.cutmix_demo.learn import BATCH, POOL, PRIOR, Arm, Model, Pool, train
from tools.cutmix_demo.subjects import ASKED, ICONS, PHRASES, Drawn, drawn, sampler
from torch import Tensor

from regraft.bench.diffusion_data import save
from regraft.bench.resume import step_generator
from regraft.runtime import quiet_libraries
from regraft.training.unmix import Apart, recorded_attention, unmix_loss

UNMIX = 10.0
ARMS = {"cut-mix": Arm(0.6), "cut-mix and unmix": Arm(0.6, UNMIX), "no collages": Arm(0.0)}
BOTH, SINGLE, SIDED = 24, 8, 8
"""Pictures per run: of both subjects, of each alone by turns, and of both with sides."""


@dataclass(frozen=True)
class Trainer:
    """One kind of adapter on one set of subjects."""

    kind: str
    shown: Drawn
    classes: list[Tensor]

    def train(self, model: Model, arm: Arm, steps: int, seed: int) -> dict[str, float]:
        """Train in place; the losses at the end."""
        draws = sampler(self.shown.subjects(), arm.cut_mix)
        own = Pool.of(draws, model, POOL, 100 + seed)
        prior = Pool.of(draws.of_classes(self.classes), model, POOL // 3, 200 + seed)
        return train(model, self.kind, arm, own, prior, steps, 300 + seed)

    def begun(self, steps: int, seed: int) -> dict[str, Tensor]:
        """What all ways of one seed have in common: each subject alone."""
        model = Model(self.kind, seed)
        self.train(model, ARMS["no collages"], steps, seed)
        return model.state()

    def ended(self, arm: Arm, begun: dict[str, Tensor], steps: int, seed: int) -> dict[str, Any]:
        """Train one way on and paint with it: losses, and pictures by prompt."""
        model = Model(self.kind, seed)
        model.load(begun)
        losses = self.train(model, arm, steps, 1000 + seed)
        if self.kind == "lora":
            model.unet.fuse_lora()  # the same pictures, sooner
        return {"losses": losses, "leak": leak(model, self.shown), "pictures": painted(model, self.shown, seed)}


def painted(model: Model, shown: Drawn, seed: int) -> dict[str, Tensor]:
    """Pictures of both subjects, of each alone by turns, and of both with sides."""
    subjects = shown.subjects()
    one, two = (subject.name for subject in subjects)
    prompts = {
        "both": [ASKED.format(one, two), ASKED.format(two, one)],
        "single": [PHRASES.one.format(one), PHRASES.one.format(two)],
        "sides": [PHRASES.beside.format(one, two), PHRASES.beside.format(two, one)],
    }
    counts = {"both": BOTH, "single": SINGLE, "sides": SIDED}
    return {
        name: model.paint(prompts[name] * (counts[name] // 2), seed=400 + 10 * seed + at).half()
        for at, name in enumerate(prompts)
    }


@torch.no_grad()
def leak(model: Model, shown: Drawn) -> float:
    """Mean squared attention of each special token to the other's region, on collages alike for all ways."""
    pool = Pool.of(sampler(shown.subjects(), 1.0), model, 48, 900)
    random = step_generator(901, 0)
    noise = torch.randn(pool.latents.shape, generator=random)
    times = torch.randint(len(model.schedule.signal), (len(noise),), generator=random)
    states, _ = model.schedule.noised(pool.latents, noise, times)
    with recorded_attention(model.unet) as maps:
        model.predict(states, times, model.read([sample.prompt for sample in pool.samples]))
    return float(unmix_loss(maps, Apart.of(pool.samples, model.tokenizer), (16, 16)))


def figures(judge: judging.Judge, found: dict[str, Any]) -> dict[str, Any]:
    """What the judge sees in a run's pictures."""
    both, single, sides = (found["pictures"][name].float() for name in ("both", "single", "sides"))
    outcomes = Counter(_outcome(judge, picture[None]) for picture in both)
    left, right, *_ = (judge.sees(half) for half in judging.halves(sides))
    first = torch.arange(len(sides)) % 2
    alone = judge.sees(single) == torch.arange(len(single)) % 2
    return {
        "mix_rate": round(1 - outcomes["apart"] / len(both), 4),
        "outcomes": dict(sorted(outcomes.items())),
        "single_right": round(float(alone.float().mean()), 4),
        "sides_right": round(float(((left == first) & (right == 1 - first)).float().mean()), 4),
        "attention_to_the_other": round(found["leak"], 5),
        "losses": found["losses"],
    }


def _outcome(judge: judging.Judge, picture: Tensor) -> str:
    left, right, top, bottom = (int(judge.sees(half)) for half in judging.halves(picture))
    if {left, right} == {0, 1} or {top, bottom} == {0, 1}:
        return "apart"
    seen = {left, right, top, bottom, int(judge.sees(picture))} - {judging.NEITHER}
    if not seen:
        return "neither is seen"
    return f"only the {list(ICONS)[seen.pop()]}" if len(seen) == 1 else "both, but not apart"


def strip(found: dict[str, dict[str, Any]], shown: Drawn, path: Path, columns: int = 12) -> None:
    """One row of the subjects, and one of each way's first pictures of both, three times enlarged."""
    subjects = torch.cat([shown.tiger[: columns // 2], shown.panda[: columns // 2]])
    rows = [subjects, *(one["pictures"]["both"][:columns].float() for one in found.values())]
    lined = torch.cat([torch.nn.functional.pad(torch.cat(list(row), 2), (0, 0, 0, 2), value=1.0) for row in rows], 1)
    pixels = ((lined + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def kept(path: Path, make: Any) -> Any:
    """What is in the file, or is made and put there."""
    if not path.exists():
        save(path, make())
    return torch.load(path, weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strip", type=Path)
    parser.add_argument("--adapter", choices=["lora", "svdiff"], default="lora")
    parser.add_argument("--steps", type=int, nargs=2, default=(180, 400), help="alone, and as each way has it")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    with quiet_libraries():
        base, shown = Model("", 0), drawn(asked.cache)

        def through(pictures: Tensor) -> Tensor:
            with torch.no_grad():
                decoded: Tensor = base.vae.decode(base.encode(pictures) / base.vae.config.scaling_factor).sample
                return decoded.clamp(-1, 1)

        work = asked.cache / "cutmix"
        judge, test = judging.Judge().eval(), drawn(asked.cache, test=True)
        judge.load_state_dict(kept(work / "judge.pt", lambda: judging.trained_judge(shown, through).state_dict()))
        held_out = judging.accuracy(judge, test, through)
        print("judge", held_out, flush=True)
        nouns = [subject.noun for subject in shown.subjects()]
        classes = kept(
            work / "classes.pt",
            lambda: [base.paint([f"{noun} on white"] * 24, 50 + at) for at, noun in enumerate(nouns)],
        )
        trainer, (first, then) = Trainer(asked.adapter, shown, classes), asked.steps
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
        for seed in range(asked.seeds):
            for name, arm in ARMS.items():
                stem = f"{asked.adapter}-{first}-{seed}"
                begun = kept(work / f"{stem}.pt", lambda seed=seed: trainer.begun(first, seed))
                file = work / f"{stem}-{then}-{arm.cut_mix}-{arm.unmix}.pt"
                made = kept(file, lambda arm=arm, begun=begun, seed=seed: trainer.ended(arm, begun, then, seed))
                found[name].append(made)
                print(seed, name, figures(judge, made), flush=True)
                done = {name: runs for name, runs in found.items() if runs}
                # What there is so far: on a busy machine a run takes long.
                write(asked, held_out, {name: [figures(judge, one) for one in runs] for name, runs in done.items()})
                if asked.strip:
                    strip({name: runs[0] for name, runs in done.items()}, shown, asked.strip)


def write(asked: argparse.Namespace, held_out: dict[str, float], rows: dict[str, list[dict[str, Any]]]) -> None:
    """The results, with the command that made them."""
    names = ("mix_rate", "single_right", "sides_right", "attention_to_the_other")
    first, then = asked.steps
    result = {
        "command": f"python -m tools.cutmix_demo --cache DIR --adapter {asked.adapter} --seeds {asked.seeds} "
        f"--steps {first} {then} --out {asked.out}",
        "base": "the demo's v1",
        "adapter": asked.adapter,
        "steps": {"each subject alone": first, "each way": then},
        "batch": {"subjects": BATCH, "prior": PRIOR},
        "unmix": UNMIX,
        "prompt": ASKED,
        "pictures_per_run": {"both": BOTH, "single": SINGLE, "sides": SIDED},
        "judge_held_out_accuracy": held_out,
        "ways": {
            name: {"mean": {key: round(sum(run[key] for run in runs) / len(runs), 4) for key in names}, "seeds": runs}
            for name, runs in rows.items()
        },
    }
    asked.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
