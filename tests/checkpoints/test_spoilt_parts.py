"""Quantised parts with shapes, types and values that no tool writes: read or refused, never a crash."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from regraft import RegraftError
from regraft.checkpoints.quantised import plain_weights
from regraft.tensors import InMemory, read_rows

STATE = b'{"blocksize": 64, "shape": [4, 16], "nested_blocksize": 256, "nested_offset": 0.5}'
MARK = "x.weight.quant_state.bitsandbytes__nf4"


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


NF4 = {
    "x.weight": torch.zeros(32, 1, dtype=torch.uint8),
    "x.weight.absmax": torch.ones(1),
    "x.weight.quant_map": torch.ones(16),
    MARK: torch.tensor(list(STATE), dtype=torch.uint8),
}
SOUND: dict[str, dict[str, Tensor]] = {
    "gptq": {"x.qweight": ints(4, 16), "x.qzeros": ints(2, 2), "x.scales": torch.ones(2, 16), "x.g_idx": ints(32)},
    "awq": {"x.qweight": ints(32, 2), "x.qzeros": ints(2, 2), "x.scales": torch.ones(2, 16)},
    "nf4": NF4,
    "nested nf4": NF4
    | {"x.weight.absmax": torch.zeros(1, dtype=torch.uint8)}
    | {"x.weight.nested_absmax": torch.ones(1), "x.weight.nested_quant_map": torch.ones(256)},
    "bnb int8": {"x.weight": ints(4, 4).to(torch.int8), "x.SCB": torch.ones(4), "x.weight_format": ints().byte()},
    "int8": {
        "x.weight": ints(4, 8).to(torch.int8),
        "x.weight_scale": torch.ones(4, 2),
        "x.weight_zero_point": ints(4, 2),
    },
    "fp8": {"x.weight": torch.zeros(150, 200).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.ones(2, 2)},
    "packed": {
        "x.weight_packed": ints(21, 5),
        "x.weight_scale": torch.ones(21, 4),
        "x.weight_shape": torch.tensor([21, 40]),
        "x.weight_zero_point": ints(3, 4),
        "x.weight_g_idx": ints(40),
    },
}
DTYPES = [torch.float32, torch.float16, torch.int32, torch.uint8, torch.int8, torch.int64, torch.float8_e4m3fn]


def spoilt(state: dict[str, Tensor], choose: random.Random) -> dict[str, Tensor]:
    """One to three parts left out, in another shape or dtype, or with other values."""
    state = dict(state)
    for _ in range(choose.randint(1, 3)):
        name = choose.choice(list(state))
        part, way = state[name], choose.randrange(4)
        shape = list(part.shape)
        if way == 0 and len(state) > 1:
            del state[name]
        elif way == 1:
            shapes = [[], [*shape, 2], [*shape, 1], shape[1:], shape[::-1], [0, *shape[1:]], [*shape[:-1], 3]]
            state[name] = torch.zeros(choose.choice(shapes), dtype=part.dtype)
        elif way == 2:
            state[name] = torch.zeros(shape, dtype=choose.choice(DTYPES))
        elif name == MARK:
            changed = bytearray(STATE)
            changed[choose.randrange(len(STATE))] = choose.randrange(256)
            state[name] = torch.tensor(list(changed), dtype=torch.uint8)
        else:
            values = [float("nan"), float("inf"), 1e30] if part.is_floating_point() else [-1, 1, 7, 127]
            state[name] = torch.full(shape, choose.choice(values)).to(part.dtype)
    return state


@pytest.mark.parametrize("scheme", SOUND)
def test_spoilt_parts_are_read_or_refused(scheme: str) -> None:
    choose, outcomes = random.Random(scheme), {"read": 0, "refused": 0}
    plain_weights({name: InMemory(part) for name, part in SOUND[scheme].items()}).tensors["x.weight"].load()
    for _ in range(150):
        state = spoilt(SOUND[scheme], choose)
        try:
            shown = plain_weights({name: InMemory(part) for name, part in state.items()}).tensors
            for ref in shown.values():
                assert tuple(ref.load().shape) == ref.shape
                if ref.shape:
                    read_rows(ref, [range(1, 3), range(0, 1)])
            outcomes["read"] += 1
        except RegraftError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5
