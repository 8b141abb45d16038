"""What must be refused before anything is written, and what must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import InputError, Refused, Settings, check, load_adapter, open_base, port
from regraft.base import Base
from regraft.demo import data_folder
from regraft.pairing import names_of
from toys import WIDTH, drifted, llama, lora, save_base


def pair(tmp_path: Path, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> tuple[Base, Base]:
    return open_base(save_base(old, tmp_path / "o.safetensors")), open_base(save_base(new, tmp_path / "n.safetensors"))


@pytest.mark.parametrize("offset", [0.0, 0.3], ids=["centred", "common mean"])
def test_unrelated_weights_under_the_same_names_are_refused(tmp_path: Path, offset: float) -> None:
    old, new = ({name: t + offset for name, t in llama(seed).items()} for seed in (0, 1))
    bases = pair(tmp_path, old, new)
    assert check(lora(llama()), *bases).verdict == "refused"
    with pytest.raises(Refused, match="nothing to do with each other"):
        port(lora(llama()), *bases)


def test_a_target_of_random_weights_is_refused_by_every_method(tmp_path: Path) -> None:
    from regraft.methods import methods

    noise = {name: torch.rand_like(t) for name, t in llama().items()}
    bases = pair(tmp_path, llama(), noise)
    # What fits a map to activations has to run both first: see tests/methods. `stream` asks nothing of the weights.
    for name, method in methods().items():
        if (method.runs and method.per == "pair") or name == "stream":
            continue
        with pytest.raises(Refused):
            port(lora(llama()), *bases, name)


@pytest.mark.parametrize("method", ["copy", "casa", "effect", "procrustes", "lora-x"])
def test_a_base_trained_apart_is_refused_by_methods_that_nothing_came_over_by(method: str) -> None:
    # docs/benchmark.md, sd-other: none of these carried more than a tenth between the two.
    old, new = (open_base(data_folder() / name) for name in ("v1", "v3"))
    adapter = load_adapter(data_folder() / "loras" / "style-v1.safetensors", names=names_of(old))
    assert check(adapter, old, new, method).verdict == "refused"


def test_an_untrained_target_is_refused_even_where_weights_need_not_be_related(tmp_path: Path) -> None:
    from regraft.methods import methods

    # Training leaves a few strong directions in every weight.
    learnt = {n: t + 2 * t[:, :1] @ t[:1] / t[:1].norm() if t.dim() > 1 else t for n, t in llama().items()}
    bases = pair(tmp_path, learnt, llama(3))
    for name in ("copy", *(name for name in ("effect", "stream") if name in methods())):
        with pytest.raises(Refused, match="looks untrained"):
            port(lora(llama()), *bases, name)


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_a_target_that_already_contains_the_adapter_is_refused(tmp_path: Path, strength: float) -> None:
    state, adapter = llama(), lora(llama())
    merged = drifted(state, 0.1)
    for ref, update in adapter.updates.items():
        merged[f"{ref.path}.weight"] = merged[f"{ref.path}.weight"] + strength * update.delta()
    with pytest.raises(Refused, match="already contains this adapter"):
        port(adapter, *pair(tmp_path, state, merged))
    other = lora(llama(), seed=8)
    assert port(other, *pair(tmp_path, state, merged)).report.verdict != "refused"


def test_another_family_is_refused_and_both_are_named(tmp_path: Path) -> None:
    gpt2 = {f"transformer.h.{i}.attn.c_attn.weight": torch.randn(24, 72) for i in range(3)}
    gpt2 |= {"transformer.wte.weight": torch.randn(96, 24), "transformer.wpe.weight": torch.randn(32, 24)}
    lora(llama()).save(tmp_path / "lora")
    with pytest.raises(Refused, match="llama") as refusal:
        port(load_adapter(tmp_path / "lora"), *pair(tmp_path, gpt2, gpt2))
    assert "gpt2" in str(refusal.value)


def test_near_bases_survive_drifted_ones_need_a_refine(tmp_path: Path) -> None:
    state = llama()
    verdicts = {
        d: check(lora(state), *pair(tmp_path, state, drifted(state, d))).verdict for d in (0.0, 0.01, 0.1, 0.4, 0.8)
    }
    assert verdicts == {0.0: "survives", 0.01: "survives", 0.1: "survives", 0.4: "refine", 0.8: "refine"}


def test_one_drifted_layer_is_named_though_the_mean_is_low(tmp_path: Path) -> None:
    state = llama()
    far = drifted(state, 0.4)
    new = {name: far[name] if "layers.2" in name else tensor for name, tensor in state.items()}
    report = check(lora(state), *pair(tmp_path, state, new))
    assert report.distance < 0.2
    assert any("drifted by more than 25%" in reason for reason in report.reasons)


def test_force_overrides_and_is_recorded(tmp_path: Path) -> None:
    import json

    from regraft.lineage import KEY

    result = port(lora(llama()), *pair(tmp_path, llama(0), llama(1)), settings=Settings(force=True))
    assert result.report.forced
    assert result.report.verdict == "refused"
    assert json.loads(result.adapter.metadata[KEY])["ports"][0]["forced"] is True


def test_similarity_is_one_for_equal_weights_and_near_zero_by_chance(tmp_path: Path) -> None:
    equal = check(lora(llama()), *pair(tmp_path, llama(), llama()))
    assert equal.similarity == pytest.approx(1.0)
    assert equal.distance == pytest.approx(0.0)
    chance = check(lora(llama()), *pair(tmp_path, llama(0), llama(1)))
    assert abs(chance.similarity) < 0.1
    assert chance.distance == pytest.approx(2**0.5, rel=0.1)


def test_the_drift_is_seen_where_the_adapter_works(tmp_path: Path) -> None:
    """Drift outside of the update's own spaces does not touch it; the same drift inside does."""
    state, adapter = llama(), lora(llama())
    inside, outside = dict(state), dict(state)
    for ref, update in adapter.updates.items():
        name = f"{ref.path}.weight"
        up, down = update.factors()
        q, k = torch.linalg.qr(up)[0], torch.linalg.qr(down.T)[0]
        noise = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(3)) * 0.05
        within = q @ (q.T @ noise @ k) @ k.T
        inside[name], outside[name] = state[name] + within, state[name] + noise - within
    near = check(adapter, *pair(tmp_path, state, outside)).modules
    hit = check(adapter, *pair(tmp_path, state, inside)).modules
    assert all(row.adapter_distance < 1e-5 < row.distance for row in near)
    assert all(row.adapter_distance > row.distance for row in hit)


