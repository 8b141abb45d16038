"""The writing half of `_grammar`: canonical updates → keys, with fused weights joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from regraft.adapter import Adapter, ModuleRef
from regraft.errors import OutputError
from regraft.families import CANONICAL, ORIGINAL, Family, flattened, get_family, recognise
from regraft.formats import Written
from regraft.formats._bundled_embeddings import bundled
from regraft.formats._common import alphas_of, chosen, component_for, contiguous, new_alpha, training_metadata
from regraft.formats._factors import Reshaped, cannot_hold
from regraft.formats._grammar import MAIN, Extra, Prefix, scaled_rows, turned
from regraft.formats._hashes import with_true_hashes
from regraft.formats._naming import Table, needs_text_model, tables
from regraft.formats._suffixes import PARAMETERS, SPELT, spelled, split_key
from regraft.tensors import TensorRef
from regraft.updates import Boft, Diff, Full, GLora, LoHa, LoKr, LowRank, Oft, Tucker, Update
from regraft.updates._kind import is_per_column
from regraft.updates.rows import Slice, empty, join_rows, take_rows


@dataclass(frozen=True)
class Spelling:
    """How a format spells what was not read from a file of its own.

    Attributes:
        format: its name.
        prefixes: of its components, the usual one of each first.
        schemes: of the main model's names, the first that its family has; else canonical.
        style: of the pair (`regraft.formats._suffixes.PAIRS`).
        magnitude: suffix of DoRA's magnitude.
        always_alpha: whether alpha is written where the scale is 1 too.
        homes: main component → its prefix, where it isn't the first.
        kinds: of update that the format has a place for.
        whole: whether a parameter's new value stands under its own name.
        tokens: whether embeddings of added tokens may be bundled into the file.
        norms: whether changes of norms have suffixes of their own, ``.w_norm`` and ``.b_norm``.
    """

    format: str
    prefixes: Sequence[Prefix]
    schemes: Sequence[str] = (ORIGINAL,)
    style: str = "lora_down"
    magnitude: str = ".dora_scale"
    always_alpha: bool = True
    homes: Mapping[str, str] = field(default_factory=dict)
    kinds: frozenset[str] = frozenset({"lora", "dora"})
    whole: bool = False
    tokens: bool = True
    norms: bool = False


#: The remedy for a rotation that is to act at a part of its strength.
AT_ONE = "Keep its strength at 1, and give it where the adapter is loaded."

#: Components that the prefix of the main model stands for.
MAIN_COMPONENTS = ("unet", "transformer", "transformer_2", "prior")


@dataclass
class _Slot:
    """One name of the file and the updates that meet there, by their place in a fused weight."""

    stem: str
    parameter: str
    table: Table | None
    parts: dict[int, Update] = field(default_factory=dict)
    refs: list[ModuleRef] = field(default_factory=list)


def tensors_of(adapter: Adapter, spelling: Spelling, *, extra: Extra | None = None) -> dict[str, TensorRef]:
    """Key → tensor of an adapter in a format.

    Raises:
        OutputError: the format has no place for a part of it.
    """
    writer = _Writer(adapter, spelling, extra)
    if adapter.tokens and not spelling.tokens:
        token = str(next(iter(adapter.tokens)))
        raise cannot_hold(spelling.format, "embeddings of added tokens", token)
    slots: dict[tuple[str, str], _Slot] = {}
    for ref, update in adapter.updates.items():
        writer.check(ref, update)
        writer.place(ref, update, slots)
    keys = bundled(adapter.tokens, writer.layout.get("tokens", {}))
    stems: dict[str, tuple[ModuleRef, Update]] = {}
    for slot in slots.values():
        update = slot.parts[0] if slot.table is None else joined(slot)
        if isinstance(update, Diff | Full):
            new = {writer.parameter_key(slot, update): update.value}
        else:
            new = writer.keys(slot, update)
            stems[slot.stem] = slot.refs[0], update
        if keys.keys() & new.keys():
            # Underscored names of two modules can be one.
            what = f"a second module that is written as {slot.stem}"
            raise cannot_hold(spelling.format, what, slot.refs[0])
        keys |= new
    return keys | writer.alphas(stems)


def joined(slot: _Slot) -> Update:
    """The update of the whole weight that a slot's parts are the rows of."""
    assert slot.table is not None
    pieces = slot.table.pieces[slot.parameter]
    first = next(iter(slot.parts.values()))
    if pieces[0].transposed:
        turned_ = turned(first)
        if turned_ is None:
            raise OutputError(
                f"a {first.kind} update can't be written for the transposed weight", key=str(slot.refs[0])
            )
        return turned_
    if pieces[0].rows is None:
        return first
    index = next(iter(slot.parts))
    total = sum(end - start for piece in pieces for start, end in piece.rows or ())
    mine = sum(end - start for start, end in pieces[index].rows or ())
    actual, rest = divmod(total * first.shape[0], mine)
    ranges = None if rest else [scaled_rows(piece.rows or (), total, actual) for piece in pieces]
    if ranges is None or any(part is None for part in ranges):
        raise OutputError("the parts of a fused weight have other sizes than in its family", key=str(slot.refs[0]))
    known = [part for part in ranges if part is not None]
    sizes = [sum(end - start for start, end in part) for part in known]
    parts = [slot.parts.get(i) or _nothing(first, sizes[i]) for i in range(len(pieces))]
    return take_rows(join_rows(parts), _inverse([pair for part in known for pair in part]))


