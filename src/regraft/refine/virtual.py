"""Soft prompts and prefixes: no weight is changed, so nothing is ported; an embedding map starts them.

PEFT's prompt tuning, P-tuning and prefix tuning. Virtual tokens lie in the space of the old base's embeddings. The
tokens that both bases have tell where that space went: P_new = P_old W, with W the least-squares map of their
embeddings, E_old W ≈ E_new; where these are too few, each begins at the mean of the new base's embeddings. A prefix
holds keys and values, for which there is no such map: one that fits is taken as it is, and any other begins at zero.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regraft.adapter import Adapter
from regraft.base import Base
from regraft.errors import InputError, first_line, reading, understanding
from regraft.formats import Written
from regraft.lineage import lineage_of, with_port
from regraft.methods._embeddings import width_map
from regraft.output import ADAPTER_CONFIG, write_whole
from regraft.probes.batches import AtWork, writes
from regraft.refine.loop import Heard
from regraft.refine.settings import RefineSettings
from regraft.refine.starting import ZERO, refine_entry
from regraft.refine.teacher import Teacher
from regraft.refine.told import lineage_entry
from regraft.refine.unported import Started, Tick, taught
from regraft.refine.words import NOISE, shared_embeddings
from regraft.report.refine_schema import RefineReport
from regraft.runtime.both import BothModels
from regraft.runtime.libraries import library
from regraft.runtime.load import Loaded

#: PEFT's kinds; a P-tuning's file holds what its encoder gave, and is the soft prompt that prompt tuning has.
PREFIX = "PREFIX_TUNING"
KINDS = ("PROMPT_TUNING", "P_TUNING", PREFIX)
WEIGHTS, _KEY = "adapter_model.safetensors", "prompt_embeddings"
# Shared tokens for each number of an embedding; of fewer, a map fits whatever it is given.
_LEAST = 1


@dataclass(frozen=True)
class SoftPrompt:
    """A soft prompt or a prefix.

    Attributes:
        path: the folder that it was read from.
        config: ``adapter_config.json``.
        values: (virtual tokens, width), or of a prefix (virtual tokens, layers · 2 · width of keys).
        metadata: of the weights file.
    """

    path: Path
    config: dict[str, Any]
    values: Tensor
    metadata: dict[str, str]

    @property
    def digest(self) -> str:
        """What tells it from others."""
        content = self.values.contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(self.config["peft_type"].encode() + content).hexdigest()

    @property
    def is_prefix(self) -> bool:
        return bool(self.config["peft_type"] == PREFIX)


@dataclass(frozen=True)
class SoftPromptResult:
    """The refined soft prompt, and what it came to."""

    prompt: SoftPrompt
    report: RefineReport

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write PEFT's folder, whole or not at all; see `Adapter.save`."""
        config = json.dumps(self.prompt.config, indent=2, sort_keys=True) + "\n"
        tensors = {_KEY: self.prompt.values.contiguous()}
        content = Written(tensors, self.prompt.metadata, {ADAPTER_CONFIG: config}, folder=True)
        return write_whole(content, Path(path), overwrite=overwrite, source=self.prompt.path)


def is_soft_prompt(path: Path) -> bool:
    """Whether a folder holds one, by its ``adapter_config.json``."""
    file = path / ADAPTER_CONFIG
    try:
        return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("peft_type") in KINDS
    except (OSError, ValueError, AttributeError):
        return False


