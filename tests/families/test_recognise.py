"""A family, its components and the naming scheme are told from the names and shapes that real tools wrote."""

from __future__ import annotations

import pytest
from golden_names import names_of

from regraft.families import Recognition, families, get_family, recognise, table

CANONICAL, ORIGINAL, COMFY = "canonical", "original", "comfy"
FLAT, DOTTED = True, False

# golden list → family, and how each of its components is read
GOLDEN = {
    "flux1-dev-control.bfl-control": ("flux-control", {"": ("transformer", ORIGINAL, DOTTED)}),
    "flux1-dev-control.diffusers-control": ("flux-control", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "flux1-dev-control.to-diffusers.bfl-control": ("flux-control", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "flux1-dev.comfyui-native-extracted": ("flux", {"unet": ("transformer", ORIGINAL, DOTTED)}),
    "flux1-dev.diffusers-all-layers": ("flux", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "flux1-dev.diffusers": (
        "flux",
        {"transformer": ("transformer", CANONICAL, DOTTED), "text_encoder": ("text_encoder", CANONICAL, DOTTED)},
    ),
    "flux1-dev.diffusers.transformers5": (
        "flux",
        {"transformer": ("transformer", CANONICAL, DOTTED), "text_encoder": ("text_encoder", CANONICAL, DOTTED)},
    ),
    "flux1-dev.kohya-all-layers": (
        "flux",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("transformer", ORIGINAL, FLAT)},
    ),
    "flux1-dev.kohya-split-qkv": ("flux", {"unet": ("transformer", ORIGINAL, FLAT)}),
    "flux1-dev.kohya": (
        "flux",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("transformer", ORIGINAL, FLAT)},
    ),
    "flux1-dev.onetrainer-diffusers": (
        "flux",
        {"text_encoder": ("text_encoder", CANONICAL, DOTTED), "transformer": ("transformer", CANONICAL, DOTTED)},
    ),
    "flux1-dev.onetrainer-kohya": (
        "flux",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("transformer", ORIGINAL, FLAT)},
    ),
    "flux1-dev.onetrainer-legacy": (
        "flux",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "transformer": ("transformer", CANONICAL, FLAT)},
    ),
    "flux1-dev.peft": ("flux", {"": ("transformer", CANONICAL, DOTTED)}),
    "flux1-dev.to-diffusers.kohya": (
        "flux",
        {"transformer": ("transformer", CANONICAL, DOTTED), "text_encoder": ("text_encoder", CANONICAL, DOTTED)},
    ),
    "flux1-dev.xlabs": ("flux", {"": ("transformer", ORIGINAL, DOTTED)}),
    "hunyuan-video.comfyui-native-from-musubi": ("hunyuan-video", {"unet": ("transformer", ORIGINAL, DOTTED)}),
    "hunyuan-video.comfyui-native": ("hunyuan-video", {"unet": ("transformer", COMFY, DOTTED)}),
    "hunyuan-video.diffusers": ("hunyuan-video", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "hunyuan-video.musubi": ("hunyuan-video", {"unet": ("transformer", ORIGINAL, FLAT)}),
    "hunyuan-video.onetrainer-diffusers": ("hunyuan-video", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "hunyuan-video.onetrainer-legacy": ("hunyuan-video", {"transformer": ("transformer", CANONICAL, FLAT)}),
    "hunyuan-video.to-diffusers.comfyui-native-from-musubi": (
        "hunyuan-video",
        {"transformer": ("transformer", CANONICAL, DOTTED)},
    ),
    "sd15-text-encoder.peft": ("clip-l", {"": ("text_encoder", CANONICAL, DOTTED)}),
    "sd15-unet.peft-dora": ("sd15", {"": ("unet", CANONICAL, DOTTED)}),
    "sd15-unet.peft-loha": ("sd15", {"": ("unet", CANONICAL, DOTTED)}),
    "sd15-unet.peft-lokr": ("sd15", {"": ("unet", CANONICAL, DOTTED)}),
    "sd15-unet.peft": ("sd15", {"": ("unet", CANONICAL, DOTTED)}),
    "sd15.comfyui-native-extracted": ("sd15", {"unet": ("unet", ORIGINAL, DOTTED)}),
    "sd15.diffusers-all-layers": ("sd15", {"unet": ("unet", CANONICAL, DOTTED)}),
    "sd15.diffusers-dora": ("sd15", {"unet": ("unet", CANONICAL, DOTTED)}),
    "sd15.diffusers": (
        "sd15",
        {"unet": ("unet", CANONICAL, DOTTED), "text_encoder": ("text_encoder", CANONICAL, DOTTED)},
    ),
    "sd15.diffusers.transformers5": (
        "sd15",
        {"unet": ("unet", CANONICAL, DOTTED), "text_encoder": ("text_encoder", CANONICAL, DOTTED)},
    ),
    "sd15.kohya-c3lier": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.kohya-from-diffusers": (
        "sd15",
        {"unet": ("unet", CANONICAL, FLAT), "text_encoder": ("text_encoder", CANONICAL, FLAT)},
    ),
    "sd15.kohya-lierla": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-diag-oft": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-dora": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-full": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-glora": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-locon-tucker": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-locon": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-loha": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-lokr-factor8-tucker": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.lycoris-lokr": (
        "sd15",
        {"text_encoder": ("text_encoder", CANONICAL, FLAT), "unet": ("unet", CANONICAL, FLAT)},
    ),
    "sd15.to-diffusers.kohya-c3lier": (
        "sd15",
        {"unet": ("unet", CANONICAL, DOTTED), "text_encoder": ("text_encoder", CANONICAL, DOTTED)},
    ),
    "sdxl.diffusers": (
        "sdxl",
        {
            "unet": ("unet", CANONICAL, DOTTED),
            "text_encoder": ("text_encoder", CANONICAL, DOTTED),
            "text_encoder_2": ("text_encoder_2", CANONICAL, DOTTED),
        },
    ),
    "sdxl.diffusers.transformers5": (
        "sdxl",
        {
            "unet": ("unet", CANONICAL, DOTTED),
            "text_encoder": ("text_encoder", CANONICAL, DOTTED),
            "text_encoder_2": ("text_encoder_2", CANONICAL, DOTTED),
        },
    ),
    "sdxl.kohya-from-diffusers": (
        "sdxl",
        {
            "unet": ("unet", CANONICAL, FLAT),
            "text_encoder": ("text_encoder", CANONICAL, FLAT),
            "text_encoder_2": ("text_encoder_2", CANONICAL, FLAT),
        },
    ),
    "sdxl.kohya-lierla": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, FLAT),
            "text_encoder_2": ("text_encoder_2", CANONICAL, FLAT),
            "unet": ("unet", ORIGINAL, FLAT),
        },
    ),
    "sdxl.lycoris-lokr-dora-diffusers-unet": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, FLAT),
            "text_encoder_2": ("text_encoder_2", CANONICAL, FLAT),
            "unet": ("unet", CANONICAL, FLAT),
        },
    ),
    "sdxl.onetrainer-comfy": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, DOTTED),
            "text_encoder_2": ("text_encoder_2", CANONICAL, DOTTED),
            "unet": ("unet", ORIGINAL, DOTTED),
        },
    ),
    "sdxl.onetrainer-diffusers-dora": ("sdxl", {"unet": ("unet", CANONICAL, DOTTED)}),
    "sdxl.onetrainer-diffusers": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, DOTTED),
            "text_encoder_2": ("text_encoder_2", CANONICAL, DOTTED),
            "unet": ("unet", CANONICAL, DOTTED),
        },
    ),
    "sdxl.onetrainer-kohya": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, FLAT),
            "text_encoder_2": ("text_encoder_2", CANONICAL, FLAT),
            "unet": ("unet", ORIGINAL, FLAT),
        },
    ),
    "sdxl.onetrainer-legacy-all-layers": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, FLAT),
            "text_encoder_2": ("text_encoder_2", CANONICAL, FLAT),
            "unet": ("unet", CANONICAL, FLAT),
        },
    ),
    "sdxl.onetrainer-legacy": (
        "sdxl",
        {
            "text_encoder": ("text_encoder", CANONICAL, FLAT),
            "text_encoder_2": ("text_encoder_2", CANONICAL, FLAT),
            "unet": ("unet", CANONICAL, FLAT),
        },
    ),
    "sdxl.to-diffusers.kohya-lierla": (
        "sdxl",
        {
            "unet": ("unet", CANONICAL, DOTTED),
            "text_encoder": ("text_encoder", CANONICAL, DOTTED),
            "text_encoder_2": ("text_encoder_2", CANONICAL, DOTTED),
        },
    ),
    "ssd1b.diffusers": ("ssd1b", {"unet": ("unet", CANONICAL, DOTTED)}),
    "ssd1b.kohya-from-diffusers": ("ssd1b", {"unet": ("unet", CANONICAL, FLAT)}),
    "ssd1b.kohya-sgm": ("ssd1b", {"unet": ("unet", ORIGINAL, FLAT)}),
    "wan21-i2v-14b.comfyui-native-from-musubi": ("wan-i2v", {"unet": ("transformer", ORIGINAL, DOTTED)}),
    "wan21-i2v-14b.diffusers": ("wan-i2v", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "wan21-i2v-14b.musubi": ("wan-i2v", {"unet": ("transformer", ORIGINAL, FLAT)}),
    "wan21-i2v-14b.to-diffusers.musubi": ("wan-i2v", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "wan21-t2v-1.3b.musubi": ("wan-1.3b", {"unet": ("transformer", ORIGINAL, FLAT)}),
    "wan21-t2v-14b.comfyui-native-from-musubi": ("wan", {"unet": ("transformer", ORIGINAL, DOTTED)}),
    "wan21-t2v-14b.diffusers": ("wan", {"transformer": ("transformer", CANONICAL, DOTTED)}),
    "wan21-t2v-14b.musubi": ("wan", {"unet": ("transformer", ORIGINAL, FLAT)}),
    "wan21-t2v-14b.peft": ("wan", {"": ("transformer", CANONICAL, DOTTED)}),
    "wan21-t2v-14b.to-diffusers.musubi": ("wan", {"transformer": ("transformer", CANONICAL, DOTTED)}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_list_is_recognised_whole_by_its_names_alone(name: str) -> None:
    family, components = GOLDEN[name]
    names, _ = names_of(name)
    found = recognise(names)
    assert found is not None
    assert found.family == family
    assert found.coverage == 1
    assert {key: (m.component, m.scheme, m.flat) for key, m in found.matches.items()} == components
    # XLabs changes a part of the rows of a fused weight.
    assert found.exact == (not name.endswith("xlabs"))


@pytest.mark.parametrize("name", GOLDEN)
def test_every_name_leads_to_canonical_modules_of_the_family(name: str) -> None:
    names, _ = names_of(name)
    found = recognise(names)
    assert found is not None
    for key, paths in names.items():
        match = found.matches[key]
        parameters = table(match.table or "").parameters
        for path in paths:
            for piece in match.named[path].pieces:
                assert piece.name in parameters or f"{piece.name}.weight" in parameters


@pytest.mark.parametrize("name", ["tinyllama-1.1b.peft", "tinyllama-1.1b.peft-modules-to-save", "qwen2.5-0.5b.peft"])
def test_language_models_are_told_by_patterns_and_refined_by_what_the_config_says(name: str) -> None:
    names, _ = names_of(name)
    found = recognise(names)
    assert found == Recognition("llama", found.matches, 1, False) if found else False
    refined = recognise(names, {"config": "Qwen/Qwen2.5-0.5B"})
    assert refined is not None
    assert refined.family == "qwen2"


def fused(i: int) -> dict[str, tuple[int, ...] | None]:
    return {f"double_blocks_{i}_img_attn_qkv": (9216, 3072), f"double_blocks_{i}_img_mlp_0": (12288, 3072)}


def test_metadata_tells_families_of_the_same_names_and_shapes_apart() -> None:
    names = {"unet": {name: shape for i in range(19) for name, shape in fused(i).items()}}
    for metadata, family in [
        ({}, "flux"),
        ({"ss_base_model_version": "flux1"}, "flux"),
        ({"ss_base_model_version": "chroma"}, "chroma"),
        ({"modelspec.architecture": "flux-1-schnell/lora"}, "flux-schnell"),
    ]:
        found = recognise(names, metadata)
        assert found is not None
        assert (found.family, found.exact) == (family, True)


def test_metadata_names_a_descendant_whose_modules_are_its_ancestors() -> None:
    names, metadata = names_of("sdxl.kohya-lierla")
    for title, family in [("x", "sdxl"), ("ponyDiffusionV6XL.safetensors", "pony"), ("NoobAI-XL-v1.1", "noobai")]:
        found = recognise(names, {**metadata, "ss_sd_model_name": title})
        assert found is not None
        assert found.family == family


def test_metadata_never_overrules_shapes() -> None:
    names, _ = names_of("sdxl.kohya-lierla")
    found = recognise(names, {"ss_base_model_version": "sd_v1"})
    assert found is not None
    assert found.family == "sdxl"


def test_a_model_of_other_widths_is_told_by_names() -> None:
    names = {"unet": {name: (48, 16) for i in range(2) for name in fused(i) if "qkv" in name}}
    found = recognise(names)
    assert found is not None
    assert (found.family, found.exact) == ("flux", False)
    assert found.matches["unet"].named["double_blocks_1_img_attn_qkv"].name == "double_blocks.1.img_attn.qkv"


def test_a_text_encoder_alone_is_of_a_pipeline_only_if_the_file_says_so() -> None:
    names = {"text_encoder": {"text_model_encoder_layers_0_mlp_fc1": (3072, 768)}}
    alone, said = recognise(names), recognise(names, {"ss_base_model_version": "sd_v1"})
    assert alone is not None
    assert said is not None
    assert (alone.family, said.family) == ("clip-l", "sd15")


def test_names_of_no_family_are_not_recognised() -> None:
    assert recognise({"": {"some_layer": (2, 2), "another_layer": (2, 2)}}) is None
    assert recognise({}) is None


@pytest.mark.parametrize("name", [name for name, family in families().items() if family.components])
def test_a_family_recognises_its_own_main_model(name: str) -> None:
    family = get_family(name)
    assert family is not None
    own = table(family.components[family.main])
    for scheme in own.schemes:
        shapes = {path: entry.shape for path, entry in own.named(scheme, flat=True).items()}
        found = recognise({family.main: shapes}, {"config": name})
        assert found is not None
        assert found.exact
        assert table(get_family(found.family).components[found.matches[family.main].component]) is own
