"""Embeddings of added tokens by the text encoder's short name, alone or bundled into a LoRA file.

Facts:

- Short names (OneTrainer, kohya, ComfyUI): ``clip_l``, ``clip_g``, ``t5`` / ``t5xxl``, ``llama``, ``qwen``, …; with
  ``_out`` (OneTrainer) the vector replaces what the encoder gives out. A tensor is (vectors, width) or (width,).
- Bundled (OneTrainer's LoRAs; read by A1111 and ComfyUI): ``bundle_emb.<token>.<short name>``, or
  ``bundle_emb.<token>.string_to_param.*`` where there is one encoder. The token may hold dots, the short name none.
- Which component of the pipeline a short name means depends on what stands beside it: T5 is the second encoder of
  Flux, and the third of SD 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from regraft.adapter import MODEL, TokenRef
from regraft.errors import InputError, OutputError
from regraft.formats._common import check_float
from regraft.tensors import TensorRef

PREFIX = "bundle_emb."
#: Names of an embedding whose file says nothing of the encoder.
UNNAMED = ("emb_params", "string_to_param.*")
_T5 = ("t5", "t5xxl")
SHORT_NAMES = ("clip_l", "clip_g", *_T5, "llama", "qwen", "gemma", "mistral")
_OUT = "_out"
# Width → (component, short name) of the encoders that tokens are trained for.
_BY_WIDTH = {
    768: ("text_encoder", "clip_l"),
    1024: ("text_encoder", "clip_l"),
    1280: ("text_encoder_2", "clip_g"),
    4096: ("text_encoder_2", "t5"),
}

#: Token → the key that its file gives it.
TokenKeys = Mapping[TokenRef, str]


def is_short_name(name: str) -> bool:
    """Whether ``name`` is that of a text encoder, or of its output."""
    return name.removesuffix(_OUT) in (*SHORT_NAMES, UNNAMED[0]) or name == UNNAMED[1]


def encoder_of(name: str, beside: Iterable[str], width: int) -> tuple[str, bool]:
    """The component of a short name, and whether the vector is the encoder's output.

    Args:
        name: ``clip_l``, ``t5_out``, ``emb_params``, …
        beside: every short name of the file.
        width: of the vectors.
    """
    here = {other.removesuffix(_OUT) for other in beside}
    output = name.endswith(_OUT)
    name = name.removesuffix(_OUT)
    if name in UNNAMED:
        return component_of_width(width), output
    number = 1
    if name == "clip_g":
        number = 2
    elif name in _T5:
        number = 3 if "clip_g" in here else 2 if "clip_l" in here else 1
    elif name == "llama":
        number = 4 if "clip_g" in here else 1
    elif name == "clip_l" and "llama" in here and "clip_g" not in here:
        number = 2
    return "text_encoder" if number == 1 else f"text_encoder_{number}", output


def component_of_width(width: int) -> str:
    """The text encoder that vectors of this width are for, where nothing else tells it."""
    return _BY_WIDTH.get(width, ("text_encoder", ""))[0]


def short_name(token: TokenRef, width: int) -> str:
    """The short name to write a token's encoder by.

    Raises:
        OutputError: the width doesn't tell it.
    """
    if width not in _BY_WIDTH:
        raise OutputError(
            f"no text encoder of width {width} has a short name (clip_l, clip_g, t5)",
            key=str(token),
            remedy="Write textual-inversion, which names the token alone.",
        )
    return _BY_WIDTH[width][1] + (_OUT if token.output else "")


def check_embedding(ref: TensorRef, file: Path, key: str) -> None:
    """Make sure that a tensor can be one token's vectors.

    Raises:
        InputError: it is no float, or of a shape other than (vectors, width) or (width,).
    """
    check_float(ref, file, key)
    if len(ref.shape) not in (1, 2) or 0 in ref.shape:
        what = f"an embedding must be (vectors, width), but has shape {list(ref.shape)}"
        raise InputError(what, file=file, key=key, remedy="The file is damaged: get another one.")


def read_bundled(tensors: Mapping[str, TensorRef], file: Path) -> tuple[dict[TokenRef, TensorRef], TokenKeys]:
    """The tokens bundled into a LoRA file, and the keys that they have there.

    Raises:
        InputError: one is no embedding, or is there twice.
    """
    found = {}
    for key in tensors:
        token, name = split_bundled(key)
        if token:
            found[key] = (token, name)
    beside = {name for _, name in found.values()}
    tokens: dict[TokenRef, TensorRef] = {}
    keys: dict[TokenRef, str] = {}
    for key, (token, name) in found.items():
        check_embedding(tensors[key], file, key)
        component, output = encoder_of(name, beside, tensors[key].shape[-1])
        ref = TokenRef(component, token, output)
        if ref in tokens:
            raise InputError(f"is a second embedding of {ref}, beside {keys[ref]}", file=file, key=key)
        tokens[ref], keys[ref] = tensors[key], key
    return tokens, keys


def split_bundled(key: str) -> tuple[str, str]:
    """Token and short name of a bundled key; two empty strings where it is none.

    >>> split_bundled("bundle_emb.<v1.0>.clip_l")
    ('<v1.0>', 'clip_l')
    """
    if not key.startswith(PREFIX):
        return "", ""
    rest = key.removeprefix(PREFIX)
    if rest.endswith(f".{UNNAMED[1]}"):
        return rest.removesuffix(f".{UNNAMED[1]}"), UNNAMED[1]
    token, _, name = rest.rpartition(".")
    return (token, name) if is_short_name(name) else ("", "")


def bundled(tokens: Mapping[TokenRef, TensorRef], keys: TokenKeys) -> dict[str, TensorRef]:
    """The keys by which tokens are bundled into a LoRA file.

    Args:
        tokens: of the adapter.
        keys: those of the file that it was read from; empty where that was another format.

    Raises:
        OutputError: a token's encoder has no short name.
    """
    return {
        keys.get(token) or f"{PREFIX}{token.token}.{short_name(token, ref.shape[-1])}": ref
        for token, ref in tokens.items()
    }


def of_one_encoder(tokens: Iterable[TokenRef]) -> bool:
    """Whether one text encoder alone is meant."""
    return len({token.component for token in tokens if token.component != MODEL}) <= 1