def test_units_that_moved_are_not_taken_for_a_merged_adapter(tmp_path: Path) -> None:
    from toys import permutation, regauged

    state = llama()
    for seed in range(4):
        moved = regauged(state, torch.eye(24), permutation(40, seed))
        result = port(
            lora(state, roles=("up_proj", "down_proj"), scale=0.3), *pair(tmp_path, state, moved), "procrustes"
        )
        assert result.report.verdict == "survives"


def test_a_faint_adapter_is_not_refused_for_what_chance_makes_of_a_strong_drift(tmp_path: Path) -> None:
    state = llama()
    for seed in range(12):
        bases = pair(tmp_path, state, drifted(state, 0.36, seed=seed))
        assert check(lora(state, scale=0.3, seed=seed), *bases).verdict == "refine"


def test_no_evidence_is_no_survival(tmp_path: Path) -> None:
    new = pair(tmp_path, llama(), llama())[1]
    report = check(lora(llama()), None, new)
    assert report.verdict == "refine"
    assert "Not judged" in report.summary


def test_a_method_that_leaves_much_behind_does_not_claim_survival(tmp_path: Path) -> None:
    state = llama()
    bases = pair(tmp_path, state, drifted(state, 0.05))
    whole, projected = (port(lora(state), *bases, method).report for method in ("copy", "lora-x"))
    assert whole.verdict == "survives"
    assert projected.verdict == "refine"


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_base_that_was_changed_first_is_told(how: str, tmp_path: Path) -> None:
    changed = replace(lora(llama()), config={"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": how})
    base = open_base(save_base(llama(), tmp_path / "base.safetensors"))
    with pytest.raises(InputError, match=f"init_lora_weights: was trained on a base that {how} had changed"):
        port(changed, base, base)


def _by_peft(how: str, model: torch.nn.Module) -> torch.nn.Module:
    """A model with an adapter of PEFT's whose initialisation changes the base's weights."""
    import peft
    from peft.tuners.lora import preprocess_loraga

    asked = {"lora_ga_config": peft.LoraGAConfig()} if how == "lora_ga" else {"kasa_config": peft.KasaConfig()}
    initial = how if how == "lora_ga" else True
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=initial, **asked)
    ids = torch.arange(8)[None]
    if how == "lora_ga":
        preprocess_loraga(model, config, lambda: model(input_ids=ids, labels=ids).loss.backward())
    tuned = peft.get_peft_model(model, config)
    tuned(input_ids=ids)
    return tuned


@pytest.mark.parametrize("how", ["lora_ga", "kasa"])
def test_what_peft_saves_of_a_base_that_it_changed_first_is_refused(how: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model.save_pretrained(tmp_path / "base")
    tuned = _by_peft(how, model)
    after = tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(after, before, atol=1e-5), "PEFT has changed the base's weight"
    tuned.save_pretrained(tmp_path / "adapter")
    base = open_base(tmp_path / "base")
    with pytest.raises(InputError, match=r"was trained on a base that (lora_ga|KaSA) had changed first"):
        port(load_adapter(tmp_path / "adapter"), base, base)


def test_a_base_of_other_sizes_is_refused_but_by_what_needs_no_module_to_answer_to_another(tmp_path: Path) -> None:
    bases = pair(tmp_path, llama(), llama(seed=7, width=WIDTH + 8))
    assert check(lora(llama()), *bases, "copy").verdict == "refused"
    assert check(lora(llama()), *bases, "stream").verdict == "refine"
