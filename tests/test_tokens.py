"""Added tokens in a port: carried bit for bit where the encoder's width stays, refused where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft import InputError, Settings, open_base, port
from regraft.adapter import MODEL, Adapter, TokenRef
from regraft.base import Base
from regraft.tensors import InMemory
from toys import VOCAB, WIDTH, drifted, llama, lora, permutation, regauged, save_base

TOKEN = TokenRef("text_encoder", "<cat>")


def base(path: Path, *, moved: float = 0.0, width: int = WIDTH) -> Base:
    """A toy model beside a text encoder's table of embeddings."""
    state = drifted(llama(), moved)
    table = torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(3)) * (1 + moved)
    opened = open_base(save_base(state, path))
    names = {"text_model.embeddings.token_embedding.weight": InMemory(table)}
    return replace(opened, components={**opened.components, "text_encoder": names})


@pytest.fixture
def adapter() -> Adapter:
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    return replace(lora(llama()), format="regraft", tokens={TOKEN: InMemory(vectors)})


def test_tokens_are_carried_unchanged_and_the_drift_around_them_is_said(adapter: Adapter, tmp_path: Path) -> None:
    old, new = base(tmp_path / "old.safetensors"), base(tmp_path / "new.safetensors", moved=0.01)
    result = port(adapter, old, new, "copy")
    assert torch.equal(result.adapter.tokens[TOKEN].load(), adapter.tokens[TOKEN].load())
    assert result.report.tokens == ["<cat>"]
    assert "carried as they are" in result.report.reasons[-1]
    assert "text_encoder's own moved by 1.00%" in result.report.reasons[-1]


def test_tokens_of_another_width_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    old, new = base(tmp_path / "old.safetensors"), base(tmp_path / "new.safetensors", width=WIDTH + 8)
    with pytest.raises(InputError, match=rf"<cat>: its vectors are {WIDTH} wide, the new text_encoder's {WIDTH + 8}"):
        port(adapter, old, new, "copy")
    result = port(adapter, old, new, "copy", settings=Settings(allow_partial=True))
    assert dict(result.adapter.tokens) == {}
    assert [(row.name, row.status) for row in result.report.modules if row.status != "ported"] == [("<cat>", "refused")]


def test_embeddings_alone_have_nothing_to_fit(adapter: Adapter, tmp_path: Path) -> None:
    old = base(tmp_path / "old.safetensors")
    with pytest.raises(InputError, match="tokens alone"):
        port(replace(adapter, updates={}), old, old)


def test_tokens_turn_with_the_width_of_the_encoder(tmp_path: Path) -> None:
    state, residual = llama(), permutation(WIDTH, 3)
    old = open_base(save_base(state, tmp_path / "old.safetensors"))
    new = open_base(save_base(regauged(state, residual, permutation(40, 4)), tmp_path / "new.safetensors"))
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    token = TokenRef(MODEL, "<cat>")
    adapter = replace(lora(state), format="regraft", tokens={token: InMemory(vectors)})
    result = port(adapter, old, new, "procrustes")
    torch.testing.assert_close(result.adapter.tokens[token].load(), vectors @ residual.T, rtol=1e-4, atol=1e-5)
    assert "turned with the text encoder's width" in result.report.reasons[-1]
