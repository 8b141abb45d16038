"""PEFT's own tuners, ported on the command line and loaded by PEFT again: the outputs are those that were meant."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cli.running import Run
from verify import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

#: Name → config class and options; of a llama, whose projections are of several sizes.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr both": ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "oft exact": ("OFTConfig", {"oft_block_size": 8, "r": 0, "use_cayley_neumann": False}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 12, "d_initial": 0.3}),
    "vera drawn": ("VeraConfig", {"r": 12, "d_initial": 0.3, "save_projection": False, "projection_prng_key": 3}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 60, "random_loc_seed": 3, "scaling": 20.0}),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[3, 4, 5, 6, 7, 40, 41]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny.llama(folder / "old"), tiny.llama(folder / "new", drift=0.1)


@cache
def _read(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def loaded(folder: Path) -> nn.Module:
    return copy.deepcopy(_read(folder))


def with_adapter(base: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(loaded(base), folder).eval()


def trained(case: str, base: nn.Module) -> PeftModel:
    """PEFT's adapter, whose every tensor has a value that a training could have given it."""
    name, options = CASES[case]
    model = get_peft_model(base, getattr(peft, name)(target_modules=TARGETS, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            around = any(word in key for word in ("ia3_l", "boft_s", "magnitude", "lambda_d"))
            noise = torch.randn_like(parameter) * (1.0 if "spectrum" in key else 0.2)
            parameter.data = parameter.data + noise if around else noise
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_peft_loads_what_was_ported_to_the_outputs_that_were_meant(
    case: str, bases: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    old, new = bases
    model = trained(case, loaded(old))
    theirs = tmp_path / "theirs"
    model.save_pretrained(theirs)

    def ported(base: Path, method: str, *options: str) -> Tensor:
        out = tmp_path / f"{base.name} {method}"
        ran = run("port", theirs, "--from", old, "--to", base, "--method", method, *options, "-o", out)
        assert ran.code == 0, ran.err
        return logits(with_adapter(base, out))

    # On the same base nothing changes, whatever the method.
    assert gap(logits(loaded(old)), logits(model)) > 0.02
    for method in ("copy", "procrustes"):
        assert gap(ported(old, method), logits(model)) < 1e-4
    # A copy acts on the new base as the folder itself does.
    assert gap(ported(new, "copy"), logits(with_adapter(new, theirs))) < 1e-4
    # W_t + U U^T (W_s' - W_s) V V^T (LoRA-X, arXiv 2501.16559, eq. 3), W_s' as PEFT merges it on the old base.
    before, after, meant = loaded(old).state_dict(), model.merge_and_unload().state_dict(), loaded(new)
    changed = 0
    for name, weight in meant.named_parameters():
        change = after[name] - before[name]
        if change.any():
            u, _, vh = torch.linalg.svd(weight, full_matrices=False)
            weight += u[:, :6] @ u[:, :6].mT @ change @ vh[:6].mT @ vh[:6]
            changed += 1
    assert changed == 6
    found = ported(new, "lora-x", "--subspace-rank", "6", "--rank", "full")
    assert gap(logits(loaded(new)), logits(meant)) > 0.02
    assert gap(found, logits(meant)) < 1e-3
