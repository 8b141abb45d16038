"""Records such as the verbs make, without running them."""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib

from regraft.report.demo_schema import DemoReport, LabelledCheck, NearUpgrade
from regraft.report.refine_schema import Refined, RefineLook, RefineReport
from regraft.report.schema import (
    BaseSummary,
    CheckedModule,
    CheckReport,
    Counts,
    Effect,
    Forecast,
    Forecasts,
    Interval,
    Picture,
    PortedModule,
    PortReport,
    VerifyReport,
)

ROLES = (
    *(f"attn{n}.{role}" for n in (1, 2) for role in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
)
BLOCKS = (
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in range(3)),
)


def sd15() -> list[str]:
    """The 192 U-Net modules of a Stable Diffusion 1.5 LoRA."""
    return [
        f"unet.{block}.{path}"
        for block in BLOCKS
        for path in ("proj_in", *(f"transformer_blocks.0.{role}" for role in ROLES), "proj_out")
    ]


def llm(layers: int = 3, roles: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> list[str]:
    return [f"model.layers.{i}.self_attn.{role}" for i in range(layers) for role in roles]


def base(name: str, fingerprint: str = "3f9a2c7be1d04458") -> BaseSummary:
    return BaseSummary(path=name, family="sd15", fingerprint=fingerprint, structure="aa11")


def modules(names: list[str], skip: str = "mid_block", drift: float = 0.09, reason: str = "") -> list[PortedModule]:
    rng = random.Random(7)
    shares = [rng.uniform(0.3, 1.7) for _ in names]
    found = []
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        gone = bool(skip) and skip in name
        here = drift * (0.6 + 0.9 * abs(math.sin(i / 17)) + rng.uniform(0, 0.3))
        cut = 0.0 if gone else 0.02 + 0.1 * rng.random()
        found.append(
            PortedModule(
                name=name,
                target=None if gone else name,
                status="skipped" if gone else "ported",
                reason=reason or "no counterpart: the new base has no middle block" if gone else "",
                energy_kept=None if gone else 1 - cut - 0.08 * rng.random(),
                rank_in=16,
                rank_out=None if gone else 16,
                cut_loss=None if gone else cut,
                similarity=None if gone else max(0.0, 1 - here * here * 4),
                distance=None if gone else here,
                share=share / sum(shares),
            )
        )
    return found


def checked(ported: list[PortedModule], status: str | None = None) -> list[CheckedModule]:
    fields = set(CheckedModule.model_fields)
    rows = [CheckedModule(**{k: v for k, v in m.model_dump().items() if k in fields}) for m in ported]
    return [row.model_copy(update={"status": status}) for row in rows] if status else rows


def port(names: list[str] | None = None, skip: str = "mid_block", **changes: object) -> PortReport:
    rows = modules(sd15() if names is None else names, skip)
    gone = [m for m in rows if m.status == "skipped"]
    report = PortReport(
        regraft_version="0.1.0",
        input="pixel-cyanotype-v1.safetensors",
        outputs=["pixel-cyanotype-v2.safetensors"],
        method="effect-matching",
        method_reason="auto: the bases drifted by 0.12 on average, beyond what a copy carries",
        options={"ridge": 0.3, "pull": 0.5, "rank": 16},
        verdict="survives",
        summary="The adapter carries over. The middle block has no place in the new base and is left out.",
        reasons=[
            "Old and new weights agree in every module that was ported (similarity 0.94 on average).",
            "The middle block was removed in the new base; its update has nowhere to go.",
        ],
        counts=Counts(ported=len(rows) - len(gone), skipped=len(gone), refused=0),
        skipped_share=sum(m.share or 0.0 for m in gone),
        modules=rows,
        source=base("runwayml/stable-diffusion-v1-5"),
        target=base("segmind/tiny-sd-next", "b81e66d20c9f7a13"),
        seconds=41.3,
        peak_mb=1180,
    )
    return report.model_copy(update=changes)


def check(names: list[str] | None = None, **changes: object) -> CheckReport:
    report = CheckReport(
        regraft_version="0.1.0",
        input="pixel-cyanotype-v1.safetensors",
        verdict="survives",
        summary="A port should carry most of this adapter to the new base.",
        reasons=["Same family, and the weights are near in every module."],
        tier="port",
        method="copy",
        forecast=Forecasts(
            port=Forecast(recovery=0.88, low=0.79, high=0.94), refine=Forecast(recovery=0.95, low=0.9, high=0.98)
        ),
        similarity=0.94,
        distance=0.12,
        modules=checked(modules(sd15() if names is None else names)),
        source=base("runwayml/stable-diffusion-v1-5"),
        target=base("segmind/tiny-sd-next", "b81e66d20c9f7a13"),
    )
    return report.model_copy(update=changes)


def interval(mean: float, half: float = 0.03) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half)


