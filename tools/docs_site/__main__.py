"""Makes what the site shows: ``python -m tools.docs_site [pictures|notebook]``.

The pictures of docs/start.md come from the embedded bases, as the page's commands make them; the notebook is run in a
folder of its own and written back, without what would tell of this machine.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nbformat
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from regraft import load_adapter, open_base, port, verify
from regraft.demo import data_folder
from regraft.probes.pictures import Images, draw
from regraft.report.schema import VerifyReport
from regraft.runtime.libraries import library, quiet_libraries

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "pictures"
#: Readable on a light and on a dark page: the pictures have no ground of their own.
INK = "#7f7f7f"
SHOWN = 6


def prepared(folder: Path) -> Path:
    """The folder that docs/start.md makes: the embedded bases, and the LoRA under a short name."""
    shutil.copytree(data_folder(), folder, dirs_exist_ok=True)
    shutil.copy(folder / "loras" / "style-v1.safetensors", folder / "style.safetensors")
    return folder


def drawn(base: Path, lora: Path | None = None) -> Images:
    """The demo's first prompts by a base, with a LoRA or without."""
    facts = json.loads((data_folder() / "demo.json").read_text(encoding="utf-8"))
    with quiet_libraries():
        pipeline = library("diffusers").DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            pipeline.load_lora_weights(str(lora))
        asked = facts["report"]
        sizes = {"height": facts["size"], "width": facts["size"]}
        return draw(
            pipeline,
            asked["prompts"][:SHOWN],
            asked["seeds"][:SHOWN],
            steps=asked["steps"],
            guidance_scale=asked["guidance"],
            **sizes,
        )


def small(png: bytes) -> bytes:
    """The PNG with 255 colours: a third of its bytes, and no difference that is seen."""
    made = BytesIO()
    # The one way of Pillow that keeps transparency.
    Image.open(BytesIO(png)).convert("RGBA").quantize(255, method=Image.Quantize.FASTOCTREE).save(made, "PNG")
    return made.getvalue()


def save(figure: Figure, name: str) -> None:
    """Into the folder of pictures, without a ground."""
    made = BytesIO()
    figure.savefig(made, transparent=True)
    (PICTURES / f"{name}.png").write_bytes(small(made.getvalue()))
    plt.close(figure)


def sheet(name: str, rows: Sequence[tuple[str, Images]]) -> None:
    """A PNG: one row for each of ``rows``, its title on the left."""
    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(SHOWN + 1.9, len(rows) * 1.03), dpi=100)
    for line, (title, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="bicubic")
            axis.set_axis_off()
        line[0].text(-0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center", color=INK, fontsize=15)
    figure.subplots_adjust(left=1.9 / (SHOWN + 1.9), right=1, bottom=0, top=1, wspace=0.03, hspace=0.03)
    save(figure, name)


def effects(name: str, measured: VerifyReport) -> None:
    """A PNG: the effect's cosine of the port and of its controls, with intervals."""
    bars = {"this port": measured.effect_cosine}
    bars |= {name: control.effect_cosine for name, control in measured.controls.items()}
    bars = {title: value for title, value in bars.items() if value.mean is not None}
    figure, axis = plt.subplots(figsize=(7.9, 0.55 * len(bars) + 0.7), dpi=100)
    for place, (title, value) in enumerate(reversed(bars.items())):
        assert value.mean is not None
        axis.barh(place, value.mean, color="#3f7fbf" if title == "this port" else "#9fb4c8", height=0.6)
        axis.plot([value.low, value.high], [place, place], color=INK, linewidth=2)
        axis.text(1.01, place, f"{value.mean:.2f}", va="center", color=INK, fontsize=14)
    axis.set_yticks(range(len(bars)), list(reversed(bars)), color=INK, fontsize=14)
    axis.set_xlim(-0.1, 1)
    axis.tick_params(colors=INK, labelsize=13)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.set_xlabel("cosine of the effect with the original's", color=INK, fontsize=13)
    figure.tight_layout()
    save(figure, name)


def icon() -> None:
    """The site's icon: two bars, one grown out of the other."""
    figure = plt.figure(figsize=(0.48, 0.48), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.plot([0.3, 0.3], [0.08, 0.92], color="#3f51b5", linewidth=5, solid_capstyle="round")
    axis.plot([0.3, 0.72, 0.72], [0.4, 0.6, 0.92], color="#26a69a", linewidth=5, solid_capstyle="round")
    save(figure, "icon")


def pictures() -> None:
    """All pictures of docs/start.md."""
    PICTURES.mkdir(exist_ok=True)
    icon()
    with TemporaryDirectory() as name:
        folder = prepared(Path(name))
        style, ported = folder / "style.safetensors", folder / "ported.safetensors"
        adapter = load_adapter(style)
        port(adapter, open_base(folder / "v1"), open_base(folder / "v2")).save(ported)
        old, new, apart = folder / "v1", folder / "v2", folder / "v2-retrained"
        sheet("start-old", [("v1", drawn(old)), ("v1 + LoRA", drawn(old, style))])
        sheet("start-refused", [("v2-retrained", drawn(apart)), ("the same\n+ copied", drawn(apart, style))])
        native = folder / "loras" / "style-v2.safetensors"
        rows = {"v2": None, "v2 + copied": style, "v2 + ported": ported, "v2 + native": native}
        sheet("start-new", [(title, drawn(new, lora)) for title, lora in rows.items()])
        effects("start-verify", verify(adapter, load_adapter(ported), old, new))


def notebook() -> None:
    """Run docs/notebook.ipynb and keep what it shows, without folders, times and versions of this machine."""
    file = DOCS / "notebook.ipynb"
    book = nbformat.read(file, as_version=4)
    with TemporaryDirectory() as name:
        NotebookClient(book, timeout=600, resources={"metadata": {"path": name}}).execute()
    for cell in book.cells:
        cell.metadata.clear()
        # Warnings of libraries name their folders.
        outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for output in outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = base64.b64encode(small(base64.b64decode(output.data["image/png"]))).decode()
        if cell.cell_type == "code":
            cell.outputs = outputs
    book.metadata.pop("language_info", None)
    nbformat.write(book, file)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for wanted in sys.argv[1:] or ["pictures", "notebook"]:
        {"pictures": pictures, "notebook": notebook}[wanted]()
