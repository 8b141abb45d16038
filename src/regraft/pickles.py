"""A look at a pickle before torch's unpickler obeys it.

``torch.load(weights_only=True)`` runs no code of the file's, but it still does what the bytes say:
``bytearray(10**11)`` takes the machine's memory, and nested tuples used as a key take for ever to hash. A state dict
needs neither.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

from regraft.errors import InputError, first_line

_TORCH_UTILS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    # Read without values, and refused afterwards with their names.
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_meta_tensor_no_storage",
)
_ALLOWED = {
    "collections OrderedDict",
    "collections Counter",
    "collections defaultdict",
    "torch Size",
    "torch Tensor",
    "torch device",
    "torch.nn.parameter Parameter",
    "torch.nn.modules.container ParameterDict",
    "torch._tensor _rebuild_from_type_v2",
    "torch.serialization _get_layout",
    "torch.storage TypedStorage",
    "torch.storage UntypedStorage",
    "torch.storage _load_from_bytes",
    *(f"torch._utils {name}" for name in _TORCH_UTILS),
}
# Objects, each counted as often as it is reached: what hashing or copying the whole would touch.
_MOST_REACHED = 50_000_000


def check_zip(path: Path) -> None:
    """Look through a zip archive of torch's before it is loaded.

    Raises:
        InputError: an entry is compressed (torch stores them as they are, and so they can't outgrow the file), or the
            pickle in it is more than a state dict's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise InputError(
                    f"is compressed: {packed.compress_size} bytes that unpack to {packed.file_size}",
                    file=path,
                    key=packed.filename,
                    remedy="PyTorch compresses no weights: save it again, or get another one.",
                )
            size = path.stat().st_size
            longer = next((entry for entry in entries if entry.file_size > size), None)
            if longer is not None:
                what = f"claims {longer.file_size} bytes in an archive of {size}"
                raise InputError(what, file=path, key=longer.filename, remedy="Download or copy it again.")
            names = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            for entry in names:
                check_pickle(archive.read(entry), path)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        remedy = "Download or copy it again."
        raise InputError(f"is a damaged zip archive ({first_line(error)})", file=path, remedy=remedy) from None


def check_legacy(path: Path) -> None:
    """Look through a file of torch before 1.6: pickles of a number, a version, a system, the objects, the keys.

    Raises:
        InputError: see `check_pickle`.
    """
    with path.open("rb") as stream:
        for _ in range(5):
            check_pickle(stream, path)


def check_pickle(data: bytes | IO[bytes], path: Path) -> None:
    """Look through one pickle's opcodes without doing what they say.

    Raises:
        InputError: it calls for something that a state dict doesn't need, or reaches one object too often.
    """
    machine = _Machine(path)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode, argument)
    except InputError:
        raise
    except Exception as error:
        # pickletools complains in several ways of its own, and the machine of a stack that runs dry.
        what = f"is damaged, or is no PyTorch file ({first_line(error)})"
        raise InputError(what, file=path, remedy="Download or copy it again.") from None


class _Machine:
    """The unpickler's stack with a count in the place of each object: how many objects one reaches from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[int | None] = []
        self.memo: dict[int, int] = {}
        self.strings: list[str] = []

    def step(self, opcode: Any, argument: Any) -> None:
        name = opcode.name
        if name == "GLOBAL":
            self._allow(str(argument))
        elif name == "STACK_GLOBAL":
            self._allow(" ".join(self.strings[-2:]))
        elif name in ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"):
            self._refuse(f"opcode {name}")
        if isinstance(argument, str):
            self.strings = [*self.strings[-1:], argument]
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1] or 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            self._move(opcode)

    def _move(self, opcode: Any) -> None:
        taken = 0
        before = [kind.name for kind in opcode.stack_before]
        if "mark" in before:
            while (top := self.stack.pop()) is not None:
                taken += top
            before = before[: before.index("mark")]
        for _ in before:
            taken += self.stack.pop() or 0
        if taken > _MOST_REACHED:
            self._refuse("one object within another, over and over")
        for kind in opcode.stack_after:
            self.stack.append(None if kind.name == "mark" else 1 + taken)

    def _allow(self, name: str) -> None:
        module, _, last = name.rpartition(" ")
        storage = module in ("torch", "torch.cuda") and last.endswith(("Storage", "Tensor"))
        dtype = module == "torch" and last.islower() and "." not in last
        if name not in _ALLOWED and not storage and not dtype:
            self._refuse(name.replace(" ", "."))

    def _refuse(self, what: str) -> None:
        raise InputError(
            f"holds more than tensors ({what}); other objects could run code when loaded",
            file=self.path,
            remedy="Convert it to safetensors on a machine that you trust it on.",
        )
