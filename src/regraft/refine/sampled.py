"""Sample distillation of texts: the new base learns what the old one writes with its adapter, in its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regraft.methods._choosing import between, likelihoods
from regraft.probes.batches import TOGETHER, Batch, Batches, Maker, TextBatch, aligned_batches
from regraft.probes.text import encode, sample_texts
from regraft.refine.aims import NO_EFFECT, Aim, distance, no_effect, outputs_of
from regraft.refine.firsts import FirstCharacters
from regraft.refine.teacher import Teacher
from regraft.refine.useful import useless
from regraft.runtime.both import BothModels, Side
from regraft.runtime.load import Loaded

#: Texts to learn from, and the old base's tokens in each.
N_TEXTS, TOKENS = 192, 64
# Of the texts to learn from: so many more to look at, and so many by the new base for retention.
_HELD, _KEPT = 0.25, 0.5


@dataclass(frozen=True)
class TextAim(Aim):
    """Texts that the old base wrote with its adapter, to be as likely to the student as they are to their writer.

    The loss is the student's own, −log p of its next tokens; ``wanted`` is the writer's log-likelihood of the very same
    characters, (n,). Their difference, in nats per token of the new base, estimates KL(writer ‖ student) between
    distributions of texts: 0 is a student that writes as the old base with its adapter does, and the new base alone is
    the unit that progress is told in.

    One sampled token says little of a distribution. In training, the adapter's change of the next character's
    distribution is taught as well (`regraft.refine.firsts`), wherever tokens of both models end: log p_new + log
    p_old+adapter − log p_old. The change, not the old model's own distribution: a longer token that was not taken
    makes the new model rule out characters that the old one, in other tokens, still awaits. One run each on
    a tuning adapter, from characters to 512 tokens, from zero, 192 texts: 0.66 of native after 160 steps; without it
    0.62, and nothing gained after step 100.

    Attributes:
        change: wanted log-probabilities of the next character, (rows, classes).
        firsts: the classes.
    """

    change: Tensor | None = None
    firsts: FirstCharacters | None = None

    def told(self, outputs: Tensor) -> Tensor:
        """A model's logits, (n, positions, vocabulary)."""
        return outputs.float()

    def distance(self, outputs: Tensor) -> Tensor:
        """How much less likely the texts are than to their writer, in nats a token."""
        assert isinstance(self.batch, TextBatch)
        tokens = between(self.batch, "new").sum().clamp_min(1)
        said = likelihoods(outputs, self.batch, "new")
        return (self.wanted.to(said.device) - said).sum() / tokens.to(said.device)

    def loss(self, outputs: Tensor) -> Tensor:
        """The distance, and how far the next character's distribution is from what is wanted."""
        if self.change is None or self.firsts is None:
            return self.distance(outputs)
        got = self.firsts.logs(_rows(outputs, self.batch, "new"), "new")
        return self.distance(outputs) + distance(self.change.to(got.device), got, language=True)


def text_samples(
    models: BothModels,
    teacher: Teacher,
    n: int | None,
    seed: int,
    prompts: Sequence[str] | None,
    *,
    kept: bool,
    dropped: float = 0.0,
) -> Batches:
    """Texts in both models' tokens, by the old base with its adapter; and by the new base, for retention.

    Args:
        models: both bases, with tokenizers.
        teacher: the old one with its adapter.
        n: texts to fit on.
        seed: same seed, same texts.
        prompts: beginnings that the texts go on from, which are not learnt themselves.
        kept: the new base's own texts are among those to fit on.
        dropped: share of the texts written that is left out: those on which the adapter matters least.

    Raises:
        InputError: the texts are empty, or all the same.
    """
    n = n or N_TEXTS
    held = max(4, round(_HELD * n))
    generator = torch.Generator().manual_seed(seed)
    written = round((n + held) / (1 - dropped))
    with models.turn("old"):
        with teacher.at_work():
            texts = _written(models.old, written, generator, prompts)
        _check_useful(texts, models.old, teacher)
        chosen = _mattering(texts, n + held, models.old, teacher)
    fit, held_out = _split(chosen, n, "adapter", models)
    count = max(1, round(_KEPT * n)) if kept else 0
    with models.turn("new"):
        own = _written(models.new, count + held, generator, prompts)
    more, more_held = _split(own, count, "new", models)
    made = f"{n} texts of {TOKENS} tokens, sampled at temperature 1 from the old base with its adapter, seed {seed}"
    if prompts is not None:
        made += f", going on from {len(prompts)} prompts"
    if dropped:
        made += f", out of {written}, those whose likelihood the adapter raises most"
    if kept:
        made += f"; {count} more from the new base, for retention"
    return Batches((*fit, *more), (*held_out, *more_held), made)


