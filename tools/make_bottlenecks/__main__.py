"""``python -m tools.make_bottlenecks``: adapters of AdapterHub's own library, and what models say with them.

Needs an environment with `adapters` 1.3.0 (and the transformers that it asks for); regraft is not needed. Writes
``tests/data/adapterhub``: for each tiny random model its folder, and for each configuration the library's own folder
with the model's outputs in ``expected.safetensors``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

FOLDER = Path(__file__).parents[2] / "tests" / "data" / "adapterhub"
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            dim=8,
            hidden_dim=12,
            n_layers=2,
            n_heads=2,
            vocab_size=24,
            max_position_embeddings=16,
            initializer_range=0.2,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=24, n_positions=16, initializer_range=0.2)
    ),
}
# Name → model, configuration, and whether it is saved as safetensors.
CASES = {
    "houlsby": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=4), False),
    "own-norms": (
        "bert",
        adapters.DoubleSeqBnConfig(
            reduction_factor={"0": 4, "default": 2},
            ln_before=True,
            ln_after=True,
            non_linearity="gelu",
            scaling="learned",
        ),
        False,
    ),
    "post-add": (
        "distilbert",
        adapters.SeqBnConfig(
            reduction_factor=4, mh_adapter=True, residual_before_ln="post_add", non_linearity="leakyrelu"
        ),
        False,
    ),
    "pfeiffer": ("llama", adapters.SeqBnConfig(reduction_factor=4), False),
    "plus": ("llama", adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0), True),
    "left-out": (
        "gpt2",
        adapters.SeqBnConfig(
            reduction_factor=4,
            residual_before_ln=False,
            ln_after=True,
            adapter_residual_before_ln=True,
            scaling=2.0,
            leave_out=[1],
        ),
        False,
    ),
}
#: What every model reads.
IDS = [[3, 7, 5, 9, 2, 11, 4], [8, 1, 23, 6, 6, 10, 0]]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(FOLDER / name)
    for name, (base, config, safe) in CASES.items():
        model = MODELS[base]().from_pretrained(FOLDER / base)
        adapters.init(model)
        model.add_adapter("tiny", config=config)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if ".adapters.tiny." in key:
                # As they begin, they hardly do anything.
                parameter.data += 0.5 * torch.randn(parameter.shape)
        model.set_active_adapters("tiny")
        model.eval()
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor(IDS))
        model.save_adapter(str(FOLDER / name), "tiny", with_head=False, use_safetensors=safe)
        told = FOLDER / name / "adapter_config.json"
        # Where the model was read from is nobody's business.
        told.write_text(told.read_text().replace(f'"{FOLDER / base}"', f'"{base}"'))
        said = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
        save_file({"outputs": said.contiguous()}, FOLDER / name / "expected.safetensors")
    for extra in FOLDER.rglob("generation_config.json"):
        extra.unlink()


if __name__ == "__main__":
    main()