def _nothing(like: Update, rows: int) -> Update:
    """The update of a part that an adapter leaves alone."""
    if isinstance(like, Diff):
        raise OutputError("a fused weight's change needs all of its parts", key=like.key)
    dtype = like.up.dtype if isinstance(like, LowRank) else torch.float32
    return empty((rows, *like.shape[1:]), dtype)


def _inverse(order: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where the original rows stand in the concatenation of ``order``'s ranges, in the original's order."""
    places, at = {}, 0
    for start, end in order:
        places[start] = (at, at + end - start)
        at += end - start
    return [places[start] for start in sorted(places)]


class _Writer:
    """Spells one adapter's keys, as its own file had them or as the format's tool does."""

    def __init__(self, adapter: Adapter, spelling: Spelling, extra: Extra | None) -> None:
        self.adapter, self.spelling, self.extra = adapter, spelling, extra
        self.own = adapter.format == spelling.format
        self.layout: Mapping[str, Any] = adapter.layout if self.own else {}
        mains = [name for name in adapter.components() if name in MAIN_COMPONENTS]
        if len(mains) > 1:
            remedy = "Write each into a file of its own: their keys would be the same."
            raise cannot_hold(spelling.format, f"more than one main model ({', '.join(mains)})", mains[1], remedy)
        known = get_family(adapter.family)
        self.tables: Mapping[str, str] = self.layout.get("tables") or self._tables(known)
        # kohya's grammar has diffusers' names where the family's own trainers have, and for U-Nets of no known family.
        trained = known.data.get("kohya") if known is not None and known.components else None
        canonical = trained == "diffusers" or (trained is None and "unet" in mains)
        self.schemes = (CANONICAL,) if spelling.prefixes[0].flat and canonical else spelling.schemes
        self.prefixes = self._prefixes(known.data.get("prefixes", {}) if known else {})
        self.known: dict[str, dict[str, Table]] = {}
        self.by_text = {prefix.text: prefix for prefix in spelling.prefixes}

    def _tables(self, family: Family | None) -> dict[str, str]:
        """Component → the families' table that names its modules."""
        if family is not None and family.components:
            return dict(family.components)
        shapes = {
            component: {path: u.shape for path, u in updates.items() if not u.by_parameter}
            for component, updates in self.adapter.components().items()
        }
        found = recognise(shapes, schemes=(CANONICAL,))
        return {match.component: match.table for match in found.matches.values() if match.table} if found else {}

    def _prefixes(self, preferred: Mapping[str, str]) -> dict[str, Prefix]:
        """Component → prefix for what no file has spelt before."""
        found: dict[str, Prefix] = {}
        for prefix in self.spelling.prefixes:
            found.setdefault(prefix.component, prefix)
        for prefix in self.spelling.prefixes:
            for component, text in preferred.items():
                if prefix.text[:-1] == text:
                    found[component] = prefix
            for component, text in self.spelling.homes.items():
                if prefix.text == text:
                    found[component] = prefix
        return found

    def prefix(self, ref: ModuleRef) -> Prefix:
        component = component_for(self.adapter, ref.component, self.spelling.format)
        spelt = self.layout.get("prefix", {})
        if component in spelt and (text := chosen(spelt, component, ref.path, "")) in self.by_text:
            return self.by_text[text]
        role = MAIN if component in MAIN_COMPONENTS else component
        second_t5 = role == "text_encoder_2" and ref.path.startswith(("encoder.block.", "shared"))
        if second_t5 and "text_encoder_3" in self.prefixes:
            # T5 stands second in Flux' pipeline, and has the prefix of the third encoder.
            return self.prefixes["text_encoder_3"]
        if component not in self.prefixes and role not in self.prefixes:
            have = sorted({prefix.component for prefix in self.spelling.prefixes} - {MAIN})
            remedy = f"They hold {', '.join(['a main model', *have])} alone."
            raise cannot_hold(self.spelling.format, f"the component {component}", ref, remedy)
        return self.prefixes.get(component) or self.prefixes[role]

    def check(self, ref: ModuleRef, update: Update) -> None:
        """Raise an `OutputError` where the format has no place for this kind."""
        if isinstance(update, LowRank) and update.orientation != "weight":
            raise cannot_hold(self.spelling.format, "an update of an embedding or a Conv1D layer", ref)
        if update.kind not in self.spelling.kinds and not (self.own and update.kind in SPELT):
            raise cannot_hold(self.spelling.format, NAMES.get(update.kind, f"a {update.kind} update"), ref)
        biased = isinstance(update, LowRank) and update.bias is not None
        if biased and self.spelling.style != "lora_A" and not self.own:
            raise cannot_hold(self.spelling.format, "a bias of the factor B (lora_bias)", ref)
        turn = update.of if isinstance(update, Slice) else update
        if isinstance(turn, Oft | Boft) and turn.strength != 1.0:
            raise cannot_hold(self.spelling.format, f"{turn.kind} updates at a strength other than 1", ref, AT_ONE)

    def place(self, ref: ModuleRef, update: Update, slots: dict[tuple[str, str], _Slot]) -> None:
        """Put the update into the slot of the name that it is written under."""
        prefix = self.prefix(ref)
        component = component_for(self.adapter, ref.component, self.spelling.format)
        parameter = ref.path if update.by_parameter else f"{ref.path}.weight"
        table, name, index = self._named(ref, component, parameter)
        last = name.rpartition(".")[2]
        module = name.rpartition(".")[0] if last in ("weight", "bias") else name
        key = (prefix.text + name, "diff" if update.by_parameter else "")
        stem = prefix.text + (flattened(module) if prefix.flat else module)
        slot = slots.setdefault(key, _Slot(stem, name, table))
        slot.parts[index] = update
        slot.refs.append(ref)

    def _named(self, ref: ModuleRef, component: str, parameter: str) -> tuple[Table | None, str, int]:
        """The table that names a parameter, its name there, and its place in it."""
        text = component.startswith("text_encoder")
        if component not in self.known:
            self.known[component] = self._known(component)
        schemes = self.known[component]
        wanted = (CANONICAL,) if text else self.schemes
        default = next((scheme for scheme in wanted if scheme in schemes), CANONICAL)
        scheme = chosen(self.layout.get("scheme", {}), component, ref.path, default)
        table = schemes.get(scheme)
        if text and not self.own and needs_text_model(parameter):
            parameter = f"text_model.{parameter}"
        if table is not None and parameter in table.inverse:
            name, index = table.inverse[parameter]
            return table, name, index
        if scheme != CANONICAL and table is not None:
            raise cannot_hold(self.spelling.format, "a module that its naming has no name for", ref)
        return None, parameter, 0

    def _known(self, component: str) -> dict[str, Table]:
        """Every scheme of a component, the format's own ones too."""
        schemes = dict(tables(self.tables[component])) if component in self.tables else {}
        if self.extra is not None and not component.startswith("text_encoder"):
            schemes |= self.extra(schemes)
        return schemes

    def keys(self, slot: _Slot, update: Update) -> dict[str, TensorRef]:
        """Keys of an update that is kept by module, without alpha."""
        if isinstance(update, Slice):
            raise OutputError(
                "is a part of an update that can't be cut, and the rest is missing", key=str(slot.refs[0])
            )
        ref = slot.refs[0]
        style = self._choice("style", ref, self.spelling.style)
        magnitude = self._choice("magnitude", ref, self.spelling.magnitude)
        if update.magnitude is not None:
            assert isinstance(update, LowRank | Tucker | LoHa | LoKr)
            update = replace(update, magnitude=self._magnitude(update))
        return {slot.stem + suffix: tensor for suffix, tensor in spelled(update, style, magnitude).items()}

    def _choice(self, name: str, ref: ModuleRef, default: str) -> str:
        component = component_for(self.adapter, ref.component, self.spelling.format)
        return chosen(self.layout.get(name, {}), component, ref.path, default)

    def _magnitude(self, update: Update) -> TensorRef:
        ref = update.magnitude
        assert ref is not None
        if self.own and isinstance(ref, Reshaped):
            return ref.of
        if is_per_column(ref.shape) or self.own:
            return ref
        return Reshaped(ref, (update.shape[0], *[1] * (len(update.shape) - 1)))

    def parameter_key(self, slot: _Slot, update: Update) -> str:
        """Key of a parameter's change or new value."""
        assert isinstance(update, Diff | Full)
        split = split_key(update.key)
        suffix = split[1] if split and split[1] in PARAMETERS else ""
        last = slot.parameter.rpartition(".")[2]
        own_name = self.prefix(slot.refs[0]).text + slot.parameter
        if self.own:
            return slot.stem + suffix if suffix else own_name
        if isinstance(update, Diff):
            if suffix in (".w_norm", ".b_norm") or (self.spelling.norms and self._of_norm(slot.refs[0], update)):
                return slot.stem + (".b_norm" if last == "bias" else ".w_norm")
            return slot.stem + (".diff_b" if last == "bias" else ".diff")
        if self.spelling.whole:
            return own_name
        if last == "bias":
            raise cannot_hold(self.spelling.format, "a bias stored whole", slot.refs[0])
        return f"{slot.stem}.set_weight"

    def _of_norm(self, ref: ModuleRef, update: Diff) -> bool:
        """Whether it changes a norm's weight, or its bias beside that; a bias alone may be of any layer."""
        path, _, last = ref.path.rpartition(".")
        weight = update if last == "weight" else self.adapter.updates.get(ModuleRef(ref.component, f"{path}.weight"))
        return isinstance(weight, Diff) and len(weight.shape) == 1

    def alphas(self, stems: Mapping[str, tuple[ModuleRef, Update]]) -> dict[str, TensorRef]:
        """Alpha of every update that needs or had one."""
        constraints = {stem: u.alpha for stem, (_, u) in stems.items() if isinstance(u, Oft | Boft) and u.alpha}
        scaled = {stem: u for stem, (_, u) in stems.items() if isinstance(u, LowRank | Tucker | LoHa | LoKr | GLora)}
        found = alphas_of({stem: u for stem, u in scaled.items() if u.rank})
        for stem, update in scaled.items():
            if stem in found:
                continue
            if update.alpha is not None:
                found[stem] = update.alpha
            elif (update.rank and update.scale != 1.0) or (not self.own and self.spelling.always_alpha):
                found[stem] = new_alpha(update)
        return {f"{stem}.alpha": ref for stem, ref in (found | constraints).items()}


#: Kind → what a message calls it.
NAMES = {
    "full": "a parameter stored whole",
    "diff": "the change of a whole parameter",
    "loha": "a LoHa update",
    "lokr": "a LoKr update",
    "tucker": "a Tucker core (LoCon)",
    "ia3": "an IA3 update",
    "oft": "an OFT update",
    "boft": "a BOFT update",
    "glora": "a GLoRA update",
    "svdiff": "a spectral shift",
    "lorax": "a LoRA-X update",
    "foura": "a FouRA update",
    "vera": "a VeRA update",
    "fourierft": "a FourierFT update",
}


def write(adapter: Adapter, spelling: Spelling, stated: Mapping[str, str], *, extra: Extra | None = None) -> Written:
    """The file of an adapter in a format.

    Args:
        adapter: to write.
        spelling: of the format.
        stated: metadata that the format's tool looks for, beside what the old file told of its training.
        extra: the format's own naming schemes.

    Raises:
        OutputError: the format has no place for a part of the adapter.
    """
    loaded = contiguous(tensors_of(adapter, spelling, extra=extra))
    own = adapter.format == spelling.format
    metadata = dict(adapter.metadata) if own else {"format": "pt"} | training_metadata(adapter.metadata) | dict(stated)
    return Written(loaded, with_true_hashes(metadata, loaded))
