"""What is installed here, what devices there are, and which verbs lack something."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import torch
from huggingface_hub import get_token

from regraft._version import __version__
from regraft.cache import cache_folder
from regraft.report.doctor_schema import Device, DoctorReport, Package, VerbNeeds
from regraft.runtime.room import fast_half

_RUN = ("accelerate", "diffusers", "greenlet", "peft", "transformers")
#: Packages that are not needed by all verbs → what they are for, and how to get them.
_PACKAGES = {
    **dict.fromkeys(_RUN, ("running models", "pip install 'regraft[run]'")),
    "gguf": ("GGUF files", "pip install 'regraft[gguf]'"),
    "bitsandbytes": ("training over a base in 4 or 8 bits, 8-bit optimisers", "pip install bitsandbytes"),
    "ray": ("batches on a cluster", "pip install 'regraft[batch]'"),
    "pyarrow": ("parquet tables of a batch", "pip install 'regraft[batch]'"),
    "fsspec": ("batches from and to object stores", "pip install 'regraft[batch]'"),
    "s3fs": ("stores at s3://", "pip install s3fs"),
    "gcsfs": ("stores at gs://", "pip install gcsfs"),
    "cairosvg": ("the benchmark's pictures", "pip install 'regraft[bench]'"),
    "gradio": ("the page in the browser", "pip install 'regraft[ui]'"),
}
#: Verbs → the packages without which they can't do anything, or can't do a part of it.
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "check --probe": (_RUN[1:], ""),
    "port": (_RUN[1:], "methods that run models: effect, stream, ridge, theseus, scaled-copy; auto chooses by weights"),
    "verify": (_RUN[1:], ""),
    "refine": (_RUN, ""),
    "train": (_RUN, ""),
    "batch": (
        ("ray", "pyarrow", "fsspec"),
        "Ray, parquet and stores; a folder on this machine's processors needs none",
    ),
    "batch s3://": (("fsspec", "s3fs"), ""),
    "batch gs://": (("fsspec", "gcsfs"), ""),
    "bridge": (_RUN, ""),
    "demo": (_RUN, ""),
    "bench": ((*_RUN, "cairosvg"), ""),
    "ui": ((*_RUN, "gradio"), ""),
}
# Tools outside of Python.
_TOOLS = {"npm": "the benchmark fetches its pictures by it"}


def doctor() -> DoctorReport:
    """Look; nothing is changed, and nothing is fetched."""
    packages = [
        Package(name=name, version=_version(name), purpose=purpose, get=get)
        for name, (purpose, get) in _PACKAGES.items()
    ]
    lacking = {package.name for package in packages if package.version is None}
    memory = psutil.virtual_memory()
    return DoctorReport(
        regraft_version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=torch.__version__,
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_mb=round(memory.total / 1e6),
        free_mb=round(memory.available / 1e6),
        devices=_devices(),
        packages=packages,
        verbs=[_verb(verb, needs, part, lacking) for verb, (needs, part) in _NEEDS.items()],
        tools={name: shutil.which(name) or "" for name in _TOOLS},
        cache=str(cache_folder()),
        cache_mb=round(_size(cache_folder()) / 1e6, 1),
        hub_token=get_token() is not None,
    )


def _version(name: str) -> str | None:
    """By its metadata: to import it could take seconds, or fail."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _verb(verb: str, needs: tuple[str, ...], part: str, lacking: set[str]) -> VerbNeeds:
    missing = [name for name in needs if name in lacking]
    return VerbNeeds(
        verb=verb, missing=missing, part=part if missing else "", get=sorted({_PACKAGES[name][1] for name in missing})
    )


def _devices() -> list[Device]:
    found = [Device(name="cpu", description=platform.processor() or platform.machine(), bfloat16=fast_half())]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            found.append(
                Device(
                    name=f"cuda:{i}",
                    description=facts.name,
                    memory_mb=round(facts.total_memory / 1e6),
                    bfloat16=torch.cuda.is_bf16_supported(),
                )
            )
    if torch.backends.mps.is_available():
        found.append(Device(name="mps", description="Apple's GPU", bfloat16=True))
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
