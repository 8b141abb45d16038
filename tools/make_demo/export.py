"""Put the trained models together as they ship: diffusers pipelines, LoRAs, `demo.json` and `NOTICE`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from regraft.bench import diffusion_art as art

from . import autoencoder, models, train

BUDGET = 17_000_000
"""Bytes that the folder may take: the wheel has to stay small."""

GUIDANCE, STEPS = 2.0, 20

# The report's prompts and seeds were fixed before any picture had been made; nothing was tuned on them.
REPORT_PROMPTS = [
    "rocket on green",
    "cat on blue",
    "house on pink",
    "mushroom on white",
    "penguin on purple",
    "owl on grey",
    "sailboat on pink",
    "butterfly on white",
]
REPORT_SEEDS = list(range(101, 101 + len(REPORT_PROMPTS)))

NOTICE = """\
The models in this folder (v1, v2, v2-retrained, v3 and loras) were made for regraft by
tools/make_demo in its repository: tiny Stable Diffusion pipelines and LoRAs, trained from random
weights on 32 x 32 pictures of {concepts} emoji. No other model's weights or outputs went into them.
They are passed on under regraft's own licence; the pictures that they were trained on are
derived from:

  Fluent Emoji (flat), https://github.com/microsoft/fluentui-emoji
  Copyright (c) Microsoft Corporation. MIT License (below).
  Taken from the npm package @iconify-json/fluent-emoji-flat {fluent}.
  Used for: the autoencoders, v1, loras/style-v1; v2 goes on from v1.

  Noto Emoji, https://github.com/googlefonts/noto-emoji
  Copyright Google LLC. Apache License, Version 2.0,
  https://www.apache.org/licenses/LICENSE-2.0
  Taken from the npm package @iconify-json/noto {noto}.
  Used for: the autoencoders, v2, v2-retrained, v3 and their style LoRAs.

Both were changed: drawn at 32 x 32 pixels, scaled, shifted, turned, mirrored, put on plain
backgrounds, and recoloured in two tones for the style LoRAs.

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN
NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,
WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def export(cache: Path, out: Path) -> None:
    """Write everything that ships to `out`, and fail if it outgrew `BUDGET`."""
    if out.exists():
        shutil.rmtree(out)
    for name in train.SHIPPED:
        export_base(name, cache, out / name)
    (out / "loras").mkdir()
    for name in train.LORAS:
        shutil.copyfile(cache / "loras" / f"{name}.safetensors", out / "loras" / f"{name}.safetensors")
    versions = {name: version for name, (_, version) in art.ART.items()}
    (out / "NOTICE").write_text(NOTICE.format(concepts=len(art.CONCEPTS), **versions))
    (out / "demo.json").write_text(json.dumps(record(cache), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600, and a wheel would carry that to where others read it
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size:,} bytes")
    if size > BUDGET:
        raise SystemExit(f"{out} takes {size:,} bytes, over the {BUDGET:,} that it may take")


def export_base(name: str, cache: Path, folder: Path) -> None:
    """Write base `name` as a Stable Diffusion pipeline in float16."""
    unet, text = train.load_base(name, cache)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(cache / train.BASES[name].autoencoder).half(),
        text_encoder=text.half(),
        tokenizer=CLIPTokenizer.from_pretrained(cache / name / "tokenizer"),
        unet=unet.half(),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers 5 writes neither of the two files by which older tools know a CLIP tokenizer.
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(cache / name / "tokenizer" / file, folder / "tokenizer" / file)
    _as_stable_diffusion_writes_it(folder / "text_encoder")
    for config in folder.rglob("*config.json"):
        _forget_where_it_was_made(config)


def record(cache: Path) -> dict:
    """What a reader of the demo's results needs to know about its models, as `demo.json` holds it."""
    drifts = train.drift(train.load_base("v1", cache)[0], train.load_base("v2", cache)[0])
    return {
        "concepts": list(art.CONCEPTS),
        "backgrounds": list(art.BACKGROUNDS),
        "report": {"prompts": REPORT_PROMPTS, "seeds": REPORT_SEEDS, "steps": STEPS, "guidance": GUIDANCE},
        "size": art.SIZE,
        "bases": {name: _summary(name, recipe, cache) for name, recipe in train.BASES.items()},
        "loras": {name: _summary(name, recipe, cache) for name, recipe in train.LORAS.items()},
        "autoencoders": {
            name: {"seed": seed, "steps": autoencoder.STEPS, **_last(name, cache)}
            for name, seed in autoencoder.SEEDS.items()
        },
        "drift_v1_v2": {
            "of": "the U-Net's weights that the LoRAs adapt, ‖W2 − W1‖ / ‖W1‖",
            "mean": round(sum(drifts.values()) / len(drifts), 4),
            "least": round(min(drifts.values()), 4),
            "most": round(max(drifts.values()), 4),
        },
    }


def _summary(name: str, recipe: train.BaseRecipe | train.LoraRecipe, cache: Path) -> dict:
    shown = {key: value for key, value in vars(recipe).items() if value is not None}
    batch = train.BATCH if isinstance(recipe, train.BaseRecipe) else train.LORA_BATCH
    return shown | {"batch": batch} | _last(name, cache)


def _last(name: str, cache: Path, lines: int = 5) -> dict:
    """Mean training figures of the log's last `lines` entries, each of which covers 50 steps."""
    entries = [json.loads(line) for line in (cache / f"{name}.log").read_text().splitlines()][-lines:]
    figures = entries[0].keys() - {"step", "seconds_per_step"}
    return {figure: round(sum(entry[figure] for entry in entries) / len(entries), 5) for figure in sorted(figures)}


def _as_stable_diffusion_writes_it(folder: Path) -> None:
    """Name the text encoder's tensors as every published checkpoint does.

    transformers 5 saves a CLIPTextModel without the `text_model.` level that all checkpoints made
    before it have, and that it still reads. Its config's dtype goes too: it would load in float16,
    which a CPU cannot run next to a float32 U-Net.
    """
    weights = load_file(folder / "model.safetensors")
    prefixed = {
        key if key.startswith("text_model.") else f"text_model.{key}": tensor for key, tensor in weights.items()
    }
    save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _forget_where_it_was_made(config: Path) -> None:
    """Drop what diffusers and transformers note about the folder that a part was loaded from."""
    found = json.loads(config.read_text())
    kept = {key: value for key, value in found.items() if key not in _WHEREABOUTS}
    if kept != found:
        config.write_text(json.dumps(kept, indent=2) + "\n")


_WHEREABOUTS = {"_name_or_path", "is_local", "local_files_only"}