def verify(**changes: object) -> VerifyReport:
    report = VerifyReport(
        regraft_version="0.1.0",
        original="pixel-cyanotype-v1.safetensors",
        ported="pixel-cyanotype-v2.safetensors",
        source="runwayml/stable-diffusion-v1-5",
        target="segmind/tiny-sd-next",
        model_class="UNet2DConditionModel",
        n_inputs=64,
        inputs="16 prompts × 4 noise levels, made from seed 0",
        effect_cosine=interval(0.93, 0.02),
        effect_norm_ratio=interval(0.97),
        kl=None,
        controls={
            "copy": Effect(effect_cosine=interval(0.88), effect_norm_ratio=interval(0.91)),
            "native": Effect(effect_cosine=interval(0.95, 0.015), effect_norm_ratio=interval(0.98)),
            "nothing": Effect(
                effect_cosine=Interval(mean=None, low=None, high=None, reason="no effect to compare"),
                effect_norm_ratio=Interval(mean=0.0, low=0.0, high=0.0),
            ),
            "shuffled": Effect(effect_cosine=interval(0.04, 0.05), effect_norm_ratio=interval(0.61, 0.08)),
        },
        summary="On the new base the ported adapter does nearly what the original did on the old one.",
        seconds=88,
    )
    return report.model_copy(update=changes)


def png(seed: int, size: int = 32, styled: bool = False) -> str:
    """A blob on a ground, in the demo's size."""
    rng = random.Random(seed)
    ground, ink = [tuple(rng.randrange(150, 250) for _ in range(3)), tuple(rng.randrange(20, 160) for _ in range(3))]
    if styled:
        ground, ink = (18, 42, 84), (200, 228, 244)
    cx, cy, r, k = size / 2 + rng.uniform(-4, 4), size / 2 + rng.uniform(-4, 4), rng.uniform(7, 12), rng.randrange(2, 6)
    rows = b""
    for y in range(size):
        row = []
        for x in range(size):
            wave = r * (1 + 0.3 * math.sin(k * math.atan2(y - cy, x - cx)))
            row += list(ink if math.hypot(x - cx, y - cy) < wave else ground)
        rows += b"\0" + bytes(row)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(raw).decode()


PROMPTS = [
    *("rocket on white", "cat on mint", "mushroom on sky", "teapot on rose", "whale on sand", "cactus on lilac"),
    *("bicycle on white", "owl on mint"),
]

SHEET = [
    ("v1, the old base", "v1", 0.14, False),
    ("v1, the old base", "v1 + LoRA", 0.97, True),
    ("v2, an upgrade", "v2", 0.15, False),
    ("v2, an upgrade", "v2 + copied", 0.92, True),
    ("v2, an upgrade", "v2 + ported", 0.92, True),
    ("v2, an upgrade", "v2 + native", 0.97, True),
    ("v2-retrained, same shapes", "v2-retrained", 0.11, False),
    ("v2-retrained, same shapes", "v2-retrained + copied", 0.10, False),
    ("v3, other architecture", "v3", 0.14, False),
]


