"""Embeddings of added tokens: every layout that is about, and diffusers as the judge of what we write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from regraft import Adapter, InputError, ModuleRef, OutputError, load_adapter
from regraft.adapter import TokenRef
from regraft.formats._bundled_embeddings import bundled, read_bundled
from regraft.inspection import inspect_adapter
from regraft.ops.convert import convert_adapter
from regraft.tensor_files import read_safetensors
from regraft.tensors import InMemory
from regraft.updates import LowRank

L, G, T5 = "text_encoder", "text_encoder_2", "text_encoder_3"


def vectors(count: int, width: int = 768) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count + width))


def compvis(container: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """What CompVis' and A1111's trainers save, the vectors in a container of that kind."""
    return {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": container({"*": torch.nn.Parameter(vectors(3))}),
        "name": "cat-toy",
        "step": 500,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": None,
    }


@pytest.mark.parametrize("container", [dict, torch.nn.ParameterDict], ids=["A1111", "CompVis"])
def test_a_pickled_embedding_becomes_emb_params(container: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(compvis(container), tmp_path / "other-name.pt")
    adapter = load_adapter(tmp_path / "other-name.pt")
    token = TokenRef(L, "cat-toy")
    assert (adapter.format, adapter.unrecognised, set(adapter.tokens)) == ("a1111-embedding", (), {token})
    assert torch.equal(adapter.tokens[token].load(), vectors(3))

    adapter.save(tmp_path / "cat-toy.safetensors")
    assert torch.equal(load_file(tmp_path / "cat-toy.safetensors")["emb_params"], vectors(3))
    metadata = read_safetensors(tmp_path / "cat-toy.safetensors").metadata
    assert (metadata["step"], metadata["sd_checkpoint"]) == ("500", "cc6cb27103")


@pytest.mark.parametrize(
    ("keys", "format", "components"),
    [
        ({"emb_params": vectors(2)}, "a1111-embedding", [L]),
        ({"emb_params": vectors(1, 1024)}, "a1111-embedding", [L]),
        ({"clip_l": vectors(2), "clip_g": vectors(2, 1280)}, "a1111-embedding", [L, G]),
        ({"clip_l": vectors(2), "clip_g": vectors(2, 1280), "t5xxl": vectors(2, 4096)}, "a1111-embedding", [L, G, T5]),
        ({"clip_l": vectors(2), "t5": vectors(2, 4096)}, "a1111-embedding", [L, G]),
        ({"clip_l": vectors(2), "clip_l_out": vectors(2)}, "a1111-embedding", [L, L]),
        ({"llama": vectors(2, 4096), "clip_l": vectors(2)}, "a1111-embedding", [L, G]),
        ({"<cat-toy>": vectors(1)}, "textual-inversion", [L]),
        ({"<cat-toy>": vectors(1)[0]}, "textual-inversion", [L]),
        ({"cat toy": vectors(4, 1280)}, "textual-inversion", [G]),
        ({"<s0>": vectors(1, 24), "<s1>": vectors(2, 24)}, "textual-inversion", [L, L]),
    ],
)
def test_every_layout_is_read_and_comes_back_key_for_key(
    keys: dict[str, Tensor], format: str, components: list[str], tmp_path: Path
) -> None:
    source = tmp_path / "name.safetensors"
    tensors = {key: value.half() for key, value in keys.items()}
    save_file(tensors, source, metadata={"anything": "stays"})
    adapter = load_adapter(source)
    by_key = {ref.name: token.component for token, ref in adapter.tokens.items()}
    assert (adapter.format, adapter.unrecognised) == (format, ())
    assert [by_key[key] for key in keys] == components

    adapter.save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in tensors.items())
    assert read_safetensors(tmp_path / "again.safetensors").metadata == {"anything": "stays"}


class Prompter(TextualInversionLoaderMixin):
    """As much of a pipeline as diffusers' loader of embeddings asks for."""

    hf_device_map = None

    def __init__(self, folder: Path) -> None:
        (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
        (folder / "merges.txt").write_text("#version: 0.2\n")
        self.tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        sizes = {"hidden_size": 768, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=3, **sizes))
        self.components: dict[str, Any] = {}

    def rows(self, *tokens: str) -> Tensor:
        numbers = self.tokenizer.convert_tokens_to_ids(list(tokens))
        return self.text_encoder.get_input_embeddings().weight.detach()[numbers]


@pytest.mark.parametrize("target", ["textual-inversion", "a1111-embedding"])
@pytest.mark.parametrize("source", ["pt", "emb_params", "<cat-toy>"])
def test_diffusers_loads_what_we_convert_into_the_same_rows(source: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / ("cat-toy.pt" if source == "pt" else "cat-toy.safetensors")
    torch.save(compvis(dict), path) if source == "pt" else save_file({source: vectors(3)}, path)
    token = source if source.startswith("<") else "cat-toy"
    convert_adapter(path, tmp_path / "out.safetensors", target)

    pipe = Prompter(tmp_path)
    # Given no name, diffusers takes the key for one.
    named = None if target == "textual-inversion" else token
    pipe.load_textual_inversion(str(tmp_path), weight_name="out.safetensors", token=named)
    assert torch.equal(pipe.rows(token, f"{token}_1", f"{token}_2"), vectors(3))


def test_a_token_s_name_survives_both_ways(tmp_path: Path) -> None:
    save_file({"<cat-toy>": vectors(2)}, tmp_path / "a.safetensors")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "a1111-embedding")
    convert_adapter(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "textual-inversion")
    assert set(load_file(tmp_path / "c.safetensors")) == {"<cat-toy>"}