def load_soft_prompt(path: Path) -> SoftPrompt:
    """Read PEFT's folder.

    Raises:
        InputError: it is damaged, or its prefix goes through a projection.
    """
    with reading(path / ADAPTER_CONFIG), understanding(ADAPTER_CONFIG, path):
        config = dict(json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    file = path / WEIGHTS
    try:
        with reading(file), safe_open(file, "pt") as tensors:
            if _KEY not in tensors.keys():  # noqa: SIM118 (it is no mapping)
                raise InputError(f"holds no {_KEY}", file=file, remedy="Save it with PEFT's save_pretrained.")
            values, metadata = tensors.get_tensor(_KEY), tensors.metadata() or {}
            # A damaged lineage is told before the training, not after it.
            lineage_of(Adapter({}, "peft", metadata=metadata, path=file))
    except SafetensorError as error:
        raise InputError(f"can't be read ({first_line(error)})", file=file, remedy="Copy it again.") from error
    if values.dim() != 2 or not bool(values.float().isfinite().all()):
        raise InputError("is no table of finite vectors", file=file, key=_KEY)
    return SoftPrompt(path, config, values, metadata)


def refine_soft_prompt(
    prompt: SoftPrompt,
    old: Base,
    new: Base,
    *,
    settings: RefineSettings = RefineSettings(),
    state: Path | None = None,
    heard: Heard = lambda look: None,
    tick: Tick = lambda done, total, what: None,
) -> SoftPromptResult:
    """Distil *old base + soft prompt* into *new base + soft prompt*; see `regraft.refine.unported.taught`.

    Raises:
        UsageError: ``settings`` ask for a rank or targets.
        InputError: the bases are no language models that write, the prompt does not fit the old one, or it has no
            effect.
    """
    course = _Course(prompt)
    report = taught(course, old, new, settings, state=state, heard=heard, tick=tick)
    return SoftPromptResult(_refined(prompt, course.values(), report, old, new), report)


class _Course:
    """A soft prompt as `taught` takes it. Its own texts are read with it, too: without it, all is as it was."""

    noun, retains = "soft prompt", False

    def __init__(self, prompt: SoftPrompt) -> None:
        self.prompt = prompt
        self.path, self.digest = prompt.path, prompt.digest
        self.student: _Prompted | None = None

    def teacher(self, models: BothModels) -> Teacher:
        _check_readable(self.prompt, models)
        return Teacher(_in_place(models.old, _with_prompt(models.old, self.prompt, self.prompt.values)), self.path)

    def start(self, old: Base, new: Base, models: BothModels) -> Started:
        values, how = start_of(self.prompt, models)
        self.student = _with_prompt(models.new, self.prompt, values)
        return Started(_in_place(models.new, self.student), how, modules=1)

    def values(self) -> Tensor:
        """Of the student as it is now, float32."""
        assert self.student is not None
        return self.student.table.detach().float().cpu().clone()


def start_of(prompt: SoftPrompt, models: BothModels) -> tuple[Tensor, str]:
    """Where the training begins, float32, and how it was made."""
    if prompt.is_prefix:
        width = _prompted(models.new, prompt).table.shape[1]
        if prompt.values.shape[1] == width:
            return prompt.values.float(), "copy"
        return torch.zeros(len(prompt.values), width), ZERO
    ours, theirs = shared_embeddings(models)
    n, values = len(ours), prompt.values.float()
    if n < _LEAST * values.shape[1]:
        mean = models.new.main.get_input_embeddings().weight.detach().float().cpu().mean(0)
        return mean.repeat(len(values), 1), f"mean embedding ({n} shared tokens are too few for a map)"
    if ours.shape == theirs.shape and torch.equal(ours, theirs):
        return values, "copy"
    return values @ width_map(ours, theirs, rtol=NOISE), f"embedding map of {n} shared tokens"


class _Prompted(nn.Module):
    """A PEFT model that gives the logits of the text alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.peft = model
        self.config = model.get_base_model().config

    @property
    def table(self) -> Tensor:
        """The virtual tokens' values, as `SoftPrompt` has them."""
        weight: Tensor = self.peft.prompt_encoder["default"].embedding.weight
        return weight

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.peft.get_base_model().get_input_embeddings()
        return found

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        logits = self.peft(input_ids=input_ids).logits
        # A soft prompt stands before the text, and has logits of its own.
        return SimpleNamespace(logits=logits[:, -input_ids.shape[1] :])


def _config_of(prompt: SoftPrompt) -> Any:
    peft = library("peft")
    kind = peft.PrefixTuningConfig if prompt.is_prefix else peft.PromptTuningConfig
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt.values))


def _prompted(model: Loaded, prompt: SoftPrompt) -> _Prompted:
    with torch.random.fork_rng():
        return _Prompted(library("peft").get_peft_model(model.main, _config_of(prompt)))


def _with_prompt(model: Loaded, prompt: SoftPrompt, values: Tensor) -> _Prompted:
    """The model with virtual tokens of these values before every text; it is the very same model inside.

    Raises:
        InputError: they are as wide as no token of it.
    """
    found = _prompted(model, prompt)
    if found.table.shape != values.shape:
        raise InputError(
            f"holds vectors of {values.shape[1]} numbers, and those of {model.path.name} have {found.table.shape[1]}",
            file=prompt.path / WEIGHTS,
            remedy="Is it the base that it was trained on?",
        )
    with torch.no_grad():
        found.table.copy_(values)
    return found


def _in_place(model: Loaded, prompted: _Prompted) -> AtWork:
    """A context inside of which the model is the one with the prompt, on whichever device it is."""

    @contextmanager
    def at_work() -> Iterator[None]:
        name, alone = model.main_name, model.main
        model.components[name] = prompted.to(model.device)
        try:
            yield
        finally:
            model.components[name] = alone

    return at_work


def _check_readable(prompt: SoftPrompt, models: BothModels) -> None:
    for model in (models.old, models.new):
        if not writes(model):
            raise InputError("is no language model that writes: soft prompts of others aren't refined", file=model.path)
    if prompt.config.get("prefix_projection"):
        raise InputError("goes through a projection, which isn't stored in its file", file=prompt.path)


def _refined(prompt: SoftPrompt, values: Tensor, report: RefineReport, old: Base, new: Base) -> SoftPrompt:
    entry = {**refine_entry(old, new), "refined": lineage_entry(report)}
    metadata = with_port(Adapter({}, "peft", metadata={**prompt.metadata, "format": "pt"}, path=prompt.path), entry)
    known = ("task_type", "num_virtual_tokens", "revision")
    config = {
        **{name: prompt.config[name] for name in known if name in prompt.config},
        "peft_type": PREFIX if prompt.is_prefix else "PROMPT_TUNING",
        "base_model_name_or_path": str(new.path.name),
        "inference_mode": True,
    }
    return SoftPrompt(prompt.path, config, values.to(prompt.values.dtype), metadata)
