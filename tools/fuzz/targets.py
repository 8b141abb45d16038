"""The readers, each with good inputs to begin from and the way to break them."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from tools.fuzz import mutate

from regraft.adapter import ModuleRef
from regraft.base import open_base
from regraft.errors import InputError, RegraftError, understanding
from regraft.formats import formats, load_adapter, open_adapter_file
from regraft.formats._common import check_values
from regraft.inspection import describe
from regraft.migration_file import load_migration
from regraft.migrations.maps import in_memory
from regraft.patterns import TooComplex, compiled, matches

# A memory file system where there is one: an input is written and read a thousand times a second.
PLACE = Path(tempfile.mkdtemp(prefix="regraft-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: as the command takes it.
        seeds: good inputs.
        read: hands an input to the reader; anything but a return or a `RegraftError` is a finding.
        mutate: a broken input out of a good one.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes], None]
    mutate: mutate.Mutator


def _written(name: str, data: bytes) -> Path:
    path = PLACE / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{UNET.replace('.', '_')}"


def _f(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def safetensors_seeds() -> list[bytes]:
    """One small file of each format and kind that is read out of safetensors."""
    up, down = _f(8, 2), _f(2, 8)
    peft = f"base_model.model.{UNET}"
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}, "unet.target_modules": ["to_q"]}
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tables: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
        ({f"{peft}.lora_A.weight": down, f"{peft}.lora_B.weight": up, f"{peft}.lora_magnitude_vector": _f(8)}, {}),
        ({"base_model.model.wte.lora_embedding_A": down, "base_model.model.wte.lora_embedding_B": up}, {}),
        ({f"{peft}.lora_A.weight": down, f"{peft}.lora_B.weight": up, "base_model.model.x.modules_to_save.y": up}, {}),
        (
            {f"unet.{UNET}.lora_A.weight": down, f"unet.{UNET}.lora_B.weight": up},
            {"lora_adapter_metadata": json.dumps(config)},
        ),
        ({f"unet.{UNET}.lora.down.weight": down, f"unet.{UNET}.lora.up.weight": up, f"unet.{UNET}.alpha": _f()}, {}),
        ({f"{text}.lora_linear_layer.down.weight": down, f"{text}.lora_linear_layer.up.weight": up}, {}),
        ({f"{UNET[:-5]}.processor.to_q_lora.{n}.weight": t for n, t in (("down", down), ("up", up))}, {}),
        (
            {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.alpha": _f()},
            {"ss_network_dim": "2", "ss_tag_frequency": '{"a": {"b": 1}}', "modelspec.architecture": "x"},
        ),
        ({f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up, f"{FLAT}.dora_scale": _f(8, 1)}, {}),
        (
            {
                f"{FLAT}.{n}": t
                for n, t in (("lora_down.weight", down), ("lora_up.weight", up), ("lora_mid.weight", _f(2, 2, 1, 1)))
            },
            {},
        ),
        ({f"{FLAT}.hada_w1_a": up, f"{FLAT}.hada_w1_b": down, f"{FLAT}.hada_w2_a": up, f"{FLAT}.hada_w2_b": down}, {}),
        ({f"{FLAT}.lokr_w1": _f(2, 2), f"{FLAT}.lokr_w2_a": _f(4, 2), f"{FLAT}.lokr_w2_b": _f(2, 4)}, {}),
        ({f"{FLAT}.oft_blocks": _f(2, 4, 4), f"{FLAT}.rescale": _f(8, 1), f"{FLAT}.alpha": _f()}, {}),
        ({f"{FLAT}.a1.weight": up, f"{FLAT}.a2.weight": down, f"{FLAT}.b1.weight": up, f"{FLAT}.b2.weight": down}, {}),
        ({f"{FLAT}.diff": _f(8, 8), f"{FLAT}.diff_b": _f(8)}, {}),
        ({f"{FLAT}.weight": _f(8), f"{FLAT}.on_input": torch.tensor(False)}, {}),
        ({f"diffusion_model.blocks.0.self_attn.q.{n}.weight": t for n, t in (("lora_A", down), ("lora_B", up))}, {}),
        ({f"transformer.single_blocks.0.linear1.{n}.weight": t for n, t in (("lora_A", down), ("lora_B", up))}, {}),
        (
            {
                "double_blocks.0.processor.qkv_lora1.down.weight": down,
                "double_blocks.0.processor.qkv_lora1.up.weight": up,
            },
            {},
        ),
        (
            {"unet:0:up": up, "unet:0:down": down, "<tok>": _f(8)},
            {"unet": '["CrossAttention", "Attention", "GEGLU"]', "unet:0:rank": "2", "<tok>": "<embed>"},
        ),
        ({"emb_params": _f(2, 8)}, {"name": "x"}),
        ({"clip_l": _f(2, 8), "clip_g": _f(2, 12)}, {}),
        ({"<cat>": _f(8)}, {}),
        ({f"{UNET}.delta": _f(8)}, {}),
    ]
    # Each a tensor of its own: the writer takes no two names for one memory.
    return [save({name: tensor.clone() for name, tensor in tensors.items()}, metadata) for tensors, metadata in tables]


def read_adapter(data: bytes) -> None:
    """Every format whose detection says yes reads it; the first one's answer is described, its values loaded."""
    _inspect(_written("adapter.safetensors", data))


