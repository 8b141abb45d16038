"""SCEPTR's network on its own parameter names, made-up receptors as inputs, and LoRAs trained on a made-up property.

The names and the arithmetic are those of libtcrlm 1.1 (`Bert` with `CdrSimpleEmbedder`), so that a state dict of the
package loads strictly; its tokeniser would bring pandas and gene tables along, and made-up inputs need neither.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

_AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_CLS, _FIRST_AMINO_ACID = 2, 3
_HEADS = 8
# Loop lengths as they are common in the six loops; alpha chain first.
_LOOPS = ((5, 7), (5, 8), (11, 16), (5, 6), (5, 7), (11, 18))
# Kyte and Doolittle 1982, in the order of `_AMINO_ACIDS`.
_HYDROPATHY = (
    1.8, 2.5, -3.5, -3.5, 2.8, -0.4, -3.2, 4.5, -3.9, 3.8, 1.9, -3.5, -1.6, -3.5, -4.5, -0.8, -0.7, 4.2, -0.9, -1.3
)  # fmt: skip

# Residue volumes in cubic ångström (Zamyatnin 1972), in the same order.
_VOLUME = (
    88.6, 108.5, 111.1, 138.4, 189.9, 60.1, 153.2, 166.7, 168.6, 166.7,
    162.9, 114.1, 112.7, 143.8, 173.4, 89.0, 116.1, 140.0, 227.8, 193.6
)  # fmt: skip
#: Properties of an amino acid that an adapter can be taught to write.
PROPERTIES = {"hydropathy": _HYDROPATHY, "volume": _VOLUME}

# Its fused in_proj_weight is a parameter of the attention, no linear module: LoRAs go to the other three.
_STACK = "_self_attention_stack._standard_stack._self_attention_stack.layers"


class Protein(nn.Module):
    """Six loops of a receptor, (n, tokens, 4), to its normalised CLS vector, (n, width)."""

    # Modules that hold modules under the package's names; the type of their parts is of no interest.
    _token_embedder: Any
    _self_attention_stack: Any
    _mlm_token_prediction_projector: Any

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self._token_embedder = nn.Module()
        self._token_embedder._token_embedding = _OneHot(23)
        self._token_embedder._compartment_embedding = _OneHot(7)
        block = nn.TransformerEncoderLayer(width, _HEADS, 4 * width, dropout=0.0, batch_first=True)
        stack = self._self_attention_stack = nn.Module()
        stack._initial_projector = nn.Linear(29, width, bias=False)
        stack._standard_stack = nn.Module()
        stack._standard_stack._self_attention_stack = nn.TransformerEncoder(block, layers)
        self._mlm_token_prediction_projector = nn.Module()
        self._mlm_token_prediction_projector.projector = nn.Linear(width, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens are (amino acid, position from 1, loop's length, loop), 0 where there is none."""
        kind, position, length, loop = tokens.unbind(-1)
        relative = torch.where(position == 0, 0.0, (position - 1) / (length - 1).clamp_min(1))
        embedded = torch.cat(
            [
                self._token_embedder._token_embedding(kind),
                relative.unsqueeze(-1),
                self._token_embedder._compartment_embedding(loop),
            ],
            dim=-1,
        )
        stack = self._self_attention_stack
        hidden = stack._initial_projector(embedded)
        hidden = stack._standard_stack._self_attention_stack(hidden, src_key_padding_mask=kind == 0)
        return nn.functional.normalize(hidden[:, 0], dim=1)


class _OneHot(nn.Module):
    _token_embeddings: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("_token_embeddings", torch.zeros(n, n - 1))

    def forward(self, indices: Tensor) -> Tensor:
        return self._token_embeddings[indices]


