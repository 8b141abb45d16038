"""A library for servers: PEFT folders of one rank and scale under safe names, and an index of who can load what."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from library import batch, contents, make_bases
from running import Run
from safetensors.torch import load_file

import regraft
from regraft import Adapter, ModuleRef
from regraft.adapter import MODEL
from regraft.batch import expand, run_batch
from regraft.batch.local import LocalExecutor
from regraft.batch.options import RowOptions
from regraft.batch.rows import Row
from regraft.batch.serving import ServedModel, least_rank, safe_name, serving_rows, uniform
from regraft.batch.serving_index import serving_index
from regraft.errors import UsageError
from regraft.migration import summarise
from regraft.report.json_schema import parse
from regraft.report.serving_schema import ServingReport
from regraft.tensors import InMemory
from regraft.updates import Full, LowRank
from toys import MLP, VOCAB, WIDTH, deltas, llama, lora

PAIR = ("--from", "old.safetensors", "--to", "new", "--jobs", 1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_bases(tmp_path)
    # What servers load is a model's folder.
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "new.safetensors", tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "loras").mkdir()
    return tmp_path


def mixed(seed: int = 1) -> Adapter:
    """Ranks and scales that differ by module, which PEFT writes as patterns."""
    state = llama()
    low, high = lora(state, rank=3, seed=seed, scale=0.5), lora(state, rank=6, seed=seed + 1, scale=1.5)
    chosen = {ref: (high if "v_proj" in ref.path else low).updates[ref] for ref in low.updates}
    return replace(low, updates=chosen)


def index_of(out: Path) -> ServingReport:
    return parse(ServingReport, (out / "serving.json").read_text())


def model_of(state: dict[str, torch.Tensor]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP}
    config = LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize("kind", ["mixed", "rslora", "diffusers names", "bare"])
def test_peft_loads_the_folder_and_draws_what_the_port_means(here: Path, run: Run, kind: str) -> None:
    from peft import PeftModel

    adapter = mixed()
    if kind == "diffusers names":
        updates = {ModuleRef("transformer", ref.path): update for ref, update in adapter.updates.items()}
        replace(adapter, updates=updates, format="diffusers").save(here / "loras" / "my.safetensors")
    elif kind == "bare":
        replace(adapter, layout={"bare": True}).save(here / "loras" / "my.safetensors")
    else:
        adapter.save(here / "loras" / "my")
    if kind == "rslora":
        file = here / "loras" / "my" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "use_rslora": True}))
    assert run("batch", "loras", *PAIR, "--out", "out", "--serve").code == 0
    source = next(path for path in (here / "loras" / "my", here / "loras" / "my.safetensors") if path.exists())
    loaded = regraft.load_adapter(source)
    bases = [regraft.open_base(here / f"{name}.safetensors") for name in ("old", "new")]
    meant = {ref.path: delta for ref, delta in deltas(regraft.port(loaded, *bases, "copy").adapter).items()}
    state = load_file(here / "new.safetensors")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain = model_of(state)(ids).logits
        wanted = model_of({n: w + meant.get(n.removesuffix(".weight"), 0) for n, w in state.items()})(ids).logits
        found = PeftModel.from_pretrained(model_of(state), str(here / "out" / "my"))(ids).logits
    assert (wanted - plain).norm() > 1e-3 * plain.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # What servers read: one factor for all modules, one rank, PEFT's own keys.
    config = json.loads((here / "out" / "my" / "adapter_config.json").read_text())
    tensors = load_file(here / "out" / "my" / "adapter_model.safetensors")
    for path, delta in meant.items():
        up, down = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "BA")
        assert down.shape[0] == config["r"] == 6
        torch.testing.assert_close(config["lora_alpha"] / config["r"] * (up @ down), delta, rtol=1e-4, atol=1e-6)
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(here / "new")


def test_a_module_without_effect_keeps_none() -> None:
    adapter = lora(llama(), scale=0.0)
    ref, update = next(iter(lora(llama(), scale=1.5).updates.items()))
    same = uniform(replace(adapter, updates={**adapter.updates, ref: update}))
    assert {one.scale for one in same.updates.values() if isinstance(one, LowRank)} == {1.5}
    found = deltas(same)
    torch.testing.assert_close(found.pop(ref), update.delta())
    assert not any(delta.any() for delta in found.values())


def test_an_adapter_that_is_uniform_keeps_its_tensors() -> None:
    adapter = lora(llama(), rank=4)
    for ref, update in uniform(adapter).updates.items():
        old = adapter.updates[ref]
        assert isinstance(update, LowRank)
        assert isinstance(old, LowRank)
        assert update.up is old.up
        assert update.down is old.down
        assert update.scale == old.scale


def test_the_index_names_what_each_server_can_load_and_what_was_refused(here: Path, run: Run) -> None:
    state = llama()
    (here / "loras" / "people").mkdir()
    lora(state, rank=12).save(here / "loras" / "people" / "anna")
    lora(state, dora=True).save(here / "loras" / "dora")
    plain, value = lora(state, seed=3), InMemory(state["lm_head.weight"] * 1.1)
    stored = Full(value, "base_model.model.lm_head.weight")
    head = replace(plain, updates={**plain.updates, ModuleRef(MODEL, "lm_head.weight"): stored})
    head.save(here / "loras" / "head")
    some = lora(state, seed=4)
    replace(some, updates=dict(list(some.updates.items())[:-1])).save(here / "loras" / "some")
    (here / "loras" / "bad.safetensors").write_bytes(b"x" * 100)
    (here / "m.csv").write_text(
        "adapter,to\n"
        + "".join(f"loras/{name},new\n" for name in ("people/anna", "dora", "head", "some", "bad.safetensors"))
        + "loras/people/anna,unrelated.safetensors\n"
    )
    ran = run("batch", "m.csv", "--from", "old.safetensors", "--jobs", 1, "--out", "out", "--serve")
    assert "1 of 6 adapters failed" in ran.err
    served, lost = index_of(here / "out").bases
    assert [Path(base.path).stem for base in (served, lost)] == ["new", "unrelated"]
    assert served.fingerprint == summarise(regraft.open_base(here / "new.safetensors")).fingerprint
    adapters = {one.adapter: one for one in served.adapters}
    assert adapters.keys() == {"loras/people/anna", "loras/dora", "loras/head", "loras/some"}
    anna = adapters["loras/people/anna"]
    assert (anna.kind, anna.rank, anna.target_modules) == ("lora", 12, ["down_proj", "q_proj", "v_proj"])
    assert anna.served_by == ["vllm", "sglang", "lorax", "tgi"]
    assert anna.verdict == "survives"
    assert anna.forecast is not None
    assert adapters["loras/dora"].served_by == adapters["loras/head"].served_by == []
    assert "DoRA" in adapters["loras/dora"].blockers[0].reason
    assert "whole weights" in adapters["loras/head"].blockers[0].reason
    # LoRAX and TGI would leave the module out of every layer without a word.
    assert adapters["loras/some"].served_by == ["vllm", "sglang"]
    assert (served.max_lora_rank, lost.max_lora_rank) == (16, None)
    assert [one.adapter for one in served.not_served] == ["loras/bad.safetensors"]
    (refused,) = lost.not_served
    assert refused.status == "refused"
    assert "nothing to do with each other" in refused.reason
    assert "regraft refine" in refused.next
    assert (lost.vllm, lost.sglang, lost.tgi, lost.lines) == (None, None, None, {})
    # The lines hold what can be loaded, and nothing else.
    assert served.vllm is not None
    assert served.vllm[:5] == ["serve", served.path, "--enable-lora", "--max-lora-rank", "16"]
    named = [json.loads(text) for text in served.vllm[6:]]
    assert [one["name"] for one in named] == [anna.name, adapters["loras/some"].name]
    assert all((Path(one["path"]) / "adapter_config.json").is_file() for one in named)
    assert shlex.split(served.lines["vllm"]) == ["vllm", *served.vllm]
    assert served.tgi == f"{anna.name}={here}/out/{anna.folder}"
    assert anna.load is not None
    assert anna.lorax is not None
    assert anna.load.lora_path == anna.lorax.adapter_id == f"{here}/out/{anna.folder}"


def test_a_port_of_a_port_is_not_sent_to_a_refine(here: Path, run: Run) -> None:
    lora(llama()).save(here / "loras" / "a0")
    assert run("batch", "loras", *PAIR, "--out", "out", "--serve").code == 0
    pair = ("--from", "new.safetensors", "--to", "newer.safetensors", "--jobs", 1)
    assert run("batch", "out", *pair, "--out", "again", "--serve").code == 0
    (base,) = index_of(here / "again").bases
    (lost,) = base.not_served
    assert "port the original" in lost.reason
    assert "reason" in lost.next


def test_the_index_is_the_same_whoever_is_first_and_begun_again(here: Path, run: Run) -> None:
    for number in range(3):
        lora(llama(), seed=number).save(here / "loras" / f"a{number}")
    command = ("batch", "loras", *PAIR[:-1])
    assert run(*command, 1, "--out", "one", "--serve", "--serve-from", "/adapters").code == 0
    assert run(*command, 2, "--out", "two", "--serve", "--serve-from", "/adapters/").code == 0
    first = (here / "one" / "serving.json").read_bytes()
    assert (here / "two" / "serving.json").read_bytes() == first
    assert b"/adapters/a0" in first
    before = contents(here / "one")
    ran = run(*command, 1, "--out", "one", "--serve", "--serve-from", "/adapters")
    assert "3 of them had been done before" in ran.out
    assert contents(here / "one") == before
    assert run(*command, 1, "--out", "three").code == 0
    assert not (here / "three" / "serving.json").exists()


def test_a_store_has_lines_for_lorax_alone_unless_a_folder_is_named(here: Path) -> None:
    lora(llama()).save(here / "loras" / "a0")
    fsspec = pytest.importorskip("fsspec")
    for place, told in ((None, "memory://ported"), ("/mnt/ported", "/mnt/ported")):
        serve(here, "memory://ported", serve_from=place)
        found = parse(ServingReport, fsspec.filesystem("memory").cat_file("/ported/serving.json").decode())
        assert found.root == told
        assert (found.bases[0].vllm is None) == (place is None)
        assert (found.bases[0].adapters[0].load is None) == (place is None)


def serve(here: Path, out: str, **given: Any) -> Any:
    rows = serving_rows(expand([str(here / "loras")], "old.safetensors", "new", RowOptions()))
    return run_batch(rows, LocalExecutor(1), out=out, **given)


HOSTILE = [
    "a b",
    "a-b",
    "$(rm -rf x)",
    "`id`;&&|",
    "quote'\"",
    "line\nbreak",
    "../../etc",
    ".hidden",
    "-rf",
    "serving.json",
    "results.jsonl",
    "ünïcode",
    "名前",
    "A-B",
    "x/y",
    "x--y",
    "n" * 240,
    "v1=x,y@main",
    "a\udce9",
]


def test_hostile_names_become_safe_ones_each_its_own_and_stay_so() -> None:
    rows = [Row(f"/lib/{name}", name, "/old", "/new", output=name) for name in HOSTILE]
    names = [row.output for row in serving_rows(rows)]
    assert len({name.casefold() for name in names}) == len(HOSTILE)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        assert len(name) <= 130
        assert shlex.quote(name) == name
        assert name not in ("serving.json", "results.jsonl")
    # What is added later changes no name, but for those that differ by capitals alone.
    alone = {row.name: serving_rows([row])[0].output for row in rows}
    changed = {name for name, now in zip(HOSTILE, names, strict=True) if alone[name] != now}
    assert changed == {"a-b", "A-B"}
    assert (alone["a-b"], alone["x/y"], safe_name("style/ink.safetensors")) == ("a-b", "x--y", "style--ink")


def test_hostile_names_are_ported_under_their_safe_ones(here: Path) -> None:
    told = {"$(touch x)", "-rf", "line\nbreak", "serving.json"}
    # The last is no UTF-8, which safetensors does not open: a row that fails, and stops no other.
    for name in (*told, "na\udce9me"):
        lora(llama()).save(here / "loras" / name)
    record = serve(here, str(here / "out"))
    assert (record.counts.ported, record.counts.failed) == (4, 1)
    (base,) = index_of(here / "out").bases
    folders = {path.name for path in (here / "out").iterdir() if path.is_dir()}
    assert folders == {one.folder for one in base.adapters}
    assert {one.adapter for one in base.adapters} == told
    assert [(one.adapter, one.status) for one in base.not_served] == [("na\udce9me", "failed")]
    assert serve(here, str(here / "out")).counts.reused == 4


def test_ranks_that_vllm_takes() -> None:
    assert [least_rank([rank]) for rank in (1, 4, 16, 17, 300, 512)] == [1, 8, 16, 32, 320, 512]
    assert least_rank([4, 65]) == 128
    assert least_rank([]) is None


def test_what_is_asked_for_wrongly_is_told(here: Path, run: Run) -> None:
    lora(llama()).save(here / "loras" / "a0")
    assert run("batch", "check", "loras", *PAIR, "--serve").code == 2
    ran = run("batch", "loras", *PAIR, "--out", "out", "--serve", "--format", "kohya")
    assert ran.code == 2
    assert "PEFT folders" in ran.err
    with pytest.raises(UsageError, match="kohya"):
        serving_rows([Row("/a", "a", "/o", "/n", RowOptions(format="kohya"), "a")])
    assert batch(["loras"], here / "out").rows[0].serving == []


def test_servers_are_told_of_a_base_by_its_own_name_and_revision(here: Path) -> None:
    assert ServedModel.of("org/name@main") == ServedModel("org/name", "main")
    assert ServedModel.of("org/name") == ServedModel("org/name")
    assert not ServedModel.of("org/name:sub/model.safetensors").whole
    assert not ServedModel.of("/models/new.safetensors").whole
    assert ServedModel.of(str(here / "new")).whole
    lora(llama()).save(here / "loras" / "a0")
    record = serve(here, str(here / "out"))
    for target, words in (
        ("org/name@v2", ["org/name", "--revision", "v2"]),
        ("org/name@v2:sub/model.gguf", None),
        (str(here / "new.safetensors"), None),
    ):
        named = {"update": {"target": target}}
        moved = {"rows": [row.model_copy(**named) for row in record.rows]}
        moved["pairs"] = [pair.model_copy(**named) for pair in record.pairs]
        (base,) = serving_index(record.model_copy(update=moved), "/adapters").bases
        assert (base.vllm and base.vllm[1:4]) == words
        assert (base.sglang and base.sglang[1:4]) == words
        assert ("--model-id org/name --revision v2" in base.lines.get("tgi", "")) == (words is not None)
        assert len(base.adapters) == 1


def test_a_base_that_was_moved_is_named_anew(here: Path, run: Run) -> None:
    lora(llama()).save(here / "loras" / "a0")
    assert run("batch", "loras", *PAIR, "--out", "out", "--serve").code == 0
    (here / "new").rename(here / "moved")
    ran = run("batch", "loras", "--from", "old.safetensors", "--to", "moved", "--jobs", 1, "--out", "out", "--serve")
    assert ran.code == 0, ran.err
    config = json.loads((here / "out" / "a0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == index_of(here / "out").bases[0].path == str(here / "moved")


def test_a_manifest_names_the_adapter_of_each_base(here: Path, run: Run) -> None:
    lora(llama()).save(here / "loras" / "anna")
    (here / "loras" / "m.csv").write_text("adapter,to,output\nanna,../new,anna.v2\nanna,../newer.safetensors,anna.v3\n")
    ran = run("batch", "loras/m.csv", "--from", "old.safetensors", "--jobs", 1, "--out", "out", "--serve")
    assert ran.code == 0, ran.err
    assert {one.name for base in index_of(here / "out").bases for one in base.adapters} == {"anna.v2", "anna.v3"}


def test_a_forced_port_is_in_no_servers_line(here: Path, run: Run) -> None:
    lora(llama()).save(here / "loras" / "a0")
    (here / "unrelated").mkdir()
    shutil.copy(here / "unrelated.safetensors", here / "unrelated" / "model.safetensors")
    (here / "unrelated" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ends = ("--from", "old.safetensors", "--to", "unrelated", "--jobs", 1, "--out", "out")
    assert run("batch", "loras", *ends, "--serve", "--force").code == 0
    (base,) = index_of(here / "out").bases
    (adapter,) = base.adapters
    assert (adapter.served_by, base.vllm, base.lines) == ([], None, {})
    assert "against a refusal" in adapter.blockers[0].reason


def test_a_small_scale_is_rounded_once() -> None:
    low = lora(llama(), scale=1 / 512, dtype=torch.float16)
    ref, update = next(iter(low.updates.items()))
    # So small that half precision has nothing left of it after one more factor of 1/512.
    tiny = replace(update, up=InMemory(update.up.load() * 1e-4 / update.up.load().abs().max()))
    rest = {other: replace(low.updates[other], scale=1 / 256) for other in low.updates if other != ref}
    same = uniform(replace(low, updates={ref: tiny, **rest}))
    torch.testing.assert_close(
        same.updates[ref].delta(), tiny.delta(), rtol=0.1, atol=0.05 * float(tiny.delta().abs().max())
    )