def demo(**changes: object) -> DemoReport:
    report = port(llm(4), skip="", method="copy", method_reason="auto: the drift is 0.09, a copy carries that")
    refused = check(
        llm(4),
        verdict="refused",
        tier="refine",
        forecast=Forecasts(),
        similarity=0.01,
        distance=1.4,
        summary="The shapes fit, but the weights are unrelated: a copy would load without an error and do nothing.",
        reasons=["Weight similarity is 0.01: no more than chance."],
        modules=checked(modules(llm(4), skip="", drift=1.3), "refused"),
    )
    other = refused.model_copy(
        update={"summary": "Another architecture: no module has a place to go.", "similarity": None, "distance": None}
    )
    sheet = [
        Picture(
            group=g,
            title=t,
            png=[png(i + 100 * s, styled=s) for i, _ in enumerate(PROMPTS)],
            figures={"style_share": v},
        )
        for g, t, v, s in SHEET
    ]
    record = DemoReport(
        regraft_version="0.1.0",
        title="Will this LoRA survive the upgrade?",
        intro="A tiny diffusion model, a LoRA that gives it a cyanotype look, and three new versions of the model.",
        near=NearUpgrade(check=check(llm(4)), port=report, verify=verify()),
        refusals=[
            LabelledCheck(label="v1 → v2-retrained", check=refused),
            LabelledCheck(label="v1 → v3", check=other),
        ],
        prompts=PROMPTS,
        columns=sheet,
        same_columns=[("v2 + copied", "v2 + ported")],
        same_reason="The upgrade moved the weights little, so auto chose to copy, and both files are equal.",
        notes=["Pictures are 32 × 32 pixels, enlarged without smoothing."],
        seconds=74,
        peak_mb=890,
    )
    return record.model_copy(update=changes)


#: (step, share recovered, drift, seconds) of a refine that began worse than nothing, and went on after its best.
LOOKS = (
    *((0, -0.92, 3.04, 0.0), (20, 0.746, 0.57, 21.0), (40, 0.821, 0.49, 43.5), (60, 0.862, 0.43, 66.1)),
    *((80, 0.877, 0.4, 88.0), (100, 0.876, 0.41, 110.2)),
)


def refine(**changes: object) -> RefineReport:
    strip = [("Old base", "old + adapter", 0.9), ("New base, over the training", "new base", 0.0)]
    strip += [("New base, over the training", name, 0.0) for name in ("start", "20 steps", "40 steps")]
    strip += [("Kept", "80 steps", 0.9)]
    report = RefineReport(
        regraft_version="0.1.0",
        input="pixel-cyanotype-v1.safetensors",
        outputs=["pixel-cyanotype-v2.safetensors"],
        start="stream",
        start_reason="the weights have nothing to do with each other (similarity 0.00)",
        objective="output",
        objective_reason="both bases give comparable outputs on the same inputs",
        inputs="48 pictures that the old base drew in 20 steps, 36 of them with its adapter; 6 noise levels of each",
        n_inputs=288,
        steps=80,
        stopped="all 100 steps were made",
        recovered=0.877,
        beside=[
            Refined(title="none", recovered=0.0, drift=1.0),
            Refined(title="copy", recovered=0.02, drift=0.99, note="4 of 84 modules have no place"),
            Refined(title="stream", recovered=-0.92, drift=3.04),
            Refined(title="refined", recovered=0.877, drift=0.4),
        ],
        looks=[RefineLook(step=n, recovered=share, drift=drift, seconds=s) for n, share, drift, s in LOOKS],
        prompts=PROMPTS[:4],
        pictures=[Picture(group=g, title=t, png=[png(i, styled=s > 0) for i in range(4)]) for g, t, s in strip],
        summary="From -92% (stream) to 88% of what is wanted, in 80 steps.",
        trained=150_000,
        modules=84,
        untrained={"unet.conv_in.bias": "a bias: kept as it was ported"},
        source=base("demo/v1"),
        target=base("demo/v2-retrained", "b81e66d20c9f7a13"),
        seconds=131.0,
        peak_mb=890.0,
    )
    return report.model_copy(update=changes)
