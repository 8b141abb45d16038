"""A repository of migrations on the hub: headers by range, and only the files of the way are downloaded."""

from __future__ import annotations

from pathlib import Path

from hub_server import Hub
from running import Run

from regraft import fit_migration, load_adapter, open_base
from regraft.lineage import ports_of
from regraft.lineage.stamp import stamp
from toys import drifted, llama, lora, save_base


def published(hub: Hub, folder: Path) -> None:
    """Bases v1 to v3 in ``folder``, their migrations on the hub, and an adapter that is stamped for v1."""
    state = llama(layers=1)
    for number, name in enumerate(("v1", "v2", "v3")):
        save_base(state, folder / f"{name}.safetensors")
        state = drifted(state, 0.05, seed=number)
    bases = {name: open_base(folder / f"{name}.safetensors") for name in ("v1", "v2", "v3")}
    files = {"README.md": b"Migrations."}
    for old, new in (("v1", "v2"), ("v2", "v3"), ("v3", "v2")):
        made = fit_migration(bases[old], bases[new], "prolora").save(folder / f"{old}-{new}.safetensors")
        files[f"lm/{old}-{new}.safetensors"] = made.read_bytes()
    files["lm/again.safetensors"] = files["lm/v1-v2.safetensors"]
    hub.repos["foundry/migrations"] = files
    lora(llama(layers=1)).save(folder / "plain")
    stamp(folder / "plain", bases["v1"], folder / "lora")


def test_a_port_finds_its_way_in_a_repository(hub: Hub, tmp_path: Path, run: Run) -> None:
    published(hub, tmp_path)
    goal = ("--to", tmp_path / "v3.safetensors", "-o", tmp_path / "out", "--force", "--json")
    ran = run("port", tmp_path / "lora", "--migrations", "foundry/migrations:lm", *goal)
    assert ran.code == 0, ran.err
    assert ran.record["path"] == [
        "foundry/migrations:lm/again.safetensors",
        "foundry/migrations:lm/v2-v3.safetensors",
    ]
    assert len(ports_of(load_adapter(tmp_path / "out"))[0]["migrations"]) == 2
    kept = [file.name for file in (tmp_path / "hf-cache").rglob("*.safetensors")]
    assert sorted(kept) == ["again.safetensors", "v2-v3.safetensors"]
    shown = run("migration", "show", "foundry/migrations:lm")
    assert "v3.safetensors → v2.safetensors" in shown.out
