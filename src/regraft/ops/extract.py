"""An adapter out of two checkpoints: what training changed, each weight's change as a LoRA.

ΔW = W_tuned − W_base, its truncated SVD (Eckart–Young) as factors; one parameter of either is in memory at a time.
Norms, biases and other parameters without a matrix are stored as their change (``diff``) where the format holds that,
in PEFT's format as their value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regraft._version import __version__
from regraft.adapter import MODEL, Adapter, ModuleRef
from regraft.base import Base, open_base
from regraft.errors import InputError, OutputError, Refused, UsageError
from regraft.families import family_of_base
from regraft.formats import get_format
from regraft.formats._peft_config import MINIMAL
from regraft.formats.peft import PREFIX
from regraft.names import resolve_names
from regraft.ops._common import Ticker, cast, factored, no_ticker
from regraft.ops._writing import write_checked
from regraft.ops.held import Held
from regraft.orientation import EMBEDDING, orientation_in
from regraft.output import check_writable
from regraft.pairing import find_component
from regraft.plan import Selection
from regraft.report.ops_schema import ExtractedModule, ExtractReport
from regraft.tensors import InMemory, TensorRef, check_finite
from regraft.updates import Diff, Full, Update

# Of a base's components, what no adapter file has a place for.
_NEVER = ("vae", "safety_checker", "image_encoder", "feature_extractor")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|output_projection)\.weight$")
_TIED = "{} is the output layer too: tools change the embedding alone, so that the output layer stays the base's."


@dataclass(frozen=True)
class Settings:
    """What is extracted.

    Attributes:
        rank: the most that a LoRA may have.
        energy: the share of each ‖ΔW‖² to keep, by as low a rank as does.
        selection: which modules.
        device: where the decompositions run.
    """

    rank: int | None = None
    energy: float | None = None
    selection: Selection = Selection()
    device: str = "cpu"


def parameters(
    base: Base, tuned: Base, selection: Selection
) -> Iterator[tuple[ModuleRef, TensorRef, TensorRef | None]]:
    """Every selected parameter of the base by its whole name, with the tuned one, or None where there is none.

    Raises:
        Refused: the checkpoints share less than half of their names.
    """
    for component, ours in base.components.items():
        if component in _NEVER or (selection.components and component not in selection.components):
            continue
        home = find_component(tuned, component, list(base.modules(component)))
        if home is None:
            if len(base.components) == 1:
                raise Refused(
                    "has hardly a module of the base's: these are two architectures",
                    file=tuned.path,
                    remedy="Give the checkpoint that was trained from this base.",
                )
            continue
        theirs = tuned.components[home]
        places = resolve_names(ours, set(theirs))
        for name, ref in ours.items():
            module = ModuleRef(component, name.removesuffix(".weight"))
            if selection.left_out(module) is None:
                place = places[name]
                yield ModuleRef(component, name), ref, theirs[place] if place is not None else None


class _Extractor:
    def __init__(self, base: Base, format: str, settings: Settings) -> None:
        self.base, self.format, self.settings = base, format, settings
        self.held = Held(Adapter({}, "", family=family_of_base(base)), get_format(format))
        self.updates: dict[ModuleRef, Update] = {}
        self.rows: list[ExtractedModule] = []
        self.unchanged = 0
        self.before = self.after = 0.0

    def extract(self, ref: ModuleRef, old: TensorRef, new: TensorRef | None) -> None:
        """Note what became of one parameter."""
        if new is None or new.shape != old.shape:
            why = "is not in the tuned checkpoint" if new is None else f"has shape {list(new.shape)} there"
            self._left_out(ref, None, f"{why}: {list(old.shape)} in the base" if new is not None else why)
            return
        if not old.dtype.is_floating_point:
            return
        change, size = self._change(ref, old, new)
        if change is None:
            self.unchanged += 1
            return
        relative = float(change.double().norm()) / size if size > 0 else None
        if ref.path.endswith(".weight") and change.dim() > 1:
            self._factors(ref, change, relative, new.dtype)
        else:
            self._whole(ref, change, relative, new)

    def _change(self, ref: ModuleRef, old: TensorRef, new: TensorRef) -> tuple[Tensor | None, float]:
        """W_tuned − W_base in float32, None where they are equal; and ‖W_base‖."""
        before, after = old.load(), new.load()
        check_finite(before, self.base.path, ref.path)
        check_finite(after, None, ref.path)
        # A cast alone is no training: compared in the narrower dtype.
        narrow = min((before.dtype, after.dtype), key=lambda dtype: torch.finfo(dtype).bits)
        if torch.equal(before.to(narrow), after.to(narrow)):
            return None, 0.0
        before = before.float()
        return after.float() - before, float(before.double().norm())

    def _factors(self, ref: ModuleRef, change: Tensor, relative: float | None, dtype: torch.dtype) -> None:
        module = ModuleRef(ref.component, ref.path.removesuffix(".weight"))
        factors, kept = factored(change.to(self.settings.device), energy=self.settings.energy, rank=self.settings.rank)
        factors = replace(factors, orientation=orientation_in(self.base, module, change.dim()))
        whole = Diff(InMemory(change.to(dtype)), ref.path)
        why = self.held.refusal({module: factors})
        if why is None:
            self.updates[module] = factors
            self._count(change, kept)
            self._row(ref, "lora", factors.rank, kept, relative, "")
        elif self.held.refusal({ref: whole}) is None:
            self.updates[ref] = whole
            self._count(change, 1.0)
            self._row(ref, "diff", None, 1.0, relative, "")
        else:
            self._left_out(ref, relative, why)

    def _count(self, change: Tensor, kept: float) -> None:
        squared = float(change.double().square().sum())
        self.before, self.after = self.before + squared, self.after + squared * kept

    def _whole(self, ref: ModuleRef, change: Tensor, relative: float | None, new: TensorRef) -> None:
        form: Update = Diff(InMemory(change.to(new.dtype)), ref.path)
        if self.format == "peft":
            form = Full(new, f"{PREFIX}{ref.path}")
        why = self.held.refusal({ref: form})
        if why is not None:
            self._left_out(ref, relative, why)
            return
        self.updates[ref] = form
        self._count(change, 1.0)
        self._row(ref, form.kind, None, 1.0, relative, "")

    def _left_out(self, ref: ModuleRef, relative: float | None, why: str) -> None:
        self._row(ref, None, None, None, relative, why)

    def _row(
        self, ref: ModuleRef, kind: str | None, rank: int | None, kept: float | None, change: float | None, why: str
    ) -> None:
        row = ExtractedModule(name=str(ref), kind=kind, rank=rank, energy_kept=kept, change=change, reason=why)
        self.rows.append(row)


def extract(
    base: Base, tuned: Base, format: str, settings: Settings = Settings(), *, tick: Ticker = no_ticker
) -> tuple[Adapter, ExtractReport]:
    """The adapter that turns ``base`` into ``tuned`` as nearly as the rank allows, and what became of each parameter.

    Args:
        base: the checkpoint before.
        tuned: the checkpoint after; of the same architecture, in any naming that regraft reads.
        format: of the adapter.
        settings: rank, energy, selection.
        tick: called before each parameter.

    Raises:
        InputError: nothing is selected, nothing differs, or a weight holds NaN or Inf.
        Refused: the two are different architectures.
    """
    work = _Extractor(base, format, settings)
    todo = list(parameters(base, tuned, settings.selection))
    for done, (ref, old, new) in enumerate(todo):
        tick(done, len(todo), str(ref))
        work.extract(ref, old, new)
    if not todo:
        raise InputError(
            "has none of the base's parameters that are selected",
            file=tuned.path,
            remedy="Check --base, --tuned, --include, --exclude and --components.",
        )
    if not work.rows:
        raise InputError(
            "is equal to the base in every selected parameter: there is nothing to extract",
            file=tuned.path,
            remedy="Check --base, --tuned, --include and --exclude.",
        )
    if not work.updates:
        first = work.rows[0]
        raise OutputError(f"nothing that changed can be held by {format}: {first.reason}", key=first.name)
    adapter = Adapter(work.updates, "", family=family_of_base(base), path=None)
    if format == "peft":
        adapter = _for_peft(adapter)
    left = [row for row in work.rows if row.kind is None]
    notes = [f"{len(left)} changed parameters are left out: see their reasons."] if left else []
    notes += [_TIED.format(ref) for ref in adapter.updates if _is_tied(base, ref)]
    report = ExtractReport(
        regraft_version=__version__,
        base=str(base.path),
        tuned=str(tuned.path),
        outputs=[],
        format=format,
        energy_kept=work.after / work.before if work.before > 0 else 1.0,
        unchanged=work.unchanged,
        modules=work.rows,
        notes=notes,
    )
    return adapter, report


def _is_tied(base: Base, ref: ModuleRef) -> bool:
    """Whether an embedding is the model's output layer too: a language model whose file has no other."""
    kinds = " ".join(base.configs.get(ref.component, {}).get("architectures") or ())
    names = base.components.get(ref.component, {})
    return (
        EMBEDDING.search(ref.path) is not None
        and ref.path.rpartition(".")[2] in ("embed_tokens", "wte", "shared", "word_embeddings", "embed_in")
        and re.search("LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM", kinds) is not None
        and not any(_HEAD.search(name) for name in names)
    )


