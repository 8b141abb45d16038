"""Faults on the way: what is tried again, how long is waited, and what is said in the end."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hub_server import Fault, Hub
from safetensors.torch import save

from regraft import InputError, open_base
from regraft.adapter import MODEL
from regraft.base import Base
from regraft.hub.ranges import RemoteFile
from toys import llama

STATE = {"a.weight": torch.arange(40_000, dtype=torch.float32).reshape(200, 200), "b.weight": torch.ones(300, 300)}


@pytest.fixture
def base(hub: Hub) -> Base:
    hub.repos["org/name"] = {"model.safetensors": save(STATE)}
    return open_base("org/name", whole=False)


def loads(base: Base) -> None:
    assert torch.equal(base.components[MODEL]["a.weight"].load(), STATE["a.weight"])


def line(base: Base) -> str:
    with pytest.raises(InputError) as caught:
        base.components[MODEL]["a.weight"].load()
    text = str(caught.value)
    assert "\n" not in text
    assert "SIGNED" not in text
    assert text.startswith("org/name:model.safetensors: ")
    return text


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/blobs/", "cut", after=1000),
        Fault("/blobs/", "cut", times=30, after=6000),
        Fault("/blobs/", "cut", times=4, after=0),
        Fault("/blobs/", "500", times=2),
        Fault("/blobs/", "503"),
        Fault("/blobs/", "429"),
        Fault("/blobs/", "other range", times=2),
        Fault("/blobs/", "other size"),
        Fault("/blobs/", "ignores ranges"),
        Fault("/blobs/", "403"),
        Fault("/blobs/", "404"),
        Fault("resolve", "500"),
    ],
    ids=lambda fault: f"{fault.kind} x{fault.times}",
)
def test_a_passing_fault_is_got_over(hub: Hub, base: Base, fault: Fault) -> None:
    hub.faults.append(fault)
    loads(base)


def test_a_cut_read_goes_on_where_it_broke_off(hub: Hub, base: Base) -> None:
    before = hub.sent
    hub.faults.append(Fault("/blobs/", "cut", after=100_000))
    loads(base)
    assert hub.sent - before == STATE["a.weight"].numel() * 4
    first, second = (request.range for request in hub.requests[-2:])
    assert int(str(second).split("=")[1].split("-")[0]) - int(str(first).split("=")[1].split("-")[0]) == 100_000


def test_a_busy_hub_is_given_the_time_that_it_asks_for(hub: Hub, base: Base, waits: list[float]) -> None:
    hub.faults.append(Fault("/blobs/", "429", headers={"Retry-After": "7"}))
    loads(base)
    assert waits == [7.0]
    hub.faults.append(Fault("/api/models/", "429", headers={"Retry-After": "9"}))
    open_base("org/name", whole=False)
    assert waits == [7.0, 9.0]


def test_nobody_is_made_to_wait_for_an_hour(hub: Hub, base: Base, waits: list[float]) -> None:
    hub.faults.append(Fault("/blobs/", "429", times=99, headers={"Retry-After": "3600"}))
    assert "too many requests. Try again in 3600 s" in line(base)
    assert waits == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("500", "the hub answers with error 500"),
        ("429", "too many requests"),
        ("cut", "the connection to the hub broke"),
        ("other range", "sent other bytes than it was asked for"),
        ("416", "the hub answers with error 416"),
        ("403", "the hub forbids access to it"),
    ],
)
def test_a_lasting_fault_is_one_line_after_a_few_tries(hub: Hub, base: Base, kind: str, words: str) -> None:
    hub.faults.append(Fault("/blobs/", kind, times=999))
    asked = len(hub.requests)
    assert words in line(base)
    assert len(hub.requests) - asked <= 2 * 7


def test_waits_grow_from_try_to_try(hub: Hub, base: Base, waits: list[float]) -> None:
    hub.faults.append(Fault("/blobs/", "503", times=999))
    line(base)
    assert waits == sorted(waits)
    assert len(waits) == 4
    assert waits[-1] > 2 * waits[0]


def test_a_server_without_ranges_is_not_made_to_send_gigabytes(hub: Hub) -> None:
    hub.repos["org/name"] = {"model.safetensors": save(STATE)}
    file = RemoteFile(f"{hub.url}/org/name/resolve/main/model.safetensors", "org/name", 1 << 40)
    hub.faults.append(Fault("/blobs/", "ignores ranges", times=9))
    with pytest.raises(InputError, match="sends whole files only"):
        file.read([(1 << 39, 10)])


def test_an_interrupted_download_is_finished(hub: Hub) -> None:
    hub.repos["org/name"] = {"model.safetensors": save(STATE)}
    open_base("org/name", whole=False)
    hub.faults.append(Fault("/blobs/", "cut", after=50_000))
    before = hub.sent
    base = open_base("org/name")
    loads(base)
    assert hub.sent - before < len(hub.repos["org/name"]["model.safetensors"]) + 2 * (1 << 17)


def test_the_listing_is_asked_for_again_and_then_given_up(hub: Hub, waits: list[float]) -> None:
    hub.repos["org/name"] = {"model.safetensors": save(STATE)}
    hub.faults.append(Fault("/api/models/", "500", times=2))
    open_base("org/name", whole=False)
    hub.faults.append(Fault("/api/models/", "500", times=99))
    with pytest.raises(InputError, match=r"^org/name: the hub answers with error 500. Try again later.$"):
        open_base("org/name", whole=False)


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[object], begin: object, end: object, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        raw({}, length=1 << 62),
        raw({}, length=100),
        raw(b"\xff\xfe{}"),
        raw(b"[1]"),
        raw(b"{"),
        raw(b"[" * 50_000),
        raw(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', b"1234"),
        raw({"a": entry([1], 0, 8)}, b"12345678"),
        raw({"a": entry([-1, -1], 0, 4)}, b"1234"),
        raw({"a": entry([1.0], 0, 4)}, b"1234"),
        raw({"a": entry([True], 0, 4)}, b"1234"),
        raw({"a": entry([1 << 62, 1 << 62], 0, 4)}, b"1234"),
        raw({"a": entry([1], 4, 8)}, b"12345678"),
        raw({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678"),
        raw({"a": entry([1], 0, 4)}, b"12345678"),
        raw({"a": entry([2], 0, 8)}, b"1234"),
        raw({"a": entry([1], 0, 4, "X9")}, b"1234"),
        raw({"a": {}}, b"1234"),
        raw({"a": [], "__metadata__": {}}, b"1234"),
        raw({"__metadata__": {"x": 1}}),
        raw({"__metadata__": [1]}),
    ],
)
def test_a_hostile_header_is_refused_without_reading_on(hub: Hub, content: bytes) -> None:
    hub.repos["org/evil"] = {"model.safetensors": content}
    with pytest.raises(InputError) as caught:
        open_base("org/evil", whole=False)
    assert str(caught.value).startswith("org/evil:model.safetensors: ")
    assert hub.sent <= len(content)


def test_a_long_header_is_read_in_two_parts(hub: Hub) -> None:
    state = {f"layers.{i}.a_rather_long_name_of_a_module.weight": torch.full((2, 2), float(i)) for i in range(3000)}
    hub.repos["org/name"] = {"model.safetensors": save(state, {"note": "é"})}
    base = open_base("org/name", whole=False)
    name = "layers.2999.a_rather_long_name_of_a_module.weight"
    assert torch.equal(base.components[MODEL][name].load(), state[name])


def test_many_tensors_are_fetched_in_few_requests(hub: Hub) -> None:
    hub.repos["org/name"] = {"model.safetensors": save(llama(layers=20))}
    base = open_base("org/name", whole=False)
    asked = len(hub.requests)
    assert base.fingerprint
    assert len(hub.requests) - asked < 10