@dataclass(frozen=True)
class _Written:
    """A text by a model: its ids (1, positions), and how many of them it was given."""

    ids: Tensor
    given: int


def _written(model: Loaded, n: int, generator: torch.Generator, prompts: Sequence[str] | None) -> list[_Written]:
    """Texts by a model, so many of each prompt, in an order of the generator's: the last are held out."""
    if prompts is None:
        return [_Written(ids, 1) for ids in sample_texts(model, n, generator, TOKENS)]
    found: list[_Written] = []
    for i, prompt in enumerate(prompts):
        beginning = encode(model, prompt)
        # The first ones once more, until there are enough.
        count = n // len(prompts) + (i < n % len(prompts))
        found += [_Written(ids, beginning.shape[1]) for ids in sample_texts(model, count, generator, TOKENS, beginning)]
    return [found[int(i)] for i in torch.randperm(len(found), generator=generator)]


def _check_useful(texts: Sequence[_Written], model: Loaded, teacher: Teacher) -> None:
    """Raises InputError where nothing could be learnt from what was written."""
    if model.tokenizer is None:
        return
    said = [text.strip() for text in _decoded(model, texts)]
    if not any(said):
        what = "writes nothing but empty texts"
    elif len(set(said)) == 1 and len(said) > 1:
        what = f"writes the same text every time ({said[0][:40]!r})"
    else:
        return
    raise useless(teacher.path, what)


def _decoded(model: Loaded, texts: Sequence[_Written]) -> list[str]:
    decoded: list[str] = model.tokenizer.batch_decode([text.ids[0] for text in texts], skip_special_tokens=True)
    return decoded


@torch.no_grad()
def _mattering(texts: Sequence[_Written], n: int, model: Loaded, teacher: Teacher) -> list[_Written]:
    """The ``n`` texts whose likelihood the adapter raises most, per token, in the order that they were written in."""
    if len(texts) <= n:
        return list(texts)
    with teacher.at_work():
        after = [_own_likelihood(model, text) for text in texts]
    gaps = torch.tensor([a - _own_likelihood(model, text) for a, text in zip(after, texts, strict=True)])
    best = gaps.topk(n).indices.sort().values
    return [texts[int(i)] for i in best]


def _own_likelihood(model: Loaded, text: _Written) -> float:
    """Mean log-likelihood of what was written, in nats a token."""
    logits = model.main(input_ids=text.ids.to(model.device)).logits[0, :-1].float()
    said = -F.cross_entropy(logits, text.ids[0, 1:].to(logits.device), reduction="none")
    return float(said[text.given - 1 :].mean())


def _split(texts: Sequence[_Written], n: int, maker: Maker, models: BothModels) -> tuple[list[Batch], list[Batch]]:
    """The first ``n`` texts and the rest, in batches of both models' tokens."""
    return _batches(texts[:n], maker, models), _batches(texts[n:], maker, models)