def _for_peft(adapter: Adapter) -> Adapter:
    """The adapter with a config by which PEFT loads the parameters stored whole: as trained biases."""
    wholes = {ref for ref, update in adapter.updates.items() if isinstance(update, Full)}
    if not wholes:
        return adapter
    updates: dict[ModuleRef, Update] = {}
    for ref, update in adapter.updates.items():
        module, _, name = ref.path.rpartition(".")
        if ref in wholes and isinstance(update, Full) and ModuleRef(ref.component, module) in adapter.updates:
            update = replace(update, key=f"{PREFIX}{module}.base_layer.{name}")
        updates[ref] = update
    return replace(adapter, updates=updates, format="peft", config={**MINIMAL, "bias": "all"})


def extract_adapter(
    base: str | Path,
    tuned: str | Path,
    target: str | Path,
    settings: Settings = Settings(),
    *,
    format: str | None = None,
    save_dtype: torch.dtype | None = None,
    overwrite: bool = False,
    tick: Ticker = no_ticker,
) -> ExtractReport:
    """Write the adapter that turns one checkpoint into another.

    Args:
        base: the checkpoint before: file, shard index or folder.
        tuned: the checkpoint after.
        target: a ``.safetensors`` file, or a folder for PEFT.
        settings: rank, energy, selection.
        format: of the output; by default PEFT for one model alone, kohya for a pipeline.
        save_dtype: of the output's tensors; by default float32.
        overwrite: replace what is there.
        tick: called before each parameter.

    Raises:
        InputError: a checkpoint can't be read, nothing differs, or a weight holds NaN or Inf.
        OutputError: the format can't hold what changed, or the target can't be written.
        Refused: the two are different architectures.
        UsageError: neither rank nor energy is given, or one is out of range.
    """
    if settings.rank is None and settings.energy is None:
        raise UsageError("no size is asked for", remedy="Give --rank 32, --energy 0.99, or both.")
    if settings.rank is not None and settings.rank < 1:
        raise UsageError(f"--rank {settings.rank} is below 1", remedy="Give one such as 32.")
    if settings.energy is not None and not 0 < settings.energy <= 1:
        raise UsageError(f"--energy {settings.energy} is no share", remedy="Give one such as 0.99.")
    if format is not None:
        get_format(format)
    target = Path(target).expanduser()
    check_writable(target, overwrite=overwrite)
    old, new = open_base(base), open_base(tuned)
    into = format or ("peft" if set(old.components) == {MODEL} else "kohya")
    adapter, report = extract(old, new, into, settings, tick=tick)
    written, _ = write_checked(cast(adapter, save_dtype), target, into, overwrite=overwrite)
    return report.model_copy(update={"outputs": [str(file) for file in written]})
