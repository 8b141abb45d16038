"""What a bridge shows, learnt by the new base alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import Run

from regraft import Adapter, InputError, Refused, UsageError, open_base
from regraft.bridge.delta import DeltaPipeline
from regraft.bridge.x_adapter.files import save_mapper
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.refine import RefineSettings, drawn, refine
from regraft.refine.bridged import check_teacher, painter_of
from regraft.refine.kept import inputs_file
from regraft.refine.samples import objective_of, samples_of
from regraft.refine.unported import taught
from regraft.runtime import load_model
from regraft.runtime.both import BothModels, Side
from regraft.runtime.load import Loaded
from verify import tiny

QUICK = RefineSettings(
    steps=4, look=2, n_inputs=32, rate=3e-2, retention=0.0, prompts=("a cat", "rain"), teacher="bridge"
)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "STEPS", 2)
    monkeypatch.setattr(drawn, "LEVELS", 8)


@pytest.fixture(scope="module")
def here(folder: Path) -> Path:
    return tiny.pipeline(folder / "here")


@pytest.fixture(scope="module")
def there(folder: Path) -> Path:
    return tiny.pipeline(folder / "there", seed=5, channels=(8, 12))


@pytest.fixture(scope="module")
def adapter(here: Path) -> Adapter:
    return tiny.lora({"unet": load_model(here).main}, ("to_q", "to_v"), size=0.4)


@pytest.fixture(scope="module")
def both(here: Path, there: Path) -> BothModels:
    return BothModels.load(open_base(here), open_base(there))


@pytest.fixture(scope="module")
def mapper(both: BothModels, here: Path, there: Path, folder: Path) -> Path:
    made = Mapper(mapper_config(both.old, both.new, blocks=1))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return save_mapper(made, folder / "mapper.safetensors", open_base(here), open_base(there))


def test_the_teachers_pictures_are_the_bridges(both: BothModels, adapter: Adapter, mapper: Path) -> None:
    assert painter_of(both, adapter, replace(QUICK, teacher="adapter")) is None
    bridge = BridgePipeline.from_pretrained(both.old.path, both.new.path, mapper)
    bridge.load_lora_weights(adapter)
    for settings, pipeline in (
        (QUICK, DeltaPipeline(both.old, both.new, adapter)),
        (replace(QUICK, mapper=mapper), bridge),
    ):
        painter = painter_of(both, adapter, settings)
        assert painter is not None
        made = painter(["a cat"], 3, 7)
        generators = [torch.Generator().manual_seed(7 + i) for i in range(3)]
        wanted = pipeline(["a cat"] * 3, num_inference_steps=2, generator=generators, output_type="pt").images
        assert torch.allclose((made.pictures + 1) / 2, wanted.float().cpu(), atol=1e-4)
        batches = samples_of(both, adapter, settings)
        assert "the bridge drew" in batches.made
        assert {batch.made_by for batch in batches.fit} == {"adapter"}


ASKED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guidance": 1.0}, {"guidance_scale": 1.0}),
    ({"bridge_strength": 0.3}, {"strength": 0.3}),
    ({"bridge_strength": (1.5, 0.0)}, {"strength": lambda done: 1.5 - 1.5 * done}),
]
ASKED_OF_MAPPERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bridge_start": 0.3}, {"start": 0.3}),
    ({"lead": 0.1}, {"lead": 0.1}),
    ({"reading": "drawing"}, {"reading": "drawing"}),
    ({"new_prompt": "rain"}, {"new_prompt": "rain"}),
    ({"new_prompt": "rain", "new_guidance": 4.0}, {"new_prompt": "rain", "new_guidance_scale": 4.0}),
]


def test_the_teacher_draws_as_it_is_asked_to(both: BothModels, adapter: Adapter, mapper: Path) -> None:
    bridge = BridgePipeline.from_pretrained(both.old.path, both.new.path, mapper)
    bridge.load_lora_weights(adapter)
    for file, pipeline, cases in (
        (None, DeltaPipeline(both.old, both.new, adapter), ASKED),
        (mapper, bridge, ASKED + ASKED_OF_MAPPERS),
    ):
        drawn_before = []
        for settings, call in ({}, {}), *cases:
            painter = painter_of(both, adapter, replace(QUICK, mapper=file, **settings))
            assert painter is not None
            made = (painter(["a cat"], 1, 7).pictures + 1) / 2
            generator = [torch.Generator().manual_seed(7)]
            wanted = pipeline(["a cat"], num_inference_steps=2, generator=generator, output_type="pt", **call).images
            assert torch.allclose(made, wanted.float().cpu(), atol=1e-4), settings
            assert all((made - before).abs().max() > 1e-3 for before in drawn_before), settings
            drawn_before.append(made)


def test_with_little_memory_the_teachers_bases_take_turns(
    both: BothModels, adapter: Adapter, mapper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves here, but who is asked for is seen: whoever runs is the only one on the device."""
    turns = replace(both, turns="device")
    place: dict[Side, str] = {"old": "cpu", "new": "cpu"}
    ran: set[Side] = set()

    def side_of(model: Loaded) -> Side:
        return "new" if model.main is both.new.main else "old"

    def alone(side: Side) -> Any:
        def check(*_: Any) -> None:
            ran.add(side)
            assert place == {"old": "device", "new": "cpu"} if side == "old" else {"old": "cpu", "new": "device"}

        return check

    monkeypatch.setattr(Loaded, "to", lambda self, device: place.update({side_of(self): device}))
    monkeypatch.setattr(Mapper, "to", lambda self, device: self)
    hooks = [
        module.register_forward_pre_hook(alone(side))
        for side, model in (("old", both.old), ("new", both.new))
        for module in model.main.modules()
    ]
    painter = painter_of(turns, adapter, replace(QUICK, mapper=mapper, low_memory=True))
    assert painter is not None
    painter(["a cat"], 1, 7)
    for hook in hooks:
        hook.remove()
    assert ran == {"old", "new"}
    assert place["old"] == "device"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": "adapter", "mapper": Path("m")}, "--mapper is a bridge's"),
        ({"teacher": "adapter", "bridge_strength": 0.5}, "--bridge-strength is a bridge's"),
        ({"teacher": "adapter", "bridge_start": 0.5}, "--bridge-start is a bridge's"),
        ({"bridge_start": 0.5}, "--bridge-start is a mapper's"),
        ({"new_guidance": 2.0}, "--new-guidance is a mapper's"),
        ({"low_memory": True}, "can't take turns"),
    ],
)
def test_settings_of_another_teacher_are_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_teacher(replace(QUICK, **settings))
    check_teacher(replace(QUICK, guidance=2.0, mapper=Path("m"), lead=0.1, low_memory=True))


