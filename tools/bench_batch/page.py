"""The part of docs/batch.md that is written from results/batch.json."""

from __future__ import annotations

from typing import Any

from regraft.bench.table import markdown, replaced

BEGIN, END = "<!-- batch: written by `python -m tools.bench_batch` -->", "<!-- /batch -->"
_WHAT = {
    "reduced": "at reduced size, of mixed formats and kinds (LoRA in six formats, LoHa, DoRA)",
    "full_size": "at SD 1.5's true size: LoRAs of rank 8 on the U-Net's attention, in six formats",
}


def section(record: dict[str, Any]) -> str:
    """Tables of both libraries, and what they come to on paper, as Markdown."""
    machine = record["machine"]
    libraries = {name: what for name, what in _WHAT.items() if "killed" in record.get(name, {})}
    parts = [
        f"On {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch {machine['torch']}. "
        "*Start* is what passes before a row can begin, without the *fit* of the pair; *rows* from then to the last "
        "one; what is left is for the tables. Memory is what a process has for itself, at its peak. The *floor* reads "
        "the library's bytes and writes the outputs', and does nothing else; both come from and go to the page cache.",
    ]
    for name, what in libraries.items():
        found = record[name]
        parts += [f"{found['adapters']:,} adapters {what}:", _figures(found), _told(found)]
    parts += [_paper(record)] if "on_paper" in record else []
    when = _when([record[name] for name in libraries]) or record["date"]
    return "\n\n".join([*parts, f"`{record['command']}`, {when}."])


def page(text: str, record: dict[str, Any]) -> str:
    """A page with its part written anew.

    Args:
        text: of the page, with both marks.
        record: of the benchmark.
    """
    return replaced(text, BEGIN, END, section(record))


def _when(libraries: list[dict[str, Any]]) -> str:
    """When and by which versions the parts that are shown were measured; empty where they don't say so."""
    shown = [found[part] for found in libraries for part in ("workers_1", "workers_2", "killed")]
    told = {(part["date"], part["regraft_version"]) for part in shown if "date" in part}
    return "; ".join(f"{day}, regraft {version}" for day, version in sorted(told))


def _figures(found: dict[str, Any]) -> str:
    head = ["", "seconds", "start", "fit", "rows", "adapters/s", "of rows alone", "MB a worker", "MB of the driver"]
    rows = []
    for part, name in (("workers_1", "1 worker"), ("workers_2", "2 workers")):
        done = found[part]
        spent = [f"{done[key]:.1f}" for key in ("seconds", "start_up_seconds", "fit_seconds", "rows_seconds")]
        rate = [f"{done[key]:.2f}" for key in ("adapters_per_second", "adapters_per_second_of_rows")]
        rows.append([name, *spent, *rate, f"{done['worker_mb_own']}", f"{done['driver_mb_own']}"])
    least = found["floor"]
    rows.append(
        ["the floor", f"{least['seconds']:.2f}", *["–"] * 3, f"{found['adapters'] / least['seconds']:.0f}", *["–"] * 3]
    )
    return markdown(head, rows)


def _told(found: dict[str, Any]) -> str:
    efficiency, times, least = found["efficiency_2_workers"], found["times_the_floor"]["workers_2"], found["floor"]
    return (
        f"Efficiency from one to two workers: {efficiency['of_rows']:.2f} of the rows alone, "
        f"{efficiency['over_all']:.2f} over all. Two workers take {times['of_rows']:.1f} times the floor "
        f"({least['mb_read']:.0f} MB read, {least['mb_written']:.0f} MB written) for the rows alone, "
        f"{times['over_all']:.1f} over all. {_killed(found['killed'])}"
    )


def _killed(done: dict[str, Any]) -> str:
    result = {
        True: "nothing was lost, and nothing is in the output twice",
        False: "the output is not that of an undisturbed run",
        None: "none died, so that nothing was tested",
    }[done["nothing_lost_nothing_twice"]]
    given_up = f", {done['given_up']} given up" if done["given_up"] else ""
    return (
        f"With a worker killed every {done['every_s']:g} s: {done['kills']} killed, {done['begun_again']} rows begun "
        f"again{given_up}, {done['seconds']:.1f} s; {result}."
    )


def _paper(record: dict[str, Any]) -> str:
    on_paper = record["on_paper"]
    first = on_paper[0]
    size = "SD 1.5's size" if "workers_2" in record.get("full_size", {}) else "the reduced size"
    head = [
        "workers a machine",
        "hours",
        "machine-hours",
        "bound by",
        "MB/s a machine",
        "hours of the driver",
        "GB of the driver",
    ]
    rows = [
        [
            f"{row['workers']}",
            *(f"{row[key]:.1f}" for key in ("wall_hours", "machine_hours")),
            row["bound_by"],
            *(f"{row[key]:.1f}" for key in ("mb_a_second_of_a_machine", "driver_hours", "driver_gb")),
        ]
        for row in on_paper
    ]
    return (
        f"On paper, from these figures: {first['adapters']:,} LoRAs of {size}, one pair of bases, {first['machines']} "
        "machines. Assumed is that each worker is as fast as one of two here; that disks and network give each machine "
        "the bytes in the table; that all machines wait for the fit and the tables; and that the driver, which notes "
        f"every row, does so as fast as here.\n\n{markdown(head, rows)}"
    )
