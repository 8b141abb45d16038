"""A repository on the hub, shown to the readers of local files.

They see a folder of its configs and of empty stand-ins for its weights. What a reader opens of these is read by range
requests, or, where whole files are wanted, downloaded into the hub's own cache.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url

from regraft.errors import InputError
from regraft.hub import HubId
from regraft.hub.access import TIMEOUT, Unreachable, asking, cache_folder, endpoint, forbidden, is_offline, patiently
from regraft.hub.ranges import RemoteFile
from regraft.hub.remote import read_remote_safetensors
from regraft.tensor_files import STAND_INS, TORCH_SUFFIXES, TensorFile, read_tensor_file, read_torch

T = TypeVar("T")

_WEIGHTS = (".safetensors", *TORCH_SUFFIXES)
_CONFIGS = ("config.json", "model_index.json", "scheduler_config.json", "adapter_config.json", "quantize_config.json")
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
# As diffusers and transformers name a component's weights.
_STEMS = ("diffusion_pytorch_model", "model", "diffusion_pytorch_model.fp16", "model.fp16")
_LARGEST_CONFIG, _LARGEST_COMPANION = 1 << 26, 1 << 25


def read_from_hub(
    hub_id: HubId, reader: Callable[[Path], T], *, whole: bool, companions: bool = False
) -> tuple[T, Path | None]:
    """What ``reader`` makes of the repository as a local file or folder, and its path in the hub's cache.

    The path is None where the reader was shown stand-ins, whose paths mean nothing to others.

    Args:
        hub_id: what to read.
        reader: of a local path.
        whole: download the weights that it opens; else they are read by range requests as they are used.
        companions: also download the small files beside the weights (tokenizer, README).

    Raises:
        InputError: the hub refuses or does not answer, or the reader can't read what is there.
    """
    if is_offline():
        return _locally(hub_id, reader)
    try:
        repository = _Repository.open(hub_id)
    except Unreachable as error:
        with suppress(InputError):
            return _locally(hub_id, reader)
        raise error
    view = _View(repository, hub_id)
    with view.named():
        found = reader(view.path)
    if not whole:
        return found, None
    path = view.download(companions=companions)
    return reader(path), path


def _locally(hub_id: HubId, reader: Callable[[Path], T]) -> tuple[T, Path | None]:
    path = _cached(hub_id)
    return reader(path), path


def download_runnable(hub_id: HubId) -> Path:
    """Download all that a model needs to run, and return its place in the hub's cache.

    That is the weights that a base is read from, those of the components that no adapter changes (an autoencoder),
    and every small file (configs, tokenizers, schedulers).

    Raises:
        InputError: the hub refuses or does not answer, or there is no base.
    """
    from regraft.checkpoints import open_checkpoint

    if is_offline():
        return _cached(hub_id)
    view = _View(_Repository.open(hub_id), hub_id)
    with view.named():
        open_checkpoint(view.path)
    return view.download(companions=True, runnable=True)


@dataclass(frozen=True)
class PublishedFile:
    """A weights file on the hub, with its hash as the hub lists it: nothing of it is read."""

    file: RemoteFile
    sha256: str | None

    @property
    def name(self) -> str:
        """Without its folder."""
        return PurePosixPath(self.file.url).name


def published_files(hub_id: HubId) -> list[PublishedFile]:
    """The weights files that lie where the id leads, not in folders below.

    Raises:
        InputError: the hub refuses or does not answer.
    """
    repository = _Repository.open(hub_id)
    weights = [name for name in repository.files if name.lower().endswith((*_WEIGHTS, ".gguf"))]
    wanted = [name for name in weights if hub_id.file in (name, _folder_of(name))]
    return [PublishedFile(repository.remote(name), repository.sha256.get(name)) for name in wanted]


def _folder_of(name: str) -> str | None:
    folder = PurePosixPath(name).parent.as_posix()
    return None if folder == "." else folder


def _repository_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def _cached(hub_id: HubId) -> Path:
    """Where it lies in the hub's cache.

    Raises:
        InputError: it was not downloaded.
    """
    folder, revision = _repository_folder(hub_id.repo), hub_id.revision or constants.DEFAULT_REVISION
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    path = folder / "snapshots" / commit / (hub_id.file or "")
    if not path.exists():
        raise forbidden(str(hub_id))
    return path


@dataclass(frozen=True)
class _Repository:
    """What a repository holds at one commit.

    Attributes:
        files: file → its size.
        sha256: large file → its hash, as the hub lists it.
    """

    id: HubId
    commit: str
    files: Mapping[str, int]
    sha256: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, hub_id: HubId) -> _Repository:
        with asking(str(hub_id)):
            api = HfApi(endpoint=endpoint(), library_name="regraft")
            info = patiently(
                lambda: api.model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=TIMEOUT)
            )
        listed = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        hashes = {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings or () if sibling.lfs is not None}
        commit = info.sha or ""
        if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
            raise InputError("the hub names no commit of it", file=str(hub_id), remedy="Check HF_ENDPOINT.")
        return cls(hub_id, commit, {name: size for name, size in listed.items() if _is_inside(name)}, hashes)

    def url(self, name: str) -> str:
        return hf_hub_url(self.id.repo, name, revision=self.commit, endpoint=endpoint())

    def remote(self, name: str) -> RemoteFile:
        return RemoteFile(self.url(name), self.label(name), self.files[name])

    def label(self, name: str) -> str:
        return str(HubId(self.id.repo, self.id.revision, name))

    def download(self, name: str) -> Path:
        """The file in the hub's cache; an interrupted download goes on where it broke off."""
        here = self.downloaded(name)
        if here is not None:
            return here
        with asking(self.label(name)):
            file = patiently(
                lambda: hf_hub_download(
                    self.id.repo,
                    name,
                    revision=self.commit,
                    endpoint=endpoint(),
                    cache_dir=cache_folder(),
                    library_name="regraft",
                )
            )
        return Path(file)

    def downloaded(self, name: str) -> Path | None:
        """The file in the hub's cache, if it is there."""
        file = _repository_folder(self.id.repo) / "snapshots" / self.commit / name
        return file if file.is_file() else None

    def remember(self) -> None:
        """Note the branch's commit as the hub's own tools do, so that it is found again without a network."""
        revision = self.id.revision or constants.DEFAULT_REVISION
        if revision != self.commit and _is_inside(revision):
            with suppress(OSError):
                ref = _repository_folder(self.id.repo) / "refs" / revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.commit)


