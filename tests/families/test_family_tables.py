"""Tables hold every parameter of the real models, and the original names that the real converters read."""

from __future__ import annotations

from typing import Any

import pytest
from truth import listed

from regraft.families import Piece, families, get_family, table
from regraft.families._templates import expand

LISTS = [
    ("sd15-unet", "sd15-unet"),
    ("sdxl-unet", "sdxl-unet"),
    ("ssd1b-unet", "ssd1b-unet"),
    ("clip-l", "sd15-text-encoder"),
    ("clip-big-g", "sdxl-text-encoder-2"),
    ("t5-xxl", "t5xxl-encoder"),
    ("flux-dev", "flux1-dev"),
    ("flux-schnell", "flux1-schnell"),
    ("flux-fill", "flux1-fill-dev"),
    ("flux-control", "flux1-dev-control"),
    ("hunyuan-video", "hunyuan-video"),
    ("wan-1.3b", "wan21-t2v-1.3b"),
    ("wan-14b", "wan21-t2v-14b"),
    ("wan-i2v-14b", "wan21-i2v-14b"),
]


@pytest.mark.parametrize(("name", "real"), LISTS)
def test_a_table_is_the_state_dict_of_the_real_model(name: str, real: str) -> None:
    shapes = {key: tuple(shape) for key, shape in listed(real)["params"].items()}
    assert list(table(name).parameters.items()) == list(shapes.items())


MAPS = [
    ("sd15-unet", "sd15-unet", ""),
    ("sdxl-unet", "sdxl-unet", ""),
    ("ssd1b-unet", "ssd1b-unet", ""),
    ("clip-big-g", "sdxl-text-encoder-2", "conditioner.embedders.1.model."),
    ("flux-dev", "flux1-dev", ""),
    ("hunyuan-video", "hunyuan-video", ""),
    ("wan-14b", "wan21-t2v-14b", ""),
    ("wan-i2v-14b", "wan21-i2v-14b", ""),
]


def as_pieces(value: Any, shape: list[int]) -> tuple[Piece, ...]:
    """An entry of the lists, which say swaps and transposes in words."""
    if isinstance(value, str):
        return (Piece(value),)
    if isinstance(value, list):
        return tuple(Piece(part["to"], (tuple(part["rows"]),)) for part in value)
    if value["note"] == "transposed":
        return (Piece(value["to"], transposed=True),)
    assert value["note"].startswith("row halves swapped")
    rows, half = shape[0], shape[0] // 2
    return (Piece(value["to"], ((half, rows), (0, half))),)


@pytest.mark.parametrize(("name", "real", "root"), MAPS)
def test_original_names_lead_where_the_real_converter_leads_them(name: str, real: str, root: str) -> None:
    found = listed(f"{real}.original")
    truth = {old: as_pieces(value, found["params"][old]) for old, value in found["map"].items()}
    assert {root + old: pieces for old, pieces in table(name).original.items()} == truth


def test_comfyui_spells_hunyuans_blocks_in_its_own_way() -> None:
    assert table("hunyuan-video").spellings["comfy"] == listed("hunyuan-video.comfy-blocks")["map"]


TABLES = sorted({name for family in families().values() for name in family.components.values()})


@pytest.mark.parametrize("name", TABLES)
def test_original_names_cover_every_parameter_exactly_once(name: str) -> None:
    one = table(name)
    covered: dict[str, int] = {}
    for pieces in one.original.values():
        rows = [span for piece in pieces for span in piece.rows or ()]
        end = 0
        for start, stop in sorted(rows):
            assert start == end
            end = stop
        for piece in pieces:
            covered[piece.name] = covered.get(piece.name, 0) + 1
            if piece.rows is not None:
                assert sum(stop - start for start, stop in piece.rows) == one.parameters[piece.name][0]
    # A second name of a tensor may be left out.
    assert covered == {name: 1 for name in one.parameters if name in covered or name not in one.tied}


@pytest.mark.parametrize("name", TABLES)
def test_flattened_names_of_one_scheme_stand_for_one_module(name: str) -> None:
    one = table(name)
    for scheme in one.schemes:
        modules = [path for path, entry in one.named(scheme).items() if path + ".weight" in one.named(scheme)]
        flat: dict[str, Any] = {}
        for path in modules:
            pieces = one.named(scheme)[path].pieces
            assert flat.setdefault(path.replace(".", "_"), pieces) == pieces


def test_templates_count_up_block_by_block() -> None:
    rows = [("in", 0), ("h.{0-1}.a", 1), ("h.{0-1}.b.{2-3}", 2), ("out", 3)]
    expanded = list(expand(rows))
    assert [name for name, _ in expanded] == ["in", "h.0.a", "h.0.b.2", "h.0.b.3", "h.1.a", "h.1.b.2", "h.1.b.3", "out"]


def test_a_family_gives_parameters_originals_and_spellings_by_component() -> None:
    flux = get_family("flux")
    assert flux is not None
    assert list(flux.parameters) == ["transformer", "text_encoder", "text_encoder_2"]
    assert flux.parameters["transformer"]["x_embedder.bias"] == (3072,)
    fused = flux.original["transformer"]["double_blocks.18.img_attn.qkv.bias"]
    assert [piece.name for piece in fused] == [f"transformer_blocks.18.attn.to_{x}.bias" for x in "qkv"]
    assert [piece.rows for piece in fused] == [((0, 3072),), ((3072, 6144),), ((6144, 9216),)]
    assert flux.spellings["transformer"] == {}
