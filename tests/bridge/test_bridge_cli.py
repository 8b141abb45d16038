from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from running import Run
from transformers import LogitsProcessorList

from bridge import drawing, letters
from regraft.base import open_base
from regraft.bridge.delta import DeltaPipeline, strength_of
from regraft.bridge.logits import LogitBridge
from regraft.bridge.run import BridgeSettings, _smaller
from regraft.bridge.x_adapter.files import load_mapper, save_mapper
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.bridge.x_adapter.pipeline import BridgePipeline
from regraft.cli._bridging import course
from regraft.errors import InputError, UsageError, reading
from regraft.formats import load_adapter
from regraft.report.bridge_schema import BridgeReport, BridgeTrainReport
from regraft.report.json_schema import parse
from regraft.runtime import applied, load_model, room
from regraft.runtime.both import BothModels
from verify import tiny


@pytest.fixture(scope="module")
def lora(folder: Path, numbered: tuple[Path, Path]) -> Path:
    model = load_model(numbered[0]).main
    tiny.lora(model, ("q_proj", "v_proj"), size=1.0).save(folder / "lora")
    return folder / "lora"


def test_texts_stand_beside_the_new_bases_own(
    run: Run, lora: Path, numbered: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = numbered
    output, prompts = tmp_path / "texts.txt", ["w3 w7", "w1"]
    asked = ["--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 8]
    result = run("bridge", "run", lora, "--from", first, "--to", second, *asked, "-o", output, "--json")
    assert result.code == 0, result.err
    record = parse(BridgeReport, result.out)
    assert (record.unit, record.strength, record.outputs) == ("texts", 1.0, [str(output)])
    model = load_model(first)
    for text, prompt in zip(record.texts, prompts, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
        alone = model.main.generate(ids, **settings)
        with applied(model.components, load_adapter(lora)):
            adapted = model.main.generate(ids, **settings)
        told = [model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) for made in (alone, adapted)]
        # The second base is the first under other numbers.
        assert [text.new, text.bridged] == told
        assert text.prompt == prompt
        assert text.bridged in output.read_text(encoding="utf-8")
    assert any(text.new != text.bridged for text in record.texts)
    printed = run("bridge", "run", lora, "--from", first, "--to", second, *asked)
    assert record.texts[0].bridged in printed.out


def test_texts_are_drawn_alike_at_one_seed(run: Run, lora: Path, numbered: tuple[Path, Path]) -> None:
    first, second = numbered
    asked = ["bridge", "run", lora, "--from", first, "--to", second, "--prompt", "w1", "--temperature", 1, "--json"]
    told = [run(*asked, "--seed", seed).record["texts"] for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]
    same = run(*asked, "--strength", 0).record["texts"][0]
    assert same["new"] == same["bridged"]


def test_a_mixture_is_what_the_processor_makes_of_it(run: Run, lora: Path, numbered: tuple[Path, Path]) -> None:
    first, second = numbered
    asked = ["bridge", "run", lora, "--from", first, "--to", second, "--prompt", "w3 w7", "--json", "--mix", 0.4]
    record = parse(BridgeReport, run(*asked, "--max-new-tokens", 8).out)
    assert (record.mix, record.way) == (0.4, "logit arithmetic: three passes for a token, weighed by the text so far")
    old, new = load_model(first), load_model(second)
    ids = new.tokenizer("w3 w7", return_tensors="pt")["input_ids"]
    bridge = LogitBridge(old, new, load_adapter(lora), mix=0.4)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    made = new.main.generate(ids, logits_processor=LogitsProcessorList([bridge]), **settings)
    assert record.texts[0].bridged == new.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_pictures_are_a_grid_of_prompts_by_new_and_bridged(run: Run, tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", drift=0.3)
    tiny.lora({"unet": old.main}, ("to_v",), size=1.0).save(tmp_path / "lora.safetensors", format="diffusers")
    bases = ("--from", old.path, "--to", new.path)
    asked = ("bridge", "run", tmp_path / "lora.safetensors", *bases, "--prompt", "a sun", "--prompt", "a boat")
    output = tmp_path / "grid.png"
    result = run(*asked, "--steps", 2, "-o", output, "--json")
    assert result.code == 0, result.err
    record = parse(BridgeReport, result.out)
    assert (record.unit, record.texts, record.outputs) == ("pictures", [], [str(output)])
    grid = imread(output)[:, :, :3]
    side = grid.shape[0] // 2
    assert grid.shape == (2 * side, 2 * side, 3)
    for row, prompt in enumerate(("a sun", "a boat")):
        generator = torch.Generator().manual_seed(row)
        alone = new.pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np").images[0]
        left, right = (grid[row * side : (row + 1) * side, i * side : (i + 1) * side] for i in (0, 1))
        assert np.abs(left - alone).max() < 0.01
        assert np.abs(right - alone).max() > 0.01
    again = run(*asked, "-o", output)
    assert (again.code, "exists already" in again.err) == (1, True)
    without = run(*asked)
    assert (without.code, "--output is missing" in without.err) == (2, True)


def test_size_negative_prompt_and_a_course_of_strength_are_the_pipelines(run: Run, tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", drift=0.3)
    lora = tmp_path / "lora.safetensors"
    tiny.lora({"unet": old.main}, ("to_v",), size=1.0).save(lora, format="diffusers")
    asked = ["--from", old.path, "--to", new.path, "--prompt", "a sun", "--steps", 3, "-o", tmp_path / "grid.png"]
    asked += ["--height", 16, "--width", 32, "--negative-prompt", "a boat", "--strength", "1.5:0.5", "--json"]
    result = run("bridge", "run", "--lora", lora, *asked)
    assert result.code == 0, result.err
    record = parse(BridgeReport, result.out)
    assert (record.strength, record.adapter) == ((1.5, 0.5), str(lora))
    call = {"num_inference_steps": 3, "negative_prompt": "a boat", "height": 16, "width": 32, "output_type": "np"}
    generator = torch.Generator()
    alone = new.pipeline("a sun", generator=generator.manual_seed(0), **call).images[0]
    bridge = DeltaPipeline(old, new, load_adapter(lora))
    made = bridge("a sun", generator=generator.manual_seed(0), strength=lambda done: 1.5 - done, **call).images[0]
    grid = imread(tmp_path / "grid.png")[:, :, :3]
    assert grid.shape == (16, 64, 3)
    assert np.abs(grid[:, :32] - alone).max() < 0.01
    assert np.abs(grid[:, 32:] - made).max() < 0.01
    twice = run("bridge", "run", lora, "--lora", lora, *asked, "--overwrite")
    assert (twice.code, "named twice" in twice.err) == (2, True)


def test_pictures_without_a_file_are_told_before_a_base_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (tiny.pipeline(tmp_path / name) for name in ("old", "new"))
    tiny.lora({"unet": load_model(old).main}, ("to_v",)).save(tmp_path / "lora.safetensors", format="diffusers")
    monkeypatch.setattr(BothModels, "load", lambda *_, **__: pytest.fail("a base was loaded"))
    told = run("bridge", "run", tmp_path / "lora.safetensors", "--from", old, "--to", new, "--prompt", "a")
    assert (told.code, "--output is missing" in told.err) == (2, True)


def test_a_course_of_strength_is_a_number_or_two() -> None:
    assert course("0.85") == 0.85
    assert course("1.5:-0.5") == (1.5, -0.5)
    ramp = strength_of((1.5, 0.5))
    assert callable(ramp)
    assert [ramp(done) for done in (0.0, 0.25, 1.0)] == [1.5, 1.25, 0.5]
    for text in ("", "much", "1:2:3", "1:", "nan", "1:inf"):
        with pytest.raises(UsageError, match="--strength"):
            course(text)


def test_what_can_not_be_bridged_is_told_in_one_line(
    run: Run, lora: Path, numbered: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = numbered
    pipeline = tiny.pipeline(tmp_path / "sd")
    strangers = letters.model(tmp_path / "ab", [], seed=0, letters="ab").path
    cases = [
        ((), 2, "--from and --to"),
        (("--to", second), 2, "--from and --to"),
        (("--from", tmp_path / "gone", "--to", second), 1, "gone"),
        (("--from", first, "--to", pipeline), 1, "of another kind"),
        (("--from", first, "--to", strangers), 1, "shares no token"),
        (("--from", pipeline, "--to", pipeline, "-o", tmp_path / "x.png"), 1, "has no place"),
        (("--from", first, "--to", second, "--strength", "nan"), 2, "--strength"),
        (("--from", first, "--to", second, "--strength", "1:0"), 2, "--strength of a text"),
        (("--from", first, "--to", second, "--mix", "1"), 2, "no part of a mixture"),
        (("--from", pipeline, "--to", pipeline, "--mix", "0.9", "-o", tmp_path / "x.png"), 2, "--mix is of texts"),
        (("--from", first, "--to", second, "--height", 16), 2, "--height is of pictures"),
    ]
    for options, code, words in cases:
        told = run("bridge", "run", lora, *options, "--prompt", "w1")
        assert told.code == code, (options, told.err)
        assert words in told.err
        assert len(told.err.strip().splitlines()) == 1
    assert "--prompt is missing" in run("bridge", "run", lora, "--from", first, "--to", second).err
    assert not list(tmp_path.glob("*.png"))


def test_a_mapper_is_trained_and_run(run: Run, tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", drift=0.3)
    bases, mapper = ("--from", old.path, "--to", new.path), tmp_path / "mapper.safetensors"
    quick = ("--pictures", 8, "--steps", 4, "--batch", 4, "--blocks", 1, "--rate", 0.05)
    strip = tmp_path / "strip.png"
    result = run("bridge", "train", *bases, "--self", "-o", mapper, *quick, "--strip", strip, "--json")
    assert result.code == 0, result.err
    record = parse(BridgeTrainReport, result.out)
    assert record.outputs == [str(mapper), str(strip)]
    drawn = imread(strip)[:, :, :3]
    side = drawn.shape[0] // 4
    # Old, new, and the bridge before the first step, which is the new base under an empty prompt, and at the last.
    assert drawn.shape == (4 * side, 4 * side, 3)
    before, after = (drawn[:, i * side : (i + 1) * side] for i in (2, 3))
    assert np.abs(before - after).max() > 0.01
    assert (record.steps, record.looks[-1].step, record.rate) == (4, 4, 0.05)
    assert [level.new for level in record.levels] == ["up_blocks.0", "up_blocks.1"]
    again = run("bridge", "train", *bases, "--self", "-o", mapper, *quick)
    assert (again.code, "exists already" in again.err) == (1, True)

    tiny.lora({"unet": old.main}, ("to_v",), size=1.0).save(tmp_path / "lora.safetensors", format="diffusers")
    asked = ("bridge", "run", tmp_path / "lora.safetensors", *bases, "--mapper", mapper, "--prompt", "a sun")
    grid = tmp_path / "grid.png"
    result = run(*asked, "--steps", 2, "-o", grid, "--json")
    assert result.code == 0, result.err
    assert "X-Adapter" in parse(BridgeReport, result.out).way
    pixels = imread(grid)[:, :, :3]
    half = pixels.shape[1] // 2
    generator = torch.Generator().manual_seed(0)
    alone = new.pipeline("a sun", num_inference_steps=2, generator=generator, output_type="np").images[0]
    assert np.abs(pixels[:, :half] - alone).max() < 0.01
    assert np.abs(pixels[:, half:] - alone).max() > 0.01
    narrow = run(*asked, "--steps", 2, "-o", tmp_path / "half.png", "--dtype", "bfloat16", "--json")
    assert narrow.code == 0, narrow.err
    # Eight bits of a number are left.
    assert 0 < np.abs(imread(tmp_path / "half.png")[:, :half, :3] - pixels[:, :half]).mean() < 0.02
    unknown = run(*asked, "-o", tmp_path / "x.png", "--dtype", "int8")
    assert (unknown.code, "--dtype" in unknown.err) == (2, True)
    switched = run(*asked, "--to", old.path, "--steps", 2, "-o", tmp_path / "x.png")
    assert (switched.code, "made for another new base" in switched.err) == (3, True)
    assert not (tmp_path / "x.png").exists()


def test_options_of_a_mapper_are_the_pipelines(run: Run, tmp_path: Path) -> None:
    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", drift=0.3)
    lora, file = tmp_path / "lora.safetensors", tmp_path / "mapper.safetensors"
    tiny.lora({"unet": old.main}, ("to_v",), size=1.0).save(lora, format="diffusers")
    mapper = Mapper(mapper_config(old, new, 2, blocks=1))
    generator = torch.Generator().manual_seed(0)
    for parameter in mapper.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_mapper(mapper, file, open_base(old.path), open_base(new.path))
    bridge = BridgePipeline(old, new, mapper)
    bridge.load_lora_weights(lora)
    asked = ("bridge", "run", lora, "--from", old.path, "--to", new.path, "--prompt", "a sun", "--steps", 3)
    pictures = []
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        (("--start", 0.5), {"start": 0.5}),
        (("--lead", 0.1), {"lead": 0.1}),
        (("--reading", "plugged"), {"reading": "plugged"}),
        (
            ("--new-prompt", "a boat", "--new-guidance", 3, "--guidance", 2),
            {"new_prompt": "a boat", "new_guidance_scale": 3.0, "guidance_scale": 2.0},
        ),
    ]
    for number, (options, call) in enumerate(cases):
        grid = tmp_path / f"{number}.png"
        result = run(*asked, "--mapper", file, *options, "-o", grid)
        assert result.code == 0, result.err
        made = bridge(
            "a sun", num_inference_steps=3, generator=generator.manual_seed(0), output_type="np", **call
        ).images[0]
        shown = imread(grid)[:, made.shape[1] :, :3]
        assert np.abs(shown - made).max() < 0.01, options
        assert all(np.abs(shown - before).max() > 0.01 for before in pictures), options
        pictures.append(shown)
        if options:
            without = run(*asked, *options, "-o", tmp_path / "x.png")
            assert (without.code, f"{options[0]} is a mapper's" in without.err) == (2, True)


def test_a_training_with_a_budget_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    old, new = (tiny.pipeline(tmp_path / name, drift=drift) for name, drift in (("old", 0.0), ("new", 0.3)))
    quick = ("--pictures", 4, "--varied", 0, "--steps", 3, "--batch", 2, "--blocks", 1, "--rate", 0.05)
    asked = ("bridge", "train", "--from", old, "--to", new, "--self", *quick, "--json")
    whole, parts, twice = (tmp_path / f"{name}.safetensors" for name in ("whole", "parts", "twice"))
    assert run(*asked, "-o", whole).code == 0
    stopped = parse(BridgeTrainReport, run(*asked, "-o", parts, "--budget", "0.001").out)
    assert (stopped.steps, "budget" in stopped.stopped) == (1, True)
    result = run(*asked, "-o", parts, "--resume", "--overwrite")
    assert result.code == 0, result.err
    assert [look.step for look in parse(BridgeTrainReport, result.out).looks] == [0, 1, 3]
    first, second = load_mapper(whole).state_dict(), load_mapper(parts).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    result = run(*asked, "-o", twice, "--gradient-checkpointing")
    assert result.code == 0, result.err
    # Without --resume it begins anew.
    assert [look.step for look in parse(BridgeTrainReport, result.out).looks] == [0, 3]


def test_a_controlnet_alone_is_a_plug_in(run: Run, tmp_path: Path) -> None:
    from diffusers import ControlNetModel
    from PIL import Image

    old, new = drawing.pipeline(tmp_path / "old"), drawing.pipeline(tmp_path / "new", drift=0.3)
    net = ControlNetModel.from_unet(old.main, conditioning_embedding_out_channels=(4, 8))
    for parameter in net.controlnet_mid_block.parameters():
        parameter.data.fill_(0.5)
    net.save_pretrained(tmp_path / "net")
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / "edges.png")
    bases = ("--from", old.path, "--to", new.path, "--prompt", "a sun", "--steps", 2, "-o", tmp_path / "grid.png")
    given = ("--controlnet", tmp_path / "net", "--control-image", tmp_path / "edges.png")
    result = run("bridge", "run", *bases, *given, "--json")
    assert result.code == 0, result.err
    assert parse(BridgeReport, result.out).adapter == str(tmp_path / "net")
    pixels = imread(tmp_path / "grid.png")[:, :, :3]
    half = pixels.shape[1] // 2
    assert np.abs(pixels[:, :half] - pixels[:, half:]).max() > 0.01
    for scale in (0.5, 0):
        assert run("bridge", "run", *bases, *given, "--control-scale", scale, "--overwrite").code == 0
        weaker = imread(tmp_path / "grid.png")[:, :, :3]
        assert np.abs(weaker[:, half:] - pixels[:, half:]).max() > 0.01
    assert np.abs(weaker[:, :half] - weaker[:, half:]).max() < 0.01
    for options, words in (((), "no plug-in"), (given[:2], "go together"), (given[2:], "no plug-in")):
        told = run("bridge", "run", *bases, *options, "--overwrite")
        assert (told.code, words in told.err) == (2, True), told.err
    (tmp_path / "edges.png").write_bytes(b"no picture")
    told = run("bridge", "run", *bases, *given, "--overwrite")
    assert (told.code, "edges.png" in told.err, len(told.err.strip().splitlines())) == (1, True, 1), told.err


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
FULL_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_memory_that_runs_out_ends_in_what_takes_less(
    run: Run, lora: Path, numbered: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("--from", numbered[0], "--to", numbered[1], "--prompt", "w1")
    pair = [tiny.pipeline(tmp_path / name) for name in ("old", "new")]
    bases = ("--from", pair[0], "--to", pair[1])
    pictures = (*bases, "--prompt", "w1", "-o", tmp_path / "grid.png")
    training = ("train", *bases, "--self", "-o", tmp_path / "m.safetensors")
    learning = ("--batch", "--gradient-checkpointing", "--dtype bfloat16")

    def fail(error: BaseException) -> Any:
        def failing(*_: object, **__: object) -> None:
            raise error

        return failing

    for place, error, asked, ways in (
        ("regraft.bridge.logits.LogitBridge.__call__", FULL, ("run", lora, *texts), ("--dtype bfloat16",)),
        ("regraft.bridge.run._drawer", FULL_CPU, ("run", lora, *pictures), ("--dtype bfloat16",)),
        ("regraft.bridge.run._drawer", MemoryError(), ("run", lora, *pictures, "--dtype", "float16"), ("with more",)),
        ("regraft.bridge.x_adapter.training.paired_pictures", FULL, training, learning),
        ("", None, training, ("--dtype bfloat16",)),
        ("", None, ("run", lora, *texts), ("--dtype bfloat16",)),
    ):
        with monkeypatch.context() as patch:
            if error is None:
                patch.setattr(room, "free_bytes", lambda device: 0)
            else:
                patch.setattr(place, fail(error))
            told = run("bridge", *asked)
        assert told.code == 1, (place, told.err)
        assert all(way in told.err for way in ways), told.err
        assert not any(other in told.err for other in ("--exclude", "--weights-only", "Download"))
        assert len(told.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_what_takes_less_memory_depends_on_what_was_asked_for() -> None:
    assert _smaller(BridgeSettings()) == "Free some, or take --dtype bfloat16 or a machine with more."
    on_gpu = _smaller(BridgeSettings(device="cuda", mapper=Path("m")))
    assert "--dtype bfloat16 or --low-memory or --device cpu" in on_gpu
    assert "--low-memory (with --mapper)" in _smaller(BridgeSettings(device="cuda"))
    assert "--low-memory" not in _smaller(BridgeSettings(device="cuda", mapper=Path("m"), low_memory=True))


def test_memory_that_runs_out_while_a_file_is_read_is_no_damage_to_it() -> None:
    for error in (FULL, FULL_CPU, MemoryError()):
        with pytest.raises(type(error)), reading("base"):
            raise error
    with pytest.raises(InputError, match="can't be read"), reading("base"):
        raise RuntimeError("a bad zip")


def test_what_can_not_be_trained_is_told_in_one_line(run: Run, numbered: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = tiny.pipeline(tmp_path / "sd"), tiny.pipeline(tmp_path / "sd2")
    (tmp_path / "empty").mkdir()
    output = ("-o", tmp_path / "m.safetensors")
    bases = ("--from", first, "--to", second)
    cases = [
        (("--from", first, "--self", *output), 2, "--from and --to"),
        ((*bases, *output), 2, "--data or --self"),
        ((*bases, "--self"), 2, "--output is missing"),
        ((*bases, "--self", "-o", tmp_path / "m.pt"), 2, "no .safetensors"),
        ((*bases, "--data", tmp_path / "empty", *output), 1, "has no pictures"),
        ((*bases, "--data", tmp_path / "gone", *output), 1, "no such folder"),
        ((*bases, "--self", "--levels", "up_blocks.0", *output), 2, "--levels"),
        ((*bases, "--self", "--levels", "7", *output), 1, "can't be paired"),
        ((*bases, "--self", "--fusion", "sum", *output), 2, "--fusion"),
        ((*bases, "--self", "--lead", "2", *output), 2, "--lead"),
        (("--from", numbered[0], "--to", numbered[1], "--self", *output), 1, "no diffusion model"),
        (("--from", first, "--to", numbered[0], "--self", *output), 1, "of another kind"),
    ]
    for options, code, words in cases:
        told = run("bridge", "train", *options)
        assert told.code == code, (options, told.err)
        assert words in told.err, (words, told.err)
        assert len(told.err.strip().splitlines()) == 1
    assert not output[1].exists()
