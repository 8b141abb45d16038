"""Training of the diffusion world: the bases that the demo lacks, and every adapter on every base.

`diffusion_recipes` says what, `train_base` and `train_adapter` do it. Both go on where they were cut off.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from regraft.bench import diffusion_models as models
from regraft.bench.diffusion_art import PROMPTS
from regraft.bench.diffusion_data import (
    EMPTY,
    FEW_STEPS,
    TEACHER_STEPS,
    Data,
    Latents,
    Schedule,
    ddim,
    save,
    training_batch,
)
from regraft.bench.diffusion_recipes import ADAPTERS, BASES, AdapterRecipe, BaseRecipe, TunerRecipe
from regraft.bench.resume import Checkpoints, cosine_rate, step_generator
from regraft.demo import data_folder
from regraft.runtime import quiet_libraries
from regraft.runtime.libraries import library
from regraft.runtime.room import fast_half
from regraft.training.kinds import settle

BATCH, LORA_BATCH, SAVE_EVERY = 32, 16, 150
TRAJECTORIES = 192
"""Runs of a base's own sampler that its few-step adapter is distilled from."""


@dataclass
class Workshop:
    """Where the world's models lie, and what of them is held in memory."""

    cache: Path
    _data: dict[str, Latents] = field(default_factory=dict)

    def base(self, name: str) -> Path:
        """The folder of a base: one of the demo's, or one of ours, which is trained if it is missing."""
        if name not in BASES:
            return data_folder() / name
        folder = self.cache / "diffusion" / "bases" / name
        if not (folder / "model_index.json").is_file():
            train_base(name, self)
        return folder

    def adapter(self, base: str, name: str, seed: int) -> Path:
        """An adapter on a base, which is trained if it is missing."""
        file = self.adapter_file(base, name, seed)
        if not file.exists():
            train_adapter(base, name, seed, self)
        return file

    def adapter_file(self, base: str, name: str, seed: int) -> Path:
        """Where an adapter lies, or will lie: a file, or PEFT's folder."""
        suffix = "" if isinstance(ADAPTERS[name], TunerRecipe) else ".safetensors"
        return self.cache / "diffusion" / "adapters" / base / f"{name}-{seed}{suffix}"

    def latents(self, base: str, name: str) -> Latents:
        """A set of pictures in the latents of the base's autoencoder."""
        # v1, v2, v2-retrained and everything made from v1 share one autoencoder.
        vae = "v3" if base == "v3" else "v1"
        if (key := f"{vae}-{name}") not in self._data:
            self._data[key] = Data(self.cache, data_folder() / vae / "vae").latents(name)
        return self._data[key]

    def work(self, *parts: str) -> Path:
        """A place for checkpoints and logs."""
        folder = self.cache.joinpath("diffusion", "training")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "-".join(parts)


