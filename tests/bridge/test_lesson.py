"""What a mapper is taught on: who is told what, under whose noise, and at which noise level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bridge import drawing
from regraft.bridge.levels import Levels
from regraft.bridge.x_adapter.lesson import BridgeLesson, PairedPictures
from regraft.bridge.x_adapter.mapper import Mapper
from regraft.bridge.x_adapter.pairing import mapper_config
from regraft.probes.batches_diffusion import DiffusionBatch
from regraft.runtime import Loaded

CAPTIONS = tuple(f"{first} {second}" for first in "abcdef" for second in "abcdef")
N = len(CAPTIONS)
Pair = tuple[Loaded, Loaded]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("pair")
    return drawing.pipeline(place / "old"), drawing.pipeline(place / "new", drift=0.3, prediction="v_prediction")


@pytest.fixture(scope="module")
def pictures() -> PairedPictures:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(N, 4, 8, 8, generator=generator) for _ in range(2))
    return PairedPictures(old, new, CAPTIONS)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Loaded, DiffusionBatch]]:
    """Each pass of either base, in order."""
    found: list[tuple[Loaded, DiffusionBatch]] = []
    predict = DiffusionBatch.predict

    def noting(self: DiffusionBatch, model: Loaded, conditions: dict[str, object]) -> Tensor:
        found.append((model, self))
        return predict(self, model, conditions)

    monkeypatch.setattr(DiffusionBatch, "predict", noting)
    return found


def taught(pair: Pair, pictures: PairedPictures, *, lead: float = 0.3, seed: int = 1, **settings: float) -> float:
    """The loss on all pictures, in an order of their own."""
    mapper = Mapper(mapper_config(*pair, 2, blocks=1, lead=lead))
    # Every second picture is held out.
    lesson = BridgeLesson(*pair, mapper, pictures, range(0, N, 2), range(1, N, 2), **settings)
    loss = float(lesson.loss(pair[1], ORDER, torch.Generator().manual_seed(seed)).detach())
    lesson.close()
    return loss


ORDER = [*range(5, N // 2), *range(5)]
ROWS = [2 * i for i in ORDER]


def noise_in(model: Loaded, batch: DiffusionBatch, clean: Tensor) -> Tensor:
    """ε of states α x + σ ε, (n, numbers of a picture)."""
    mixes = torch.tensor([Levels(model).mix(ratio) for ratio in ratios_of(model, batch)])
    alpha, sigma = (part[:, None, None, None] for part in mixes.unbind(1))
    return ((batch.latents[1] - alpha * clean) / sigma).flatten(1)


def ratios_of(model: Loaded, batch: DiffusionBatch) -> list[float]:
    return [Levels(model).ratio(float(time)) for time in batch.timesteps]


def test_the_old_base_reads_the_captions_and_the_new_one_none(
    pair: Pair, pictures: PairedPictures, ran: list[tuple[Loaded, DiffusionBatch]]
) -> None:
    wanted = tuple(CAPTIONS[i] for i in ROWS)
    silence = ("",) * len(ROWS)
    for settings, to_old, to_new in (
        ({"dropped": 0.0}, wanted, silence),
        ({"dropped": 1.0}, silence, silence),
        ({"dropped": 0.0, "prompted": 1.0}, wanted, wanted),
    ):
        ran.clear()
        taught(pair, pictures, **settings)
        (first, old), (second, new) = ran
        assert (first is pair[0], second is pair[1]) == (True, True)
        assert (old.prompts, new.prompts) == (to_old, to_new)
    ran.clear()
    taught(pair, pictures, dropped=0.5, prompted=0.5)
    heard = [[told == caption for told, caption in zip(batch.prompts, wanted, strict=True)] for _, batch in ran]
    assert all(0.1 < sum(side) / len(side) < 0.9 for side in heard)
    assert heard[0] != heard[1]
    assert all(told in ("", caption) for _, batch in ran for told, caption in zip(batch.prompts, wanted, strict=True))


def test_every_latent_has_noise_of_its_own(
    pair: Pair, pictures: PairedPictures, ran: list[tuple[Loaded, DiffusionBatch]]
) -> None:
    taught(pair, pictures)
    (_, old), (_, new) = ran
    drawn = noise_in(pair[0], old, pictures.old[ROWS]), noise_in(pair[1], new, pictures.new[ROWS])
    for noise in drawn:
        # As each is of its own pictures, so many standard normal numbers are left.
        assert abs(float(noise.mean())) < 0.05
        assert abs(float(noise.std()) - 1) < 0.05
        alike = torch.corrcoef(noise) - torch.eye(len(ROWS))
        assert float(alike.abs().max()) < 0.4
    between = torch.corrcoef(torch.stack([part.flatten() for part in drawn]))[0, 1]
    assert abs(float(between)) < 0.1


def test_the_old_bases_noise_is_a_share_of_the_new_ones(
    pair: Pair, pictures: PairedPictures, ran: list[tuple[Loaded, DiffusionBatch]]
) -> None:
    for lead in (0.3, 1.0):
        ran.clear()
        taught(pair, pictures, lead=lead)
        (_, old), (_, new) = ran
        shares = torch.tensor(ratios_of(pair[0], old)) / torch.tensor(ratios_of(pair[1], new))
        assert float(shares.min()) > lead - 1e-3
        assert float(shares.max()) < 1 + 1e-3
        assert float(new.timesteps.float().std()) > 100
        if lead < 1:
            assert float(shares.max() - shares.min()) > 0.4


def test_without_a_word_of_the_mapper_the_loss_is_the_new_bases_own(
    pair: Pair, pictures: PairedPictures, ran: list[tuple[Loaded, DiffusionBatch]]
) -> None:
    """v = α ε − σ x of its own pictures, predicted under an empty prompt."""
    loss = taught(pair, pictures)
    new = ran[1][1]
    clean = pictures.new[ROWS]
    mixes = torch.tensor([Levels(pair[1]).mix(ratio) for ratio in ratios_of(pair[1], new)])
    alpha, sigma = (part[:, None, None, None] for part in mixes.unbind(1))
    noise = noise_in(pair[1], new, clean).reshape(clean.shape)
    silent = DiffusionBatch(new.latents, new.timesteps, ("",) * len(ROWS), "given")
    told = silent.run(pair[1], "new")
    assert loss == pytest.approx(float((told - (alpha * noise - sigma * clean)).square().mean()), rel=1e-3)
