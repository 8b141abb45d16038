"""Inputs that are made, not collected, and the outputs of a model on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from regraft.adapter import Adapter
from regraft.errors import InputError, reading
from regraft.runtime.libraries import quiet_libraries
from regraft.runtime.load import Loaded


class Probe(Protocol):
    """The same inputs for two models."""

    @property
    def made(self) -> str:
        """How the inputs were made, in words."""
        ...

    @property
    def prompts(self) -> list[str]:
        """The prompts that they come from, if any."""
        ...

    @property
    def logits(self) -> bool:
        """Whether outputs are logits."""
        ...

    def __len__(self) -> int: ...

    def outputs(self, model: Loaded) -> Iterator[Tensor]:
        """The model's output on each input in turn, float32 on the CPU."""
        ...

    def carried_to(self, model: Loaded) -> tuple[Probe, str | None]:
        """The probe for another model, and why its outputs can't be compared with the first one's, if so."""
        ...


def make_probe(
    model: Loaded, adapter: Adapter, *, prompts: Sequence[str] | None, n_inputs: int | None, seed: int
) -> Probe:
    """Inputs for ``model`` and the model that follows it, made by itself with and without ``adapter``.

    Args:
        model: the old base.
        adapter: the adapter that was trained on it.
        prompts: texts to use instead of made ones.
        n_inputs: by default 32 for language models and encoders, 16 for denoisers, or as many as there are prompts.
        seed: same seed, same inputs.

    Raises:
        InputError: prompts are given, and the base has no tokenizer to read them with.
    """
    with quiet_libraries():
        if model.kind == "denoiser":
            from regraft.probes.diffusion import diffusion_probe

            return diffusion_probe(model, adapter, prompts=prompts, n_inputs=n_inputs, seed=seed)
        from regraft.probes.text import text_probe

        return text_probe(model, adapter, prompts=prompts, n_inputs=n_inputs, seed=seed)


def read_prompts(file: str | Path) -> list[str]:
    """One prompt a line, UTF-8; blank lines are left out.

    Raises:
        InputError: the file can't be read, is no UTF-8 text, or holds no prompt.
    """
    path = Path(file).expanduser()
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8-sig")
    except InputError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise InputError("is no UTF-8 text", file=path, remedy="Save it as UTF-8, one prompt per line.") from None
        raise
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError("holds no prompts", file=path, remedy="Write one prompt per line.")
    return prompts


__all__ = ["Probe", "make_probe", "read_prompts"]