def test_inspect_names_tokens_by_their_encoder(tmp_path: Path) -> None:
    save_file({"clip_l": vectors(2), "clip_g": vectors(2, 1280)}, tmp_path / "cat.safetensors")
    assert inspect_adapter(tmp_path / "cat.safetensors").tokens == {"cat": [2, 768], "text_encoder_2.cat": [2, 1280]}


@pytest.mark.parametrize(
    ("keys", "target", "says"),
    [
        ({"clip_l": vectors(1), "clip_g": vectors(1, 1280)}, "textual-inversion", "several text encoders"),
        ({"clip_l_out": vectors(1)}, "textual-inversion", "output"),
        ({"<s0>": vectors(1), "<s1>": vectors(1)}, "a1111-embedding", "one token"),
        ({"clip_l": vectors(1)}, "musubi", "added tokens"),
        ({"clip_l": vectors(1)}, "peft", "added tokens"),
    ],
)
def test_what_a_layout_can_not_hold_is_refused(keys: dict[str, Tensor], target: str, says: str, tmp_path: Path) -> None:
    save_file(keys, tmp_path / "in.safetensors")
    with pytest.raises(OutputError, match=says):
        load_adapter(tmp_path / "in.safetensors").save(tmp_path / "out", format=target)
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_would_lose_a_token_names_it(tmp_path: Path) -> None:
    pair = {"transformer.a.lora_A.weight": torch.ones(2, 4), "transformer.a.lora_B.weight": torch.ones(4, 2)}
    save_file({**pair, "bundle_emb.<cat>.clip_l": vectors(1)}, tmp_path / "in.safetensors")
    with pytest.raises(OutputError, match=r"<cat>: a token would be lost"):
        convert_adapter(tmp_path / "in.safetensors", tmp_path / "out", "peft")


def test_weights_are_no_embedding(tmp_path: Path) -> None:
    update = LowRank(InMemory(torch.ones(4, 2)), InMemory(torch.ones(2, 4)), 1.0)
    adapter = Adapter({ModuleRef("unet", "conv_in"): update}, "kohya")
    for format in ("textual-inversion", "a1111-embedding"):
        with pytest.raises(OutputError, match="changes of weights"):
            adapter.save(tmp_path / "out.safetensors", format=format)


@pytest.mark.parametrize("key", ["emb_params", "clip_g", "<cat>"])
@pytest.mark.parametrize(
    ("tensor", "says"),
    [(torch.ones(2, 2, 768), "shape"), (torch.ones(0, 768), "shape"), (torch.ones(2, 768).int(), "int32")],
)
def test_a_broken_embedding_is_named(key: str, tensor: Tensor, says: str, tmp_path: Path) -> None:
    save_file({key: tensor}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=rf"bad\.safetensors: {key}: .*{says}"):
        load_adapter(tmp_path / "bad.safetensors")


def test_a_matrix_is_not_taken_for_an_embedding(tmp_path: Path) -> None:
    for number, shape in enumerate([(3, 100), (4096, 768), (1, 768, 1)]):
        save_file({"weight": torch.zeros(shape)}, tmp_path / f"{number}.safetensors")
        with pytest.raises(InputError, match="no known adapter format"):
            load_adapter(tmp_path / f"{number}.safetensors")


class Runs:
    """What a hostile pickle holds: a call that unpickling makes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_code_in_a_pickled_embedding_does_not_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = compvis(torch.nn.ParameterDict)
    if where == "beside":
        content["extra"] = Runs()
    else:
        content["string_to_param"].__dict__["extra"] = Runs()
    torch.save(content, "evil.pt")
    with pytest.raises(InputError, match="more than tensors"):
        load_adapter("evil.pt")
    assert not Path("ran").exists()


def test_bundled_embeddings_are_told_apart_and_come_back(tmp_path: Path) -> None:
    keys = ["<a>.clip_l", "<a>.clip_g", "<a>.clip_g_out", "v1.0.clip_l", "old.string_to_param.*"]
    tensors = {f"bundle_emb.{key}": InMemory(vectors(1, 1280 if "clip_g" in key else 768)) for key in keys}
    others = {"lora_unet_x.alpha": InMemory(torch.ones(())), "bundle_emb.x.unknown": InMemory(torch.ones(2))}
    tokens, names = read_bundled(tensors | others, tmp_path)
    assert set(tokens) == {
        TokenRef(L, "<a>"),
        TokenRef(G, "<a>"),
        TokenRef(G, "<a>", True),
        TokenRef(L, "v1.0"),
        TokenRef(L, "old"),
    }
    assert bundled(tokens, names) == tensors
    fresh = bundled(tokens, {})
    assert set(fresh) == {*tensors, "bundle_emb.old.clip_l"} - {"bundle_emb.old.string_to_param.*"}


def test_a_bundled_encoder_of_an_unknown_width_is_refused() -> None:
    with pytest.raises(OutputError, match="width 24"):
        bundled({TokenRef(L, "<a>"): SimpleNamespace(shape=(1, 24))}, {})  # type: ignore[dict-item]
