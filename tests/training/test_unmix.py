"""Recording cross-attention on a real U-Net, and the regulariser on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regraft import InputError
from regraft.training.cutmix import CutMix, Sample, Subject
from regraft.training.unmix import Apart, recorded_attention, token_positions, unmix_loss
from verify import tiny

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
SIZE, TOKENS = (8, 6), 5


@pytest.fixture
def unet() -> Any:
    return tiny.unet_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def inputs(n: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(n, 4, *SIZE, generator=generator),
        "timestep": torch.full((n,), 300),
        "encoder_hidden_states": torch.randn(n, TOKENS, 8, generator=generator),
    }


def with_lora(unet: Any) -> Any:
    """PEFT's layers on the attention, with an effect."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return unet


def processors(unet: Any) -> dict[str, Any]:
    return dict(unet.attn_processors)


def collages(count: int, *, seed: int = 0, probability: float = 1.0) -> list[Sample]:
    pictures = torch.zeros(1, 3, 16, 12)
    draws = CutMix([Subject(pictures, "q", "a"), Subject(pictures, "z", "b")], (16, 12), probability)
    generator = torch.Generator().manual_seed(seed)
    return [draws.draw(generator) for _ in range(count)]


def apart(regions: Sequence[int], tokens: tuple[int, int] = (1, 3)) -> Apart:
    """One collage on a map of as many positions in a row: 0 and 1 say whose each position is."""
    row = torch.tensor(regions, dtype=torch.float32)
    marks = torch.zeros(1, 2, TOKENS)
    marks[0, 0, tokens[0]] = marks[0, 1, tokens[1]] = 1.0
    return Apart(marks, torch.stack([row, 1 - row])[None, :, None, :])