def _is_inside(name: str) -> bool:
    """Whether a path from a stranger stays in the folder that it is put in."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not re.search(r"[\\:\x00-\x1f]", name)


_views: list[Path] = []


@atexit.register
def _clear() -> None:
    for folder in _views:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _View:
    """A local folder that looks like the repository.

    Attributes:
        path: what the reader is given: the folder, or the file or folder in it that the id names.
        opened: weights files that a reader has opened.
    """

    repository: _Repository
    id: HubId
    root: Path = field(init=False)
    path: Path = field(init=False)
    opened: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="regraft-hub-"))
        _views.append(folder)
        self.root = folder / PurePosixPath(self.id.repo).name
        self.root.mkdir()
        for name in self._shown():
            self._show(name)
        self.path = self.root / (self.id.file or "")

    def _shown(self) -> list[str]:
        """The files that matter for what the id names."""
        files, wanted = self.repository.files, self.id.file
        if wanted is None:
            gguf = [name for name in files if name.lower().endswith(".gguf")]
            if gguf and not any(name.lower().endswith(_WEIGHTS) for name in files):
                # Mostly one model in many quantisations.
                remedy = f"Name one of them, as {HubId(self.id.repo, self.id.revision, gguf[0])}."
                raise InputError(f"the repository holds {len(gguf)} GGUF files", file=str(self.id), remedy=remedy)
            return list(files)
        if wanted in files:
            # A shard index needs the files beside it, an adapter its config.
            beside = PurePosixPath(wanted).parent
            return [name for name in files if PurePosixPath(name).parent == beside]
        below = [name for name in files if name.startswith(f"{wanted}/")]
        if not below:
            some = [name for name in files if name.lower().endswith((*_WEIGHTS, ".gguf"))][:5]
            remedy = f"It has {', '.join(some)}." if some else "It has no weights file."
            raise InputError("the repository has no such file or folder", file=str(self.id), remedy=remedy)
        return below

    def _show(self, name: str) -> None:
        place = self.root / name
        if name.lower().endswith(_WEIGHTS):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
            STAND_INS[place] = lambda: self._open(name)
        elif name == self.id.file or self._is_config(name):
            real = self.repository.download(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            # No symbolic link: readers refuse those that leave a stranger's folder.
            try:
                os.link(real.resolve(), place)
            except OSError:
                shutil.copyfile(real, place)

    def _is_config(self, name: str) -> bool:
        last = PurePosixPath(name).name
        return (last in _CONFIGS or _INDEX.search(last) is not None) and self.repository.files[name] <= _LARGEST_CONFIG

    def _open(self, name: str) -> TensorFile:
        self.opened[name] = None
        here = self.repository.downloaded(name)
        if here is not None:
            return read_tensor_file(here)
        if not name.lower().endswith(".safetensors"):
            # A pickle has no header to read in part.
            return read_torch(self.repository.download(name))
        return read_remote_safetensors(self.repository.remote(name))

    def download(self, *, companions: bool, runnable: bool = False) -> Path:
        """Download what was opened; returns its place in the hub's cache.

        Args:
            companions: also the small files beside it.
            runnable: also the small files of all folders, and the weights of folders of which none was opened.
        """
        names = dict(self.opened)
        if runnable:
            names.update(dict.fromkeys(self._of_other_folders()))
        if companions:
            for folder in {PurePosixPath(name).parent for name in self.opened}:
                names.update(dict.fromkeys(self._companions(folder)))
        place = None
        for name in names or {name: None for name in self._shown() if self._is_config(name) or name == self.id.file}:
            depth = len(PurePosixPath(name).parts)
            place = self.repository.download(name).parents[depth - 1]
        if place is None:
            raise InputError("the repository has nothing to read", file=str(self.id))
        self.repository.remember()
        return place / (self.id.file or "")

    def _of_other_folders(self) -> Iterator[str]:
        shown = self._shown()
        opened = {PurePosixPath(name).parent for name in self.opened}
        for folder in sorted({PurePosixPath(name).parent for name in shown} - opened):
            small = [name for name in self._companions(folder) if name in shown]
            yield from small
            weights = (f"{folder}/{stem}.safetensors" for stem in _STEMS)
            chosen = next((name for name in weights if name in shown), None)
            if chosen is not None and f"{folder}/config.json" in small:
                yield chosen

    def _companions(self, folder: PurePosixPath) -> list[str]:
        files = self.repository.files.items()
        beside = [(name, size) for name, size in files if PurePosixPath(name).parent == folder]
        return [name for name, size in beside if size <= _LARGEST_COMPANION and not name.lower().endswith(_WEIGHTS)]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors within name the place on the hub, not that of the stand-in."""
        try:
            yield
        except InputError as error:
            inside = str(error.file or "")
            if not inside.startswith(str(self.root)):
                raise
            rest = Path(inside).relative_to(self.root).as_posix()
            where = self.repository.label(rest) if rest != "." else str(self.id)
            raise InputError(error.what, file=where, key=error.key, remedy=error.remedy) from None
