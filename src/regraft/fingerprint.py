"""The fingerprint of a base model, version 1: what architecture it is, and which weights.

A base is a set of components, each a set of named tensors: those that adapters change, by diffusers' names (``unet``,
``transformer``, ``transformer_2``, ``text_encoder``, ``text_encoder_2``, ``text_encoder_3``, ``prior``), or ``model``
for a model alone. Every component has a fingerprint of its own, since an adapter belongs to the components that it
changes: a tool that decides whether an adapter fits SHOULD compare these, and no others. The words MUST, SHOULD and
MAY are those of RFC 2119; every hash is SHA-256, every number little-endian.

Tensors
    1. Names MUST be canonical: those of the model's class in diffusers or transformers, whatever the file calls them;
       a leading ``text_model.`` MUST be left out, unless another tensor has the shorter name. Fused weights MUST be
       taken apart, transposed ones turned, as the class has them.
    2. Tensors of integer, boolean or complex dtype MUST be left out (they are buffers), unless they are the stored
       form of quantised floating-point values: then the values count.
    3. The shape MUST be written as decimal sizes joined by ``x`` (``320x4x3x3``, empty for a scalar); of more than two
       sizes, those from the third on MUST be left out where their product is 1 (a 1 × 1 convolution is a linear map).
    4. A tensor's *line* is its name, a tab, its shape, a newline, in UTF-8. Tensors are in the order of their names'
       UTF-8 bytes. Elements are in C order.

Structure
    5. ``structure`` is the hash of all lines. It MUST be equal for all versions of one architecture in any dtype.

Sample
    6. A tensor of N elements has the sample size n = 32 where its shape has two sizes or more, else 8. If N ≤ n, the
       sample is all elements. Otherwise it is four runs of n / 4 elements; run j (0 … 3) begins at element
       ``((2 j + 1) · 2654435769 mod 2^32) · (N − n/4 + 1) div 2^32``. Runs MAY overlap.
    7. A tensor's *kind* is its safetensors dtype (``F32``, ``F16``, ``BF16``, ``F8_E4M3``, …), or for quantised values
       the name of the quantisation in lower case (``q4_k``, ``nf4``, ``int8``, …).
    8. ``sample`` is the hash of, for every tensor, its line, its kind, a newline, and the bytes of its sample as
       stored (float32 for quantised values). Equal samples in equal kinds are the same weights, but for an edit that
       touches no sampled element.

Content
    9. ``content`` is the hash of, for every tensor, its line, its kind, a newline, and the 32-byte hash of its stored
       bytes. It takes a whole read: it MAY be null, and MUST be null where a tensor is quantised.

Sketch
    10. ``sketch`` is the sample's values: ``tensors`` (their number), ``kinds`` (the kinds, sorted) and ``data``, the
        base64 of one record per tensor: id (the first 6 bytes of the hash of its line), index into ``kinds`` (u8),
        number n of values (u8), exponent e (i16), N (u64), and n float16 values v · 2^−e, rounded to nearest, where
        2^e ≤ max |v| < 2^(e + 1) over the finite values, e = 0 if there is none but zeros. It MAY be null.
    11. Two sketches are compared tensor by tensor over the ids that both have. Two values a, b of kinds A, B agree if
        |a − b| ≤ 2 (u_A |a| + u_B |b| + t_A + t_B) + 2^−10 max(|a|, |b|) + 2^−23 m, with u the kind's unit roundoff,
        t half of its smallest step, m the tensor's largest sampled magnitude (the last two terms are the sketch's own
        rounding). A tensor agrees if all but one in eight of its values do. Where all tensors agree, the weights are
        the same up to rounding. A quantised kind agrees by its relative error instead (`likeness.QUANTISED`).
    12. Otherwise the drift ‖W2 − W1‖ / ‖W1‖ is estimated by the sampled differences, each tensor's mean square
        weighted by its N; the standard error SHOULD be given, by the spread of the runs.

Form
    13. In JSON: ``{"version": 1, "components": {name: {"structure": hex, "sample": hex, "content": hex or null,
        "sketch": object or null}}}``. Readers MUST ignore members that they don't know, and MUST refuse other versions.
    14. The short form is ``v1:`` + 24 hexadecimal digits + ``-`` + 8: the first digits of the hash of the lines
        ``component``, tab, ``sample``, newline over all components by name, and of the same with ``structure``.
    15. The brief sketch is one line of at most 4096 characters: ``s1:`` + component + ``:`` + its kinds joined by
        commas + ``:`` + the base64 of the records of k = min(T, 32) tensors, numbers ``(2 i + 1) · T div 2 k`` for
        i = 0 … k − 1 of the T tensors with 32 sampled values. The component is the one with the most elements (the
        first by name of several). It is compared as a sketch is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from regraft.errors import InputError, reading
from regraft.sketch import Sample, Sketch, is_quantised, kind_of, line_of, take_sample, tensor_id
from regraft.tensors import ByElements, Shape, TensorRef, raw

VERSION = 1
_TEXT_MODEL = "text_model."

Tensors = Mapping[str, TensorRef]


@dataclass(frozen=True)
class ComponentPrint:
    """The fingerprint of one component; see the module for what each hash is of.

    Attributes:
        structure: hexadecimal.
        sample: hexadecimal.
        content: hexadecimal; None where it was not asked for, or values are quantised.
        sketch: None where it was left out.
    """

    structure: str
    sample: str
    content: str | None = None
    sketch: Sketch | None = None

    def to_json(self, *, sketch: bool = True) -> dict[str, Any]:
        """A JSON object; without the sketch it is about 200 bytes."""
        values = self.sketch.to_json() if sketch and self.sketch is not None else None
        return {"structure": self.structure, "sample": self.sample, "content": self.content, "sketch": values}


@dataclass(frozen=True)
class Fingerprint:
    """Component → its fingerprint."""

    components: Mapping[str, ComponentPrint]

    @property
    def structure(self) -> str:
        """Hash of all components' structures, hexadecimal."""
        return _joined({name: component.structure for name, component in self.components.items()})

    def __str__(self) -> str:
        """The short form, which tells any two bases apart but says nothing of how near they are."""
        samples = _joined({name: component.sample for name, component in self.components.items()})
        return f"v{VERSION}:{samples[:24]}-{self.structure[:8]}"

    def brief(self) -> str | None:
        """The brief sketch, a line of text; None where the main component has no sketch."""
        sizes = {name: part.sketch.size for name, part in self.components.items() if part.sketch is not None}
        if not sizes:
            return None
        main = min(sizes, key=lambda name: (-sizes[name], name))
        sketch = self.components[main].sketch
        assert sketch is not None
        form = sketch.brief().to_json()
        return f"s1:{main}:{','.join(form['kinds'])}:{form['data']}"

    def to_json(self, *, sketch: bool = True) -> dict[str, Any]:
        """The JSON form."""
        components = {name: part.to_json(sketch=sketch) for name, part in sorted(self.components.items())}
        return {"version": VERSION, "components": components}

    @classmethod
    def from_json(cls, data: Any, file: str | Path | None = None) -> Fingerprint:
        """Read the JSON form.

        Raises:
            InputError: it is damaged, or of another version.
        """
        try:
            version, parts = data["version"], dict(data["components"])
            if version == VERSION:
                return cls({str(name): _component(part) for name, part in parts.items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                "the fingerprint can't be read", file=file, remedy="It is damaged: make it anew."
            ) from None
        raise InputError(f"the fingerprint is of version {version!r}", file=file, remedy="Update regraft.")


def parse_brief(text: str) -> tuple[str, Sketch]:
    """The component and the sketch out of a brief sketch.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    version, component, kinds, data = text.split(":", 3)
    if version != "s1":
        raise ValueError(f"version {version!r} is not known")
    return component, Sketch.unpack(kinds.split(","), data)


def _component(part: Mapping[str, Any]) -> ComponentPrint:
    structure, sample, content, sketch = part["structure"], part["sample"], part.get("content"), part.get("sketch")
    if not _is_hash(structure) or not _is_hash(sample) or not (content is None or _is_hash(content)):
        raise ValueError("not a hash")
    return ComponentPrint(structure, sample, content, Sketch.from_json(sketch) if sketch is not None else None)


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _joined(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name}\t{text}\n" for name, text in sorted(hashes.items())).encode()).hexdigest()


def canonical(tensors: Tensors) -> list[tuple[str, TensorRef]]:
    """The tensors that count, by canonical name, in order."""

    def name_of(name: str) -> str:
        short = name.removeprefix(_TEXT_MODEL)
        return name if short in tensors else short

    counted = [(name_of(name), ref) for name, ref in tensors.items() if _counts(ref)]
    return sorted(counted, key=lambda pair: pair[0].encode())


def _counts(ref: TensorRef) -> bool:
    return ref.dtype.is_floating_point or is_quantised(kind_of(ref))


def structure_of(tensors: Tensors) -> str:
    """The structure's hash of one component; no tensor is read."""
    return _structure([(name, ref.shape) for name, ref in canonical(tensors)])


def _structure(named: list[tuple[str, Shape]]) -> str:
    return hashlib.sha256("".join(line_of(name, shape) for name, shape in named).encode()).hexdigest()


def fingerprint_component(tensors: Tensors, *, content: bool = False, file: str | Path = "") -> ComponentPrint:
    """The fingerprint of one component, one tensor at a time.

    Args:
        tensors: canonical name → tensor.
        content: also read everything for the exact hash.
        file: for messages.

    Raises:
        InputError: the file is damaged.
    """
    named = canonical(tensors)
    samples: dict[bytes, Sample] = {}
    sampled = hashlib.sha256()
    for name, ref in named:
        with reading(file, name):
            sample, kind = take_sample(ref), kind_of(ref)
        if is_quantised(kind):
            sample = sample.float()
        sampled.update(f"{line_of(name, ref.shape)}{kind}\n".encode() + _bytes(sample))
        samples[tensor_id(name, ref.shape)] = Sample(kind, prod(ref.shape), sample.float())
    exact = _content(named, file) if content else None
    structure = _structure([(name, ref.shape) for name, ref in named])
    return ComponentPrint(structure, sampled.hexdigest(), exact, Sketch(samples))


def _content(named: list[tuple[str, TensorRef]], file: str | Path) -> str | None:
    if any(is_quantised(kind_of(ref)) for _, ref in named):
        return None
    digest = hashlib.sha256()
    for name, ref in named:
        own = hashlib.sha256()
        with reading(file, name):
            for block in _blocks(ref):
                own.update(_bytes(block))
        digest.update(f"{line_of(name, ref.shape)}{kind_of(ref)}\n".encode() + own.digest())
    return digest.hexdigest()


_BLOCK_BYTES = 1 << 24


def _blocks(ref: TensorRef) -> Iterator[Tensor]:
    """The tensor's elements, in pieces where it can be read so."""
    size, length = prod(ref.shape), _BLOCK_BYTES // ref.dtype.itemsize
    if size <= length or not isinstance(ref, ByElements):
        yield ref.load()
        return
    for start in range(0, size, length):
        yield ref.elements([range(start, min(start + length, size))])


def _bytes(tensor: Tensor) -> memoryview:
    return raw(tensor.contiguous())
