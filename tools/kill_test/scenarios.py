"""What is killed: each verb that writes, over an output that is there already."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH, RANK = 4, 256, 64
PAIR = ("--from", "v1.safetensors", "--to", "v2.safetensors")


@dataclass(frozen=True)
class Scenario:
    """One command and what it writes.

    Attributes:
        name: for the table.
        argv: the command's arguments; every output is overwritten.
        outputs: names of the files and folders that it writes.
    """

    name: str
    argv: tuple[str, ...]
    outputs: tuple[str, ...]


SCENARIOS = (
    Scenario("port to a file", ("port", "kohya.safetensors", *PAIR, "-o", "out.safetensors"), ("out.safetensors",)),
    Scenario("port to a folder", ("port", "lora", *PAIR, "-o", "out"), ("out",)),
    Scenario(
        "port with a migration and a report",
        ("port", "lora", *PAIR, "-o", "out", "--save-migration", "m.safetensors", "--report", "r.html"),
        ("out", "m.safetensors"),
    ),
    Scenario(
        "convert to a file",
        ("convert", "unet", "--format", "kohya", "-o", "out.safetensors"),
        ("out.safetensors",),
    ),
    Scenario("convert to a folder", ("convert", "kohya.safetensors", "--format", "peft", "-o", "out"), ("out",)),
)


def prepare(place: Path) -> None:
    """Bases, adapters and old outputs in ``place``. Large enough that writing takes milliseconds."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    modules = [f"{block}.attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    v1 = {
        f"{path}.weight": random(320, 768 if ".attn2.to_k" in path or ".attn2.to_v" in path else 320)
        for path in modules
    }
    save_file(v1, place / "v1.safetensors")
    save_file({name: w + 0.01 * random(*w.shape) for name, w in v1.items()}, place / "v2.safetensors")
    pairs = {path: (random(320, RANK), random(RANK, v1[f"{path}.weight"].shape[1])) for path in modules}
    peft, kohya = {}, {}
    for path, (up, down) in pairs.items():
        peft |= {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
        flat = f"lora_unet_{path.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": down.clone(), f"{flat}.lora_up.weight": up.clone()}
        kohya[f"{flat}.alpha"] = torch.tensor(32.0)
    save_file(kohya, place / "kohya.safetensors")
    for name in ("lora", "unet"):
        _folder(place / name, peft)


def _folder(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("what the author says\n" * 2000)


def set_old(place: Path, scenario: Scenario) -> None:
    """The old outputs, anew; nothing else of a run before remains."""
    for name in (*scenario.outputs, "r.html"):
        _remove(place / name)
    for name in scenario.outputs:
        path = place / name
        if path.suffix:
            save_file({"old": torch.zeros(100_000)}, path)
        else:
            _folder(path, {"old": torch.zeros(100_000)})
            (path / "notes.txt").write_text("the user's own")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def content(path: Path) -> dict[str, str]:
    """Hash by name of everything at ``path``; empty where nothing is."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def stages(place: Path) -> Iterator[Path]:
    """The hidden folders of runs that were killed while they wrote."""
    return place.glob(".*.*")


def run(scenario: Scenario) -> int:
    """The command in this process; its exit code."""
    from regraft.cli import main

    sys.argv = ["regraft", *scenario.argv, "--overwrite", "--quiet"]
    if scenario.argv[0] == "convert":
        sys.argv.remove("--quiet")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0
