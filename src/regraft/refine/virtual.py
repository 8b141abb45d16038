"""Soft prompts and prefixes: no weight is changed, so nothing is ported; an embedding map starts them.

PEFT's prompt tuning, P-tuning and prefix tuning. Virtual tokens lie in the space of the old base's embeddings. The
tokens that both bases have tell where that space went: P_new = P_old W, with W the least-squares map of their
embeddings, E_old W ≈ E_new. A prefix holds keys and values, for which there is no such map: one that fits is taken as
it is, and any other begins at zero.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regraft._version import __version__
from regraft.adapter import Adapter
from regraft.base import Base
from regraft.errors import InputError, UsageError, first_line, reading, understanding
from regraft.formats import Written
from regraft.lineage import with_port
from regraft.memory import peak_mb
from regraft.methods._embeddings import common_embeddings, width_map
from regraft.migration import summarise
from regraft.output import ADAPTER_CONFIG, write_whole
from regraft.probes.batches import TextBatch, make_batches, other_tokens, writes
from regraft.refine.aims import aims_by
from regraft.refine.loop import Course, Heard, train
from regraft.refine.settings import PULLS, RefineSettings
from regraft.refine.starting import refine_entry
from regraft.refine.student import Student
from regraft.refine.told import lineage_entry, look_row, summary_of
from regraft.report.refine_schema import Refined, RefineReport
from regraft.runtime.both import BothModels
from regraft.runtime.load import Loaded, library, quiet_libraries

#: PEFT's kinds; a P-tuning's file holds what its encoder gave, and is the soft prompt that prompt tuning has.
PREFIX = "PREFIX_TUNING"
KINDS = ("PROMPT_TUNING", "P_TUNING", PREFIX)
WEIGHTS, _KEY = "adapter_model.safetensors", "prompt_embeddings"


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
) -> SoftPromptResult:
    """Distil *old base + soft prompt* into *new base + soft prompt*.

    Args:
        prompt: as it was trained on ``old``.
        old: the old base.
        new: the base that it is to run on.
        settings: objective, steps, budget and the rest; what speaks of layers has no meaning here.
        state: a file that the state of the training is kept in, and gone on from.
        heard: called after each look at held-out inputs.

    Raises:
        UsageError: ``settings`` ask for a rank, targets, hidden states or a quantised base.
        InputError: the bases are no language models with the same tokens, the prompt does not fit the old one, or it
            has no effect.
    """
    if settings.rank is not None or settings.targets:
        raise UsageError("a soft prompt has no rank and no targets", remedy="Leave --rank and --targets out.")
    if settings.hidden > 0 or settings.quantize != "none":
        raise UsageError(
            "a soft prompt is learnt from outputs of the whole base", remedy="Leave --hidden and --quantize out."
        )
    began = perf_counter()
    with quiet_libraries():
        models = BothModels.load(old, new, settings.config, settings.device)
        _check_readable(prompt, models)
        teacher = _with_prompt(models.old, prompt, prompt.values)
        start, how = start_of(prompt, old, new, models.new)
        student = _with_prompt(models.new, prompt, start)
        batches = make_batches(
            BothModels(teacher, models.new), None, settings.n_inputs, settings.seed, settings.prompts
        )
        chosen = "output" if settings.objective == "auto" else settings.objective
        # Its own texts are read with the prompt, too: without it the new base is as it was, with nothing to retain.
        texts = [replace(b, made_by="given") for b in (*batches.fit, *batches.held_out) if isinstance(b, TextBatch)]
        aims = aims_by(models, teacher, nullcontext, prompt.path, texts, PULLS.get(chosen, 1.0))
        fit, held = aims[: len(batches.fit)], aims[len(batches.fit) :]
        trained = Student(student, {}, {}, {})
        course = train(trained, fit, held, replace(settings, retention=0.0), heard=heard, state=state)
        values = _table(student).detach().cpu().clone() if course.best_look.step else start
    report = _report(prompt, old, new, course, how, (chosen, batches.made, sum(len(aim.batch) for aim in fit)))
    report = report.model_copy(
        update={"trained": start.numel(), "seconds": perf_counter() - began, "peak_mb": peak_mb()}
    )
    return SoftPromptResult(_refined(prompt, values, report, old, new), report)


def start_of(prompt: SoftPrompt, old: Base, new: Base, model: Loaded) -> tuple[Tensor, str]:
    """Where the training begins, float32, and how it was made."""
    if prompt.is_prefix:
        width = _table(_prompted(model, prompt)).shape[1]
        if prompt.values.shape[1] == width:
            return prompt.values.float(), "copy"
        return torch.zeros(len(prompt.values), width), "zero"
    component = next(iter(old.components))
    shared = common_embeddings(old, new, component if component in new.components else next(iter(new.components)))
    if shared is None:
        raise InputError("shares no tokens with the old base, or has no table of embeddings", file=new.path)
    if shared[0].shape == shared[1].shape and torch.equal(*shared):
        return prompt.values.float(), "copy"
    return prompt.values.float() @ width_map(*shared), f"embedding map of {len(shared[0])} shared tokens"


class _Prompted(nn.Module):
    """A PEFT model that gives the logits of the text alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.peft = model
        self.config = model.get_base_model().config

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


def _prompted(model: Loaded, prompt: SoftPrompt) -> Loaded:
    with torch.random.fork_rng():
        made = _Prompted(library("peft").get_peft_model(model.main, _config_of(prompt)))
    return replace(model, components={model.main_name: made})


def _with_prompt(model: Loaded, prompt: SoftPrompt, values: Tensor) -> Loaded:
    """The model with virtual tokens of these values before every text.

    Raises:
        InputError: they are as wide as no token of it.
    """
    found = _prompted(model, prompt)
    table = _table(found)
    if table.shape != values.shape:
        raise InputError(
            f"holds vectors of {values.shape[1]} numbers, and those of {model.path.name} have {table.shape[1]}",
            file=prompt.path / WEIGHTS,
            remedy="Is it the base that it was trained on?",
        )
    with torch.no_grad():
        table.copy_(values)
    return found


def _table(model: Loaded) -> Tensor:
    weight: Tensor = model.main.peft.prompt_encoder["default"].embedding.weight
    return weight


def _check_readable(prompt: SoftPrompt, models: BothModels) -> None:
    if not writes(models.old):
        raise InputError(
            "is no language model that writes: soft prompts of others aren't refined", file=models.old.path
        )
    if other_tokens(models.old, models.new):
        raise InputError("splits text into other tokens than the old base", file=models.new.path)
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


def _report(
    prompt: SoftPrompt, old: Base, new: Base, course: Course, how: str, made: tuple[str, str, int]
) -> RefineReport:
    objective, inputs, count = made
    first, best = course.looks[0], course.best_look
    return RefineReport(
        regraft_version=__version__,
        input=str(prompt.path),
        outputs=[],
        start=how,
        objective=objective,
        objective_reason="both bases give comparable outputs on the same inputs",
        inputs=inputs.replace("its adapter", "its soft prompt"),
        n_inputs=count,
        steps=best.step,
        stopped=course.stopped,
        unkept=course.unkept,
        recovered=best.recovered,
        beside=[
            Refined(title="none", recovered=0.0),
            Refined(title=how, recovered=first.recovered),
            Refined(title="refined", recovered=best.recovered),
        ],
        looks=[look_row(look, look.seconds) for look in course.looks],
        summary=summary_of(how, course),
        trained=0,
        modules=1,
        source=summarise(old),
        target=summarise(new),
        seconds=0.0,
        peak_mb=0.0,
    )
