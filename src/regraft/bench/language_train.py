"""Training of the language models and of PEFT adapters on them: one thread, every draw from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regraft.bench.language_models import CONTEXT
from regraft.bench.language_tokens import encode
from regraft.bench.tuners import Tuner
from regraft.runtime.libraries import library
from regraft.training.kinds import settle

#: Called with a line of the log.
Log = Callable[[str], None]


@dataclass(frozen=True)
class Course:
    """How long and how fast something is trained.

    Attributes:
        steps: of `batch` texts of `CONTEXT` tokens each.
        rate: highest learning rate; it rises over a twentieth of the steps and falls in half a cosine to a tenth.
        batch: texts in a step.
        decay: AdamW's.
    """

    steps: int
    rate: float
    batch: int = 16
    decay: float = 0.01


@dataclass(frozen=True)
class AdapterRecipe:
    """A PEFT LoRA.

    Attributes:
        domain: the text that it learns.
        rank: r.
        targets: names of the modules; "all-linear" is each linear one but the head.
        dora: with magnitudes.
        course: its training.
    """

    domain: str
    rank: int
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    course: Course = field(default_factory=lambda: Course(120, 5e-3, batch=8))


@dataclass(frozen=True)
class TunerRecipe(Tuner, AdapterRecipe):
    """The recipe of an adapter of another kind than LoRA."""


def batches(texts: Sequence[Tensor], course: Course, seed: int) -> Iterator[Tensor]:
    """Windows of ids, (batch, CONTEXT + 1): each from a text drawn at random, every text as likely as the others."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(CONTEXT + 1)
    for _ in range(course.steps):
        which = torch.randint(len(texts), (course.batch,), generator=generator).tolist()
        at = torch.rand(course.batch, generator=generator)
        yield torch.stack(
            [
                texts[i][int(place * (len(texts[i]) - CONTEXT - 1)) + span]
                for i, place in zip(which, at.tolist(), strict=True)
            ]
        )


def train(
    model: Any, texts: Sequence[Tensor], course: Course, seed: int, log: Log, teacher: Any = None, pull: float = 0.5
) -> None:
    """Train what has gradients in ``model`` to foretell the next token.

    Args:
        model: a causal language model, perhaps in PEFT's wrapping.
        texts: token ids of each domain, (tokens,).
        course: how long, how fast.
        seed: of the texts that are drawn.
        log: told of the loss now and then.
        teacher: a model whose distribution is learnt, too, as in distillation.
        pull: the teacher's part of the loss.
    """
    # Models of this size lose more to the exchange between threads than they gain.
    torch.set_num_threads(1)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=course.rate, betas=(0.9, 0.95), weight_decay=course.decay)
    model.train()
    start, mean = process_time(), 0.0
    for step, ids in enumerate(batches(texts, course, seed)):
        for group in optimizer.param_groups:
            group["lr"] = course.rate * pace(step, course.steps)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        whole = loss
        if teacher is not None:
            with torch.no_grad():
                told = teacher(input_ids=ids[:, :-1]).logits.log_softmax(-1)
            away = F.kl_div(logits.log_softmax(-1), told, log_target=True, reduction="none").sum(-1).mean()
            whole = (1 - pull) * loss + pull * away
        torch.autograd.backward(whole)
        nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = float(loss.detach()) if step == 0 else 0.95 * mean + 0.05 * float(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == course.steps:
            log(f"step {step + 1}/{course.steps}: loss {mean:.4f}, {process_time() - start:.0f} s of CPU")
    model.eval()


def pace(step: int, steps: int) -> float:
    """The learning rate's share of its highest."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train_adapter(model: Any, text: Tensor, recipe: AdapterRecipe, seed: int, log: Log) -> Any:
    """A PEFT model around ``model`` with the recipe's adapter trained on ``text``."""
    config = _config(recipe)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = library("peft").get_peft_model(model, config)
    train(wrapped, [text], recipe.course, seed, log)
    if isinstance(recipe, TunerRecipe):
        settle(wrapped, recipe.kind)
    return wrapped


def _config(recipe: AdapterRecipe) -> Any:
    targets = (recipe.targets,) if isinstance(recipe.targets, str) else recipe.targets
    if isinstance(recipe, TunerRecipe):
        config = recipe.config(targets)
        config.task_type = "CAUSAL_LM"
        return config
    return library("peft").LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=targets[0] if isinstance(recipe.targets, str) else list(targets),
        use_dora=recipe.dora,
        task_type="CAUSAL_LM",
    )


def drift(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float | None:
    """Mean of ‖W_new − W_old‖ / ‖W_old‖ over the matrices of the blocks that both have; None where shapes differ."""
    pairs = [(old[n], new[n]) for n in old if ".layers." in n and old[n].dim() == 2 and n in new]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    return float(torch.stack([(b - a).norm() / a.norm() for a, b in pairs]).mean())


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """A text's tokens, the first character by itself, (tokens,)."""
    return torch.cat([encode(tokenizer, text[:1]), encode(tokenizer, text[1:])])


@torch.no_grad()
def losses(model: Any, tokenizer: Any, windows: Sequence[str]) -> Tensor:
    """Mean negative log-likelihood in nats per character of each text's characters but the first, (texts,).

    The first character is a token of its own for every tokenizer, and the rest is read after it: so models of
    different vocabularies answer for the same characters.
    """
    rows = [tokens_of(tokenizer, text) for text in windows]
    longest = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    real = torch.stack([torch.arange(longest) < len(row) for row in rows])[:, 1:]
    logits = model(input_ids=ids[:, :-1]).logits
    each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    characters = torch.tensor([len(text) - 1 for text in windows])
    return (each * real).sum(1) / characters