@pytest.mark.parametrize("adapted", [False, True])
def test_maps_are_softmax_of_the_module_s_own_queries_and_keys(unet: Any, adapted: bool) -> None:
    unet = with_lora(unet) if adapted else unet
    attention, seen = unet.get_submodule(LAYER), {}
    for part in ("to_q", "to_k"):
        getattr(attention, part).register_forward_hook(lambda _m, _i, out, part=part: seen.update({part: out}))
    with recorded_attention(unet) as maps:
        unet(**inputs())
    found, heads = maps[LAYER], attention.heads
    q, k = (seen[part].unflatten(2, (heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
    assert heads > 1
    assert torch.allclose(found, (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), atol=1e-6)
    assert found.shape == (2, heads, SIZE[0] * SIZE[1], TOKENS)


def test_all_cross_attention_is_recorded_and_no_self_attention(unet: Any) -> None:
    with recorded_attention(unet) as maps:
        unet(**inputs())
    assert set(maps) == {name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name}


@pytest.mark.parametrize("adapted", [False, True])
def test_the_output_is_the_same_while_recorded(unet: Any, adapted: bool) -> None:
    unet = with_lora(unet) if adapted else unet
    expected = unet(**inputs()).sample
    with recorded_attention(unet):
        assert torch.allclose(unet(**inputs()).sample, expected, atol=1e-5)


def test_a_masked_token_is_not_attended_to(unet: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1]] * 2)
    expected = unet(**inputs(), encoder_attention_mask=mask).sample
    with recorded_attention(unet) as maps:
        assert torch.allclose(unet(**inputs(), encoder_attention_mask=mask).sample, expected, atol=1e-5)
    assert all(found[..., 3].max() < 1e-6 for found in maps.values())


def test_processors_come_back_even_after_an_error(unet: Any) -> None:
    before = processors(unet)
    with recorded_attention(unet):
        assert {name for name, kept in processors(unet).items() if kept is not before[name]} == {
            name for name in before if "attn2" in name
        }
    assert processors(unet) == before
    with pytest.raises(RuntimeError, match="on the way"), recorded_attention(unet):
        raise RuntimeError("on the way")
    assert processors(unet) == before


def test_a_wrapped_model_is_recorded_too(unet: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"]))
    with recorded_attention(model) as maps:
        model(**inputs())
    assert f"base_model.model.{LAYER}" in maps


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_lora(unet: Any, checkpointing: bool) -> None:
    unet = with_lora(unet).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    marks = torch.zeros(2, 2, TOKENS)
    marks[:, 0, 1] = marks[:, 1, 3] = 1.0
    others = torch.zeros(2, 2, *SIZE)
    others[:, 0, :, 3:], others[:, 1, :, :3] = 1.0, 1.0
    with recorded_attention(unet) as maps:
        unet(**inputs())
        loss = unmix_loss(maps, Apart(marks, others), SIZE)
        loss.backward()
    for part in ("to_q", "to_k"):
        layer = unet.get_submodule(f"{LAYER}.{part}")
        for factor in (layer.lora_A, layer.lora_B):
            assert factor["default"].weight.grad.norm() > 0
    # A small step against the gradient lowers the loss by what the gradient says.
    trained = [parameter for parameter in unet.parameters() if parameter.grad is not None]
    step = 1e-3 / sum(parameter.grad.square().sum() for parameter in trained).sqrt()
    expected = step * sum(parameter.grad.square().sum() for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter -= step * parameter.grad
        with recorded_attention(unet) as maps:
            unet(**inputs())
        assert loss - unmix_loss(maps, Apart(marks, others), SIZE) == pytest.approx(float(expected), rel=0.1)


def test_attention_to_the_own_region_alone_costs_nothing() -> None:
    target = apart([0, 0, 1, 1])
    own = torch.zeros(1, 2, 4, TOKENS)
    own[..., :2, 1] = own[..., 2:, 3] = 1.0
    # Where other tokens look is free.
    own[..., 0] = own[..., 4] = 0.7
    assert unmix_loss({"x": own}, target, (1, 4)) == 0
    assert unmix_loss({"x": own.flip(2)}, target, (1, 4)) == 1


def test_the_loss_is_the_mean_square_over_the_other_s_region() -> None:
    """Three positions of the one, one of the other; heads and layers count alike, whatever their size."""
    target = apart([0, 0, 0, 1])
    maps = {"small": torch.rand(1, 2, 4, TOKENS), "large": torch.rand(1, 5, 4, TOKENS)}
    expected = 0.0
    for found in maps.values():
        one, two = found[0, :, 3:, 1].square().mean(), found[0, :, :3, 3].square().mean()
        expected += float(one + two) / 4
    assert unmix_loss(maps, target, (1, 4)) == pytest.approx(expected)


def test_samples_that_are_no_collage_do_not_count(tokenizer: Any) -> None:
    samples = [sample for sample in collages(40, probability=0.5) if sample.is_collage][:2]
    plain = next(sample for sample in collages(40, probability=0.5) if not sample.is_collage)
    class_pictures = [torch.zeros(1, 3, 16, 12)] * 2
    draws = CutMix([Subject(class_pictures[0], "q", "a"), Subject(class_pictures[0], "z", "b")], (16, 12), 1.0)
    prior = draws.of_classes(class_pictures).draw(torch.Generator().manual_seed(0))
    assert prior.is_collage
    maps = {"x": torch.rand(4, 2, 48, 60)}
    mixed = unmix_loss(maps, Apart.of([samples[0], plain, prior, samples[1]], tokenizer, 60), SIZE)
    alone = unmix_loss({"x": maps["x"][[0, 3]]}, Apart.of(samples, tokenizer, 60), SIZE)
    assert mixed == pytest.approx(float(alone))
    assert alone > 0
    none = unmix_loss({"x": maps["x"][1:3]}, Apart.of([plain, prior], tokenizer, 60), SIZE)
    assert none == 0


def test_masks_come_down_to_the_resolution_of_each_map(tokenizer: Any) -> None:
    """8 × 6 latents of 16 × 12 pictures, and a map of a level below; the left half must be the left half of both."""
    (sample,) = collages(1, seed=next(seed for seed in range(20) if "on the left" in collages(1, seed=seed)[0].prompt))
    target = Apart.of([sample], tokenizer, 40)
    first = int(target.tokens[0, 0].argmax())
    for height, width in (SIZE, (4, 3)):
        at = torch.zeros(1, 1, height, width, 40)
        at[..., : width // 2, first] = 1.0
        assert unmix_loss({"x": at.flatten(2, 3)}, target, SIZE) == 0
        at[..., -(width // 2) :, first] = 1.0
        assert unmix_loss({"x": at.flatten(2, 3)}, target, SIZE) > 0.2
    with pytest.raises(InputError, match="x: its 7 positions are no picture"):
        unmix_loss({"x": torch.rand(1, 1, 7, 40)}, target, SIZE)


def test_special_tokens_are_found_where_they_stand(tokenizer: Any) -> None:
    ids = tokenizer("a cat q dog").input_ids
    assert token_positions(tokenizer, "a cat q dog", "q") == [ids.index(tokenizer.convert_tokens_to_ids("q</w>"))]
    several = token_positions(tokenizer, "a cat sks dog", "sks")
    whole = tokenizer("a cat sks dog").input_ids
    assert tokenizer.convert_ids_to_tokens([whole[at] for at in several]) == ["s", "k", "s</w>"]


def test_each_collage_s_tokens_keep_out_of_the_other_s_region(tokenizer: Any) -> None:
    samples = collages(8)
    target = Apart.of(samples, tokenizer, 60)
    for at, sample in enumerate(samples):
        ids = tokenizer(sample.prompt).input_ids
        for which, subject in enumerate(sample.subjects):
            word = tokenizer.convert_ids_to_tokens(ids[int(target.tokens[at, which].argmax())])
            assert word == f"{subject.identifier}</w>"
            assert target.tokens[at, which].sum() == 1
            assert torch.equal(target.others[at, which].bool(), ~sample.regions[which])


@pytest.mark.parametrize(
    ("prompt", "identifier", "how"),
    [
        ("a cat", "q", "is not in the tokens"),
        ("a q cat and a q dog", "q", "is 2 times in the tokens"),
        ("a cat and a q", "", "is not in the tokens"),
        ("abcdefghijklm q", "q", "is cut off: .* has 16 tokens, and 15 are read"),
        ("abcdefghijkl sks", "sks", "is cut off"),
    ],
)
def test_special_tokens_that_are_not_there_are_told(tokenizer: Any, prompt: str, identifier: str, how: str) -> None:
    with pytest.raises(InputError, match=how):
        token_positions(tokenizer, prompt, identifier, 15)


def test_looking_up_a_long_prompt_warns_of_nothing(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert token_positions(tokenizer, "q " + "abcdefgh " * 5, "q") == [1]
    assert not caplog.records


def test_a_denoiser_without_cross_attention_is_refused() -> None:
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    with pytest.raises(InputError, match="a DiTTransformer2DModel has no cross-attention"), recorded_attention(dit):
        pass


def test_attention_with_more_to_it_is_refused(unet: Any) -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor

    before = processors(unet)
    unet.get_submodule(LAYER).set_processor(IPAdapterAttnProcessor(8, 8))
    with (
        pytest.raises(InputError, match=rf"{LAYER}: its attention \(IPAdapterAttnProcessor\)"),
        recorded_attention(unet),
    ):
        pass
    others = {name: kept for name, kept in processors(unet).items() if LAYER not in name}
    assert others == {name: kept for name, kept in before.items() if LAYER not in name}


def test_the_demo_s_base_is_recorded(tmp_path: Path) -> None:
    """The shipped v1: a CLIP text encoder with two words more, and a LoRA."""
    from regraft.demo import data_folder
    from regraft.runtime import load_model

    loaded = load_model(data_folder() / "v1")
    pipe = loaded.pipeline
    pipe.tokenizer.add_tokens(["<v1>", "<v2>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    pictures = torch.zeros(1, 3, 32, 32)
    phrases = {"one": "{0}", "both": "{0} and {1}", "beside": "{0} left {1} right", "above": "{0} top {1} bottom"}
    from regraft.training.cutmix import Phrases

    draws = CutMix(
        [Subject(pictures, "<v1>", "cat"), Subject(pictures, "<v2>", "dog")], (32, 32), 1.0, phrases=Phrases(**phrases)
    )
    samples = [draws.draw(torch.Generator().manual_seed(seed)) for seed in range(3)]
    ids = pipe.tokenizer(
        [sample.prompt for sample in samples], padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    with recorded_attention(loaded.main) as maps:
        loaded.main(torch.randn(3, 8, 16, 16), torch.tensor([10, 500, 900]), pipe.text_encoder(ids)[0])
    assert {found.shape[2] for found in maps.values()} == {256, 64, 16}
    assert 0 < unmix_loss(maps, Apart.of(samples, pipe.tokenizer), (16, 16)) < 1