def load_protein(file: Path) -> Protein:
    """A model from its bare safetensors file; width and depth are read from the shapes."""
    # The fused inference path of nn.TransformerEncoder reads its weights past every hook and parametrisation.
    torch.backends.mha.set_fastpath_enabled(False)
    state = load_file(file)
    width = state["_self_attention_stack._initial_projector.weight"].shape[0]
    layers = len([name for name in state if name.endswith("linear1.weight")])
    model = Protein(width, layers)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def receptors(n: int, seed: int, property: str = "hydropathy") -> tuple[Tensor, Tensor]:
    """Made-up receptors, (n, tokens, 4), and a standardised property of their last loop, (n,).

    Amino acids are uniform; the two third loops start with C and end with F, as real ones do.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, means = [], []
    for _ in range(n):
        tokens = [(_CLS, 0, 0, 0)]
        for loop, (shortest, longest) in enumerate(_LOOPS, start=1):
            length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
            acids = torch.randint(0, 20, (length,), generator=generator).tolist()
            if shortest > 10:
                acids[0], acids[-1] = _AMINO_ACIDS.index("C"), _AMINO_ACIDS.index("F")
            tokens += [(_FIRST_AMINO_ACID + acid, at, length, loop) for at, acid in enumerate(acids, start=1)]
        rows.append(torch.tensor(tokens))
        means.append(sum(PROPERTIES[property][acid] for acid in acids) / len(acids))
    values = torch.tensor(means)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), (values - values.mean()) / values.std()


@dataclass(frozen=True)
class Lora:
    """Module path → (A (r, in), B (out, r)), scale 1."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]

    def weights(self, model: Protein) -> dict[str, Tensor]:
        """The model's weights with the update in them."""
        own = dict(model.named_parameters())
        return {f"{path}.weight": own[f"{path}.weight"] + b @ a for path, (a, b) in self.pairs.items()}

    def save(self, folder: Path) -> Path:
        """A folder as PEFT writes it."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for path, (a, b) in self.pairs.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach().contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = b.detach().contiguous()
        rank = next(iter(self.pairs.values()))[0].shape[0]
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(self.pairs)}
        config |= {"bias": "none", "inference_mode": True, "task_type": None}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return folder


def load_lora(folder: Path) -> Lora:
    """A LoRA that `Lora.save` or regraft wrote; alpha and its patterns go into B."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alphas = [alpha for pattern, alpha in (config.get("alpha_pattern") or {}).items() if _names(pattern, path)]
        alpha = alphas[0] if alphas else config["lora_alpha"]
        pairs[path] = (a, tensors[name.replace("lora_A", "lora_B")] * (alpha / a.shape[0]))
    return Lora(pairs)


def _names(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def outputs(model: Protein, inputs: Tensor, lora: Lora | None = None) -> Tensor:
    """Vectors (n, width) of the inputs, with or without an adapter."""
    with torch.no_grad():
        changed = lora.weights(model) if lora is not None else {}
        return torch.cat([functional_call(model, changed, (part,)) for part in torch.split(inputs, 256)])


def new_lora(model: Protein, layers: list[int], rank: int, seed: int) -> Lora:
    """As PEFT initialises: A uniform by its width, B zero."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in layers:
        for name in ("self_attn.out_proj", "linear1", "linear2"):
            path = f"{_STACK}.{layer}.{name}"
            out, width = model.get_parameter(f"{path}.weight").shape
            a = (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
            pairs[path] = (a.requires_grad_(), torch.zeros(out, rank).requires_grad_())
    return Lora(pairs)


def direction(width: int) -> Tensor:
    """The unit vector (width,) that the property is to be written along: the same for all seeds and bases."""
    return nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(width)), dim=0)


def wanted_vectors(plain: Tensor, values: Tensor) -> Tensor:
    """What an adapter is to make of a base's own vectors (n, width): a property (n,) written along one direction."""
    return nn.functional.normalize(plain + 0.3 * values.unsqueeze(1) * direction(plain.shape[1]), dim=1)


def train_lora(
    file: Path, layers: list[int], seed: int, *, rank: int = 4, steps: int = 150, property: str = "hydropathy"
) -> Lora:
    """Teach a base to write a property of the last loop along one direction of its vector, and to keep the rest.

    Args:
        file: the base.
        layers: which layers get a LoRA.
        seed: of initialisation and inputs.
        rank: of the LoRA.
        steps: of 32 receptors each.
        property: a key of `PROPERTIES`.
    """
    model = load_protein(file)
    lora = new_lora(model, layers, rank, seed)
    inputs, values = receptors(2048, 1000 + seed, property)
    wanted = wanted_vectors(outputs(model, inputs), values)
    parameters = [tensor for pair in lora.pairs.values() for tensor in pair]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(0, len(inputs), (32,), generator=generator)
        vectors = functional_call(model, lora.weights(model), (inputs[batch],))
        loss = (vectors - wanted[batch]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lora