def mixed() -> AbstractContextManager[Any]:
    """bfloat16 where the processor has it: elsewhere it is emulated, many times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_half())


def train_base(name: str, shop: Workshop) -> Path:
    """Make base ``name`` from v1, train it, and write its folder."""
    recipe, start = BASES[name], shop.base("v1")
    torch.manual_seed(recipe.seed)
    teacher, (text, tokenizer) = models.open_unet(start), models.open_text(start)
    unet = _changed(teacher, recipe, start)
    schedule, sets = Schedule.of(start / "scheduler"), [shop.latents("v1", data) for data in recipe.data]
    trained = nn.ModuleList([unet, text] if recipe.text else [unet])
    ids, words = _words(text, tokenizer)
    teaching = _Teaching(teacher, unet) if recipe.distil else None
    for step in _steps(shop.work("base", name), trained, recipe.steps, recipe.rate, decay=0.01):
        batch = training_batch(sets[step.index % len(sets)], schedule, recipe.seed, step.index, BATCH)
        with mixed():
            said = text(ids[batch.prompts])[0] if recipe.text else words[batch.prompts]
            found = unet(batch.states, batch.times, said).sample.float()
            loss = mse_loss(found, batch.aims)
            if teaching is not None:
                loss = loss + recipe.distil * teaching.loss(found, batch.states, batch.times, said)
        step.learn(loss)
    if teaching is not None:
        teaching.close()
    folder = shop.cache / "diffusion" / "bases" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    models.write_base(folder, start, unet, text if recipe.text else None)
    return folder


def _changed(unet: Any, recipe: BaseRecipe, start: Path) -> Any:
    if recipe.change == "pruned":
        return models.pruned(unet)
    return models.deepened(unet) if recipe.change == "deepened" else models.open_unet(start)


class _Teaching:
    """What a larger U-Net says to a pruned one: its prediction, and what each of its blocks gives.

    SSD-1B (arXiv 2401.02677, eq. 4) adds both to the usual loss; here each block's error is measured
    against the block's own size, so that no weights are needed between blocks.
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.given: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
        self.hooks = [
            module.register_forward_hook(_keeper(self.given[who], name))
            for who, unet in (("teacher", teacher), ("student", student))
            for name, module in _blocks(unet)
        ]

    def loss(self, found: Tensor, states: Tensor, times: Tensor, words: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(states, times, words).sample.float()
        blocks = [
            mse_loss(mine.float(), self.given["teacher"][name].float())
            / self.given["teacher"][name].float().square().mean()
            for name, mine in self.given["student"].items()
        ]
        return mse_loss(found, wanted) + torch.stack(blocks).mean()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _blocks(unet: Any) -> list[tuple[str, nn.Module]]:
    named = [
        (f"{kind}.{i}", block) for kind in ("down", "up") for i, block in enumerate(getattr(unet, f"{kind}_blocks"))
    ]
    return [*named, ("mid", unet.mid_block)]


def _keeper(kept: dict[str, Tensor], name: str) -> Any:
    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output

    return keep


def train_adapter(base: str, name: str, seed: int, shop: Workshop) -> Path:
    """Train adapter ``name`` on ``base`` and write it in diffusers' LoRA format, float16, or as PEFT's folder."""
    recipe, folder = ADAPTERS[name], shop.base(base)
    # The recipe's place keeps two adapters of one seed from seeing the same batches.
    random = 1000 * (1 + list(ADAPTERS).index(name)) + seed
    torch.manual_seed(random)
    unet, (text, tokenizer) = models.open_unet(folder), models.open_text(folder)
    _, words = _words(text, tokenizer)
    tuned, config = _add_adapter(unet, recipe)
    schedule = Schedule.of(folder / "scheduler")
    # A tuner's state is more than what has gradients: FouRA counts which directions were open.
    small = nn.ParameterList([p for p in unet.parameters() if p.requires_grad])
    trained = tuned if isinstance(recipe, TunerRecipe) else small
    lesson = _styled(base, recipe, shop, schedule, random) if recipe.look else _few(base, shop, schedule, random)
    for step in _steps(shop.work("adapter", base, name, str(seed)), trained, recipe.steps, recipe.rate):
        states, times, aims, prompts = lesson(step.index)
        with mixed():
            found = unet(states, times, words[prompts]).sample.float()
        step.learn(mse_loss(found, aims))
    file = shop.adapter_file(base, name, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(recipe, TunerRecipe):
        _write_folder(tuned, recipe, file)
    else:
        _write_adapter(unet, config, file)
    return file


def _add_adapter(unet: Any, recipe: AdapterRecipe) -> tuple[Any, Any]:
    """The U-Net with the recipe's layers in it, in PEFT's wrapping where it has one; and PEFT's config."""
    unet.requires_grad_(False)
    tuned = unet
    if isinstance(recipe, TunerRecipe):
        config = recipe.config(recipe.targets)
        tuned = library("peft").get_peft_model(unet, config)
    else:
        config = library("peft").LoraConfig(
            r=recipe.rank, lora_alpha=recipe.rank, target_modules=list(recipe.targets), use_dora=recipe.dora
        )
        unet.add_adapter(config)
    models.plain_attention(unet)
    return tuned, config


def _write_folder(tuned: Any, recipe: TunerRecipe, folder: Path) -> None:
    settle(tuned, recipe.kind)
    beside = folder.with_name(f"part-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    with quiet_libraries():
        tuned.save_pretrained(str(beside), save_embedding_layers=False)
    beside.replace(folder)


def _styled(base: str, recipe: AdapterRecipe, shop: Workshop, schedule: Schedule, random: int) -> Any:
    data = shop.latents(base, f"fluent-{recipe.look}")

    def lesson(step: int) -> tuple[Tensor, ...]:
        batch = training_batch(data, schedule, random, step, LORA_BATCH)
        return batch.states, batch.times, batch.aims, batch.prompts

    return lesson


def _few(base: str, shop: Workshop, schedule: Schedule, random: int) -> Any:
    """Steps of the long guided way, each to be taken at once and without guidance.

    Progressive distillation (Salimans and Ho 2022, section 3) with all of the teacher's steps between
    two of the student's at once, and the guidance distilled with them.
    """
    found = trajectories(base, shop, TRAJECTORIES, seed=random)
    points, prompts = found["states"].float(), found["prompts"]
    times = torch.tensor(schedule.times(FEW_STEPS))

    def lesson(step: int) -> tuple[Tensor, ...]:
        drawn = step_generator(random, step)
        who = torch.randint(len(prompts), (LORA_BATCH,), generator=drawn)
        at = torch.randint(FEW_STEPS, (LORA_BATCH,), generator=drawn)
        now, after = times[at], times[at + 1]
        states = points[at, who]
        return states, now, schedule.v_between(states, points[at + 1, who], now, after), prompts[who]

    return lesson


def trajectories(base: str, shop: Workshop, count: int, seed: int) -> dict[str, Tensor]:
    """States at the few-step sampler's times along the base's long guided way, and their prompts.

    Returns:
        "states": (FEW_STEPS + 1, count, 8, 16, 16) float16, from noise to picture; "prompts": (count,).
    """
    kept = shop.cache / "diffusion" / "trajectories" / f"{base}-{FEW_STEPS}-{count}-{seed}.pt"
    if not kept.exists():
        folder = shop.base(base)
        unet, (text, tokenizer) = models.open_unet(folder).eval(), models.open_text(folder)
        _, words = _words(text, tokenizer)
        schedule, drawn = Schedule.of(folder / "scheduler"), step_generator(seed, 0)
        noise = torch.randn((count, 8, 16, 16), generator=drawn)
        prompts = torch.randperm(len(PROMPTS) * (1 + count // len(PROMPTS)), generator=drawn)[:count] % len(PROMPTS)
        parts = []
        for rows in torch.split(torch.arange(count), 32):
            with mixed(), torch.no_grad():
                states = ddim(
                    lambda x, t, w: unet(x, t, w).sample.float(),
                    schedule, noise[rows], words[prompts[rows]], words[EMPTY:], TEACHER_STEPS,
                )  # fmt: skip
            parts.append(torch.stack(states[:: TEACHER_STEPS // FEW_STEPS]).half())
        save(kept, {"states": torch.cat(parts, dim=1), "prompts": prompts})
    found: dict[str, Tensor] = torch.load(kept, weights_only=True)
    return found


@torch.no_grad()
def _words(text: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids and embeddings of all prompts, the empty one last."""
    ids = models.token_ids(tokenizer, [*PROMPTS, ""])
    return ids, text(ids)[0]


def _write_adapter(unet: Any, config: Any, file: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    state = {key: tensor.half() for key, tensor in get_peft_model_state_dict(unet).items()}
    beside = file.with_name(f"part-{file.name}")
    with quiet_libraries():
        library("diffusers").StableDiffusionPipeline.save_lora_weights(
            file.parent, unet_lora_layers=state, weight_name=beside.name, unet_lora_adapter_metadata=fields
        )
    beside.replace(file)


@dataclass
class _Step:
    index: int
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.checkpoints.note(self.index, loss=loss.item())


def _steps(work: Path, trained: nn.Module, total: int, rate: float, decay: float = 0.0) -> Iterator[_Step]:
    """The steps still to do, with the learning rate of each: a warm-up and half a cosine."""
    trained.train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    checkpoints = Checkpoints(work.with_suffix(".checkpoint.pt"), every=SAVE_EVERY, log=work.with_suffix(".log"))
    for index in checkpoints.steps(total, {"trained": trained, "optimizer": optimizer}):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine_rate(index, total, warmup=30)
        yield _Step(index, parameters, optimizer, checkpoints)
    trained.eval()
    checkpoints.path.unlink(missing_ok=True)
