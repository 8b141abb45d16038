"""Training of the demo's bases and of its style LoRAs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from regraft.bench.diffusion_art import PROMPTS
from regraft.bench.resume import Checkpoints, cosine_rate, step_generator

from . import autoencoder, models

BATCH, LORA_BATCH = 32, 16
EMPTY_SHARE = 0.1
"""How many prompts are left out in training, so that guidance has an unconditional side."""


@dataclass(frozen=True)
class BaseRecipe:
    """How one base is trained; `start` names the base that it goes on from."""

    data: str
    seed: int
    steps: int
    rate: float
    autoencoder: str = "ae"
    start: str | None = None


@dataclass(frozen=True)
class LoraRecipe:
    """How one style LoRA is trained."""

    base: str
    data: str
    seed: int
    steps: int = 1500
    rate: float = 6e-3


BASES = {
    "v1": BaseRecipe("fluent", seed=1, steps=3000, rate=1e-3),
    # After these steps v1's LoRA still worked as on v1; an upgrade that costs it something takes more drift.
    "v2-early": BaseRecipe("noto", seed=2, steps=1200, rate=1.5e-3, start="v1"),
    "v2": BaseRecipe("noto", seed=5, steps=1000, rate=2.3e-3, start="v2-early"),
    # Goes on once too, to be as well trained as v2 is.
    "v2-retrained-early": BaseRecipe("noto", seed=3, steps=2800, rate=1e-3),
    "v2-retrained": BaseRecipe("noto", seed=6, steps=1000, rate=1e-3, start="v2-retrained-early"),
    "v3": BaseRecipe("noto", seed=4, steps=2400, rate=1e-3, autoencoder="ae-v3"),
}

SHIPPED = [name for name in BASES if not name.endswith("-early")]

LORAS = {
    "style-v1": LoraRecipe("v1", "fluent-styled", seed=21),
    "style-v2": LoraRecipe("v2", "noto-styled", seed=22),
    "style-v2-retrained": LoraRecipe("v2-retrained", "noto-styled", seed=23),
    "style-v3": LoraRecipe("v3", "noto-styled", seed=24),
}


def train_base(name: str, cache: Path) -> None:
    """Train base `name` and write its averaged U-Net and text encoder under cache / name."""
    folder, recipe = cache / name, BASES[name]
    if (folder / "unet" / "config.json").exists():
        return
    tokenizer = models.write_tokenizer(folder / "tokenizer")
    torch.manual_seed(recipe.seed)
    if recipe.start:
        unet, text = load_base(recipe.start, cache)
    else:
        unet, text = models.unet(name), models.text_encoder(tokenizer)
    # The plain attention processor is the faster one under bf16 on a CPU at these sizes.
    unet.set_attn_processor(AttnProcessor())
    unet.train(), text.train()
    both = torch.nn.ModuleList([unet, text])
    ema = EMAModel(both.parameters(), decay=0.998)
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.rate, weight_decay=0.01)
    ids = models.token_ids(tokenizer, [*PROMPTS, ""])
    checkpoints = Checkpoints(cache / f"{name}.checkpoint.pt", every=250, log=cache / f"{name}.log")
    parts = {"models": both, "ema": ema, "optimizer": optimizer}
    set_ = autoencoder.latents(recipe.autoencoder, recipe.data, cache)
    for step in checkpoints.steps(recipe.steps, parts):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * cosine_rate(step, recipe.steps, warmup=200)
        noisy, times, aim, prompts = _batch(set_, recipe.seed, step, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            loss = mse_loss(unet(noisy, times, text(ids[prompts])[0]).sample.float(), aim)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        ema.step(both.parameters())
        checkpoints.note(step, loss=loss.item())
    ema.copy_to(both.parameters())
    text.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")


def train_lora(name: str, cache: Path) -> None:
    """Train style LoRA `name` on its base and write it in diffusers' format under cache / loras."""
    recipe, folder = LORAS[name], cache / "loras"
    if (folder / f"{name}.safetensors").exists():
        return
    torch.manual_seed(recipe.seed)
    unet, text = load_base(recipe.base, cache)
    tokenizer = CLIPTokenizer.from_pretrained(cache / recipe.base / "tokenizer")
    with torch.no_grad():
        words = text(models.token_ids(tokenizer, [*PROMPTS, ""]))[0]
    unet.requires_grad_(False)
    config = LoraConfig(r=models.LORA_RANK, lora_alpha=models.LORA_RANK, target_modules=models.LORA_TARGETS)
    unet.add_adapter(config)
    unet.set_attn_processor(AttnProcessor())
    trained = torch.nn.ParameterList([p for p in unet.parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    checkpoints = Checkpoints(cache / f"{name}.checkpoint.pt", every=200, log=cache / f"{name}.log")
    set_ = autoencoder.latents(BASES[recipe.base].autoencoder, recipe.data, cache)
    for step in checkpoints.steps(recipe.steps, {"lora": trained, "optimizer": optimizer}):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * cosine_rate(step, recipe.steps, warmup=50)
        noisy, times, aim, prompts = _batch(set_, recipe.seed, step, LORA_BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            loss = mse_loss(unet(noisy, times, words[prompts]).sample.float(), aim)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        checkpoints.note(step, loss=loss.item())
    save_lora(unet, config, folder, f"{name}.safetensors")


def save_lora(unet: UNet2DConditionModel, config: LoraConfig, folder: Path, filename: str) -> None:
    """Write the U-Net's adapter in diffusers' own LoRA format, float16, with its PEFT metadata."""
    state = {key: tensor.half() for key, tensor in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=state,
        weight_name=filename,
        unet_lora_adapter_metadata=_plain_metadata(config),
    )


def load_base(name: str, cache: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """A trained base's U-Net and text encoder, as float32."""
    folder = cache / name
    return (
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
    )


def drift(before: UNet2DConditionModel, after: UNet2DConditionModel) -> dict[str, float]:
    """‖W₂ − W₁‖ / ‖W₁‖ of each weight that the LoRAs adapt, in Frobenius norm, by module name."""
    old, new = before.state_dict(), after.state_dict()
    names = [key for key in old if key.endswith(tuple(f".{target}.weight" for target in models.LORA_TARGETS))]
    return {key.removesuffix(".weight"): ((new[key] - old[key]).norm() / old[key].norm()).item() for key in names}


def _batch(set_: dict[str, torch.Tensor], seed: int, step: int, size: int) -> tuple[torch.Tensor, ...]:
    """Noised latents, timesteps, the v that the U-Net should predict, and prompt indices (the last = empty)."""
    random = step_generator(seed, step)
    chosen = torch.randint(len(set_["latents"]), (size,), generator=random)
    clean = set_["latents"][chosen].float()
    noise = torch.randn(clean.shape, generator=random)
    times = torch.randint(_SCHEDULER.config.num_train_timesteps, (size,), generator=random)
    prompts = set_["prompts"][chosen].clone()
    prompts[torch.rand(size, generator=random) < EMPTY_SHARE] = len(PROMPTS)
    noisy = _SCHEDULER.add_noise(clean, noise, times)
    return noisy, times, _SCHEDULER.get_velocity(clean, noise, times), prompts


def _plain_metadata(config: LoraConfig) -> dict:
    """PEFT's config as JSON can hold it: its sets become sorted lists."""
    found = copy.deepcopy(config.to_dict())
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


_SCHEDULER = models.scheduler()