def _batches(texts: Sequence[_Written], maker: Maker, models: BothModels) -> list[Batch]:
    side: Side = "new" if maker == "new" else "old"
    if not texts:
        return []
    if models.side(side).tokenizer is None:
        # Both number their tokens alike, and without prompts all texts have one length.
        ids = torch.cat([text.ids for text in texts])
        return [TextBatch({"old": part, "new": part}, maker, True) for part in torch.split(ids, TOGETHER)]
    said = [text or " " for text in _decoded(models.side(side), texts)]
    batches = aligned_batches(said, maker, models)
    starts = torch.split(torch.tensor([text.given - 1 for text in texts]), TOGETHER)
    return [_behind(batch, side, start) for batch, start in zip(batches, starts, strict=True)]


def _behind(batch: Batch, side: Side, start: Tensor) -> Batch:
    """A batch whose rows begin where each text's given beginning ends, ``start`` (n,) of that side's places."""
    assert isinstance(batch, TextBatch)
    assert batch.kept is not None
    rows, positions = batch.kept[side], batch.ids[side].shape[1]
    behind = rows % positions >= start[rows // positions]
    return replace(batch, kept={which: found[behind] for which, found in batch.kept.items()}) if behind.any() else batch


def _said(batch: Batch, models: BothModels) -> Tensor:
    """Log-likelihood of every text to the old base as it is now, (n,)."""
    assert isinstance(batch, TextBatch)
    return likelihoods(batch.run(models.old, "old").float(), batch, "old").cpu()


@torch.no_grad()
def _changes(
    models: BothModels, teacher: Teacher, batches: Sequence[Batch], firsts: FirstCharacters
) -> dict[int, Tensor]:
    """Number of each batch by the adapter → wanted log-probabilities of the next character, (rows, classes)."""
    own = {i: batch for i, batch in enumerate(batches) if batch.made_by != "new"}

    def said(side: Side) -> dict[int, Tensor]:
        model = models.side(side)
        return {i: firsts.logs(_rows(b.run(model, side).float(), b, side), side).cpu() for i, b in own.items()}

    with models.turn("old"):
        with teacher.at_work():
            after = said("old")
        before = said("old")
    with models.turn("new"):
        new = said("new")
    return {i: (new[i] + after[i] - before[i]).log_softmax(-1) for i in own}


def _rows(logits: Tensor, batch: Batch, side: Side) -> Tensor:
    """Logits of the places where tokens of both models end, (rows, vocabulary)."""
    rows, flat = batch.rows(side), logits.flatten(0, -2)
    return flat if rows is None else flat[rows.to(flat.device)]


@torch.no_grad()
def text_aims(
    models: BothModels,
    teacher: Teacher,
    batches: Sequence[Batch],
    *,
    tick: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Aim]:
    """A `TextAim` for the adapter's texts; on those of the new base, its own distribution is wanted.

    Raises:
        InputError: the adapter changes nothing in the old base.
    """
    firsts = FirstCharacters.of(models) if models.old.tokenizer is not None else None
    changes = _changes(models, teacher, batches, firsts) if firsts is not None else {}
    wanted: list[Tensor] = []
    first = next(i for i, batch in enumerate(batches) if batch.made_by != "new")
    with models.turn("old"):
        with teacher.at_work():
            for i, batch in enumerate(batches):
                tick(i, 2 * len(batches), "the old base with its adapter")
                wanted.append(_said(batch, models))
        if float((wanted[first] - _said(batches[first], models)).abs().max()) <= NO_EFFECT:
            raise no_effect(teacher.path)
    aims: list[Aim] = []
    for i, (batch, said) in enumerate(zip(batches, wanted, strict=True)):
        tick(len(batches) + i, 2 * len(batches), "the new base without it")
        with models.turn("new"):
            if batch.made_by == "new":
                own, tokens = outputs_of(batch, models.new, "new", None, True)
                aims.append(Aim(batch, own, tokens, True, 0.0, True))
                continue
            aim = TextAim(batch, said, None, True, 0.0, False, changes.get(i), firsts)
            aims.append(replace(aim, size=float(aim.distance(aim.told(batch.run(models.new, "new"))))))
    return aims