def test_what_changes_no_weights_has_no_bridge(here: Path, there: Path) -> None:
    prompt: Any = SimpleNamespace(noun="soft prompt", retains=True)
    for settings in (QUICK, RefineSettings(mapper=Path("m"))):
        with pytest.raises(UsageError, match="a soft prompt is learnt from what the old base writes"):
            taught(prompt, open_base(here), open_base(there), settings)


def test_the_adapter_of_the_new_base_alone_is_what_comes_of_it(
    adapter: Adapter, here: Path, there: Path, mapper: Path, tmp_path: Path
) -> None:
    old, new = open_base(here), open_base(there)
    made = refine(adapter, old, new, settings=replace(QUICK, mapper=mapper), start="zero")
    assert made.report.objective == "sample"
    assert "the bridge drew" in made.report.inputs
    made.save(tmp_path / "refined")
    assert all(update.norm() > 0 for update in made.adapter.updates.values())


def test_bridges_that_can_not_teach_are_told(
    both: BothModels, adapter: Adapter, here: Path, there: Path, mapper: Path, old: Path, drifted: Path
) -> None:
    with pytest.raises(UsageError, match="--objective effect compares outputs"):
        objective_of("effect", both, "bridge")
    assert objective_of("sample", both, "bridge")[0] == objective_of("auto", both, "bridge")[0] == "sample"
    with pytest.raises(Refused, match="another new base"):
        refine(adapter, open_base(here), open_base(here), settings=replace(QUICK, mapper=mapper))
    words = tiny.lora(load_model(old).main, ("q_proj",), size=0.5)
    with pytest.raises(InputError, match="draws no pictures"):
        refine(words, open_base(old), open_base(drifted), settings=replace(QUICK, prompts=None), start="zero")


def test_inputs_of_another_teacher_or_mapper_are_not_read(
    adapter: Adapter, here: Path, there: Path, mapper: Path, tmp_path: Path
) -> None:
    old, new = open_base(here), open_base(there)
    copy = tmp_path / "again.safetensors"
    copy.write_bytes(mapper.read_bytes())
    files = [
        inputs_file(adapter, old, new, settings, True)
        for settings in (
            replace(QUICK, teacher="adapter"), QUICK, replace(QUICK, mapper=mapper), replace(QUICK, mapper=copy),
            *(replace(QUICK, mapper=mapper, **asked) for asked, _ in (*ASKED, *ASKED_OF_MAPPERS)),
        )
    ]  # fmt: skip
    assert files[2] == files[3]
    assert len(set(files)) == len(files) - 1


def test_the_command_takes_a_bridge(
    run: Run, here: Path, there: Path, mapper: Path, adapter: Adapter, tmp_path: Path
) -> None:
    adapter.save(tmp_path / "lora.safetensors", format="diffusers")
    output = tmp_path / "refined.safetensors"
    asked = ("refine", tmp_path / "lora.safetensors", "--from", here, "--to", there, "-o", output, "--start", "zero")
    told = run(*asked, "--mapper", mapper)
    assert (told.code, "--teacher bridge" in told.err) == (2, True)
    (tmp_path / "prompts.txt").write_text("a cat\nrain\n")
    asked += ("--bridge-strength", 0.9, "--guidance", 2, "--new-guidance", 2)
    few = ("--steps", 2, "--n-inputs", 32, "--retention", 0, "--prompts", tmp_path / "prompts.txt")
    made = run(*asked, "--teacher", "bridge", "--mapper", mapper, *few, "--json")
    assert made.code == 0, made.err
    assert "the bridge drew" in made.record["inputs"]
    assert output.is_file()