def _inspect(path: Path, *, every: bool = True) -> None:
    file = open_adapter_file(path)
    told: RegraftError | None = None
    for format in formats().values() if every else ():
        try:
            with understanding(f"{format.name} file", path):
                if format.detect(file):
                    format.read(file, None)
        except RegraftError as error:
            told = error
    adapter = load_adapter(path)
    describe(adapter, path).to_json()
    check_values(adapter)
    for module, update in adapter.updates.items():
        assert isinstance(module, ModuleRef)
        if getattr(update, "additive", update.kind == "lora"):
            update.norm()
    if told is not None:
        raise told


def _torch_seeds(zipped: bool) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        state: dict[str, Any] = {f"{FLAT}.lora_down.weight": _f(2, 8), f"{FLAT}.lora_up.weight": _f(8, 2).half()}
        contents = [
            state,
            {"state_dict": state, "epoch": 3},
            {"<cat>": _f(8)},
            {"string_to_token": {"*": 265}, "string_to_param": {"*": _f(2, 8)}, "name": "x", "step": 5},
            {"w": torch.nn.Parameter(_f(3))},
        ]
        return [_saved(content, zipped) for content in contents]

    return seeds


def _saved(content: object, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def read_torch_adapter(data: bytes) -> None:
    """A ``.pt`` file as an adapter."""
    _inspect(_written("adapter.pt", data), every=False)


def read_torch_base(data: bytes) -> None:
    """A ``.ckpt`` file as a base."""
    _base(_written("base.ckpt", data))


def _base(path: Path) -> None:
    base = open_base(path)
    assert base.structure
    assert base.fingerprint
    for tensors in base.components.values():
        for ref in tensors.values():
            ref.load()


def config_seeds() -> list[bytes]:
    """PEFT configs as PEFT saves them."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q"],
        "rank_pattern": {"^a.b": 4, r".*\.(q|k)_proj": 8},
        "alpha_pattern": {"to_q": 3.5},
        "use_rslora": True,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": ["lm_head"],
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
        "base_model_name_or_path": "org/name",
        "target_parameters": None,
        "layers_to_transform": [1],
    }
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    return [json.dumps(config).encode(), json.dumps(plain).encode(), b'{"peft_type": "LOHA", "r": 8, "alpha": 8}']


def read_config(data: bytes) -> None:
    """A PEFT folder with this config."""
    folder = PLACE / "lora"
    if not folder.exists():
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(safetensors_seeds()[0])
    (folder / "adapter_config.json").write_bytes(data)
    _inspect(folder, every=False)


def metadata_seeds() -> list[bytes]:
    """What diffusers puts into ``lora_adapter_metadata``."""
    entries = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.rank_pattern": {"to_q": 2, r".*attn1\.to_q": 3},
        "unet.alpha_pattern": {},
        "unet.target_modules": ["to_q"],
        "unet.use_rslora": False,
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 4.0,
    }
    return [json.dumps(entries).encode(), b'{"r": 2, "lora_alpha": 2}']


def read_metadata(data: bytes) -> None:
    """A diffusers file with this in its header."""
    pair = {f"unet.{UNET}.lora_A.weight": _f(2, 8), f"unet.{UNET}.lora_B.weight": _f(8, 2)}
    text = data.decode("utf-8", "replace")
    _inspect(_written("metadata.safetensors", save(pair, {"lora_adapter_metadata": text})), every=False)


def index_seeds() -> list[bytes]:
    """Shard indexes."""
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    return [json.dumps(index).encode()]


def read_index(data: bytes) -> None:
    """A sharded base with this index."""
    folder = PLACE / "shards"
    if not folder.exists():
        folder.mkdir()
        save_file({"a": _f(2, 2)}, folder / "one.safetensors")
        save_file({"b": _f(2, 2)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(data)
    _base(folder / "model.safetensors.index.json")
    _base(folder)


def base_seeds() -> list[bytes]:
    """Bases in one safetensors file."""
    llama = {f"model.layers.0.self_attn.{n}_proj.weight": _f(4, 4) for n in "qkvo"} | {"model.norm.weight": _f(4)}
    unet = {f"model.diffusion_model.{n}.weight": _f(4, 4) for n in ("input_blocks.1.1.proj_in", "out.2")}
    return [save(llama), save(unet), save({f"{UNET}.weight": _f(8, 8)})]


def read_base(data: bytes) -> None:
    """A base in one file."""
    _base(_written("base.safetensors", data))


def migration_seeds() -> list[bytes]:
    """A migration of each kind of map."""
    from regraft.fitting import fit_migration
    from regraft.migration_file import save_migration

    folder = PLACE / "migrating"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    old = {
        f"model.layers.{i}.{n}.weight": torch.randn(4, 4, generator=generator) for i in (0, 1) for n in ("q", "mlp.up")
    }
    save_file(old, folder / "old.safetensors")
    save_file({name: weight * 1.1 for name, weight in old.items()}, folder / "new.safetensors")
    one, two = (open_base(folder / f"{name}.safetensors") for name in ("old", "new"))
    seeds = []
    for method in ("copy", "procrustes", "lora-x"):
        try:
            migration = fit_migration(one, two, method)
        except RegraftError:
            continue
        path = save_migration(migration, folder / "m.safetensors", overwrite=True)
        seeds.append(path.read_bytes())
    return seeds


def read_migration(data: bytes) -> None:
    """A migration file."""
    in_memory(load_migration(_written("migration.safetensors", data)))


def _gguf(name: str, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    from regraft.formats._gguf_write import write_gguf

    write_gguf(PLACE / name, "llama", fields, tensors)
    return (PLACE / name).read_bytes()


def gguf_base_seeds() -> list[bytes]:
    """A small Llama in GGUF, plain and quantised."""
    import gguf
    import numpy as np

    plain = {f"blk.0.attn_{n}.weight": _f(4, 4) for n in ("q", "k", "v", "output")} | {"token_embd.weight": _f(6, 4)}
    writer = gguf.GGUFWriter(PLACE / "quantised.gguf", "llama")
    writer.add_head_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for kind in ("Q4_0", "Q8_0", "Q4_K", "Q6_K"):
        known = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[known]
        data = np.zeros((2, size * (256 // block)), np.uint8)
        writer.add_tensor(f"blk.0.ffn_{kind.lower()}.weight", data, raw_dtype=known)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    fields = {"llama.attention.head_count": 2, "llama.block_count": 1}
    return [_gguf("base.gguf", fields, plain), (PLACE / "quantised.gguf").read_bytes()]


def gguf_lora_seeds() -> list[bytes]:
    """A LoRA as llama.cpp's converter writes it."""
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    halves = {"a": _f(2, 8), "b": _f(8, 2)}
    names = [f"blk.0.{n}.weight" for n in ("attn_q", "ffn_up")]
    return [_gguf("lora.gguf", fields, {f"{name}.lora_{h}": t.clone() for name in names for h, t in halves.items()})]


def read_gguf_base(data: bytes) -> None:
    """A GGUF file as a base."""
    _base(_written("base.gguf", data))


def read_gguf_lora(data: bytes) -> None:
    """A GGUF file as an adapter."""
    path = _written("lora.gguf", data)
    adapter = load_adapter(path)
    describe(adapter, path).to_json()


def lineage_seeds() -> list[bytes]:
    """The valid test vectors of the standard."""
    vectors = json.loads(
        (Path(__file__).parents[2] / "tests/standard/vectors/lineage.json").read_text(encoding="utf-8")
    )
    return [json.dumps(vector["document"]).encode() for vector in vectors if vector["valid"]]


def read_lineage(data: bytes) -> None:
    """The lineage entry of a header, and the module names that it stands for."""
    from regraft.lineage import parse_lineage

    parse_lineage(data.decode("utf-8", "replace"), file="fuzzed")


def pattern_seeds() -> list[bytes]:
    """Patterns as configs have them, and some that are made to hang."""
    patterns = ("to_q", r"^model\.layers\.\d+", "(q|k)_proj", r".*\.[0-3]\..*", "(a+)+$", "(a|a)*b", "a{2,5}?")
    return [pattern.encode() for pattern in patterns]


def read_pattern(data: bytes) -> None:
    """A pattern of a config, on names that are made to be slow."""
    import re

    pattern = data.decode("utf-8", "replace")
    try:
        known = compiled(pattern, around=r"(.*\.)?({})$")
        for name in ("model.layers.10.self_attn.q_proj", "a" * 60 + "!", "a.b" * 30):
            matches(known, name)
    except (re.error, TooComplex):
        raise InputError("is no regular expression") from None


def targets() -> Iterator[Target]:
    """Every reader's target."""
    yield Target("safetensors", safetensors_seeds, read_adapter, mutate.safetensors)
    yield Target("torch", _torch_seeds(True), read_torch_adapter, mutate.archive)
    yield Target("torch-legacy", _torch_seeds(False), read_torch_adapter, mutate.of_bytes)
    yield Target("torch-base", _torch_seeds(True), read_torch_base, mutate.archive)
    yield Target("peft-config", config_seeds, read_config, mutate.json_bytes)
    yield Target("diffusers-metadata", metadata_seeds, read_metadata, mutate.json_bytes)
    yield Target("shard-index", index_seeds, read_index, mutate.json_bytes)
    yield Target("base", base_seeds, read_base, mutate.safetensors)
    yield Target("migration", migration_seeds, read_migration, mutate.safetensors)
    yield Target("gguf-base", gguf_base_seeds, read_gguf_base, mutate.of_bytes)
    yield Target("gguf-lora", gguf_lora_seeds, read_gguf_lora, mutate.of_bytes)
    yield Target("lineage", lineage_seeds, read_lineage, mutate.json_bytes)
    yield Target("pattern", pattern_seeds, read_pattern, mutate.of_bytes)


TARGETS = {target.name: target for target in targets()}
