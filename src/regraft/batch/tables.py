"""The table of all rows: what it says in all, and its files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from regraft.output import in_utf8
from regraft.report.batch_schema import BatchCounts, BatchRow

_AT_ONCE = 10_000
_SEVERITY = {"failed": 0, "refused": 1, "refine": 2, "survives": 3}


def worst_first(rows: Iterable[BatchRow]) -> list[BatchRow]:
    """Failures, refusals, what needs a refine, the rest; within each, the least expected first."""
    return sorted(rows, key=lambda row: (_SEVERITY[group_of(row)], _expected(row), row.name))


def group_of(row: BatchRow) -> str:
    """``failed``, ``refused``, ``refine`` or ``survives``."""
    if row.status in ("failed", "refused"):
        return row.status
    return row.verdict or "survives"


def _expected(row: BatchRow) -> float:
    if row.forecast is not None:
        return row.forecast.recovery
    return -(row.skipped_share or 0.0)


def count(rows: Sequence[BatchRow]) -> BatchCounts:
    """How many are what."""
    groups = [group_of(row) for row in rows]
    return BatchCounts(
        rows=len(rows),
        ported=sum(row.status == "ported" for row in rows),
        reused=sum(row.reused for row in rows),
        **{name: groups.count(name) for name in _SEVERITY},
    )


def summary(counts: BatchCounts, *, check: bool) -> str:
    """What it comes to, in a sentence."""
    which = "your one LoRA" if counts.rows == 1 else f"your {counts.rows:,} LoRAs"
    if check:
        parts = [f"{counts.survives:,} will survive the move"]
        parts += [f"{counts.refine:,} need a refine"] if counts.refine else []
        parts += [f"{counts.refused:,} would be refused"] if counts.refused else []
    else:
        parts = [f"{counts.ported:,} {'was' if counts.ported == 1 else 'were'} carried over"]
        parts[0] += f" ({counts.refine:,} need a refine)" if counts.refine else ""
        parts += [f"{counts.refused:,} refused"] if counts.refused else []
    parts += [f"{counts.failed:,} failed"] if counts.failed else []
    again = f" {counts.reused:,} of them had been done before." if counts.reused else ""
    return f"Of {which}, {', '.join(parts)}.{again}"


def parquet(rows: Sequence[BatchRow]) -> bytes | None:
    """The rows as a parquet file; None without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet as files
    except ImportError:
        return None
    text, number, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    types = {
        **dict.fromkeys(("adapter", "name", "from", "to", "options", "key", "status", "verdict", "tier"), text),
        **dict.fromkeys(("reason", "remedy", "format", "method"), text),
        **dict.fromkeys(("modules_ported", "modules_skipped", "modules_refused"), whole),
        **dict.fromkeys(("skipped_share", "forecast", "forecast_low", "forecast_high"), number),
        "outputs": pyarrow.list_(text),
        "output_hashes": pyarrow.list_(text),
        **dict.fromkeys(("bytes_in", "bytes_out", "attempts"), whole),
        "seconds": number,
        "reused": pyarrow.bool_(),
    }
    schema, stream = pyarrow.schema(list(types.items())), io.BytesIO()
    with files.ParquetWriter(stream, schema) as writer:
        # All of them at once, flat, would be the most that a large library has in memory.
        for start in range(0, len(rows), _AT_ONCE):
            flat = [_flat(row) for row in rows[start : start + _AT_ONCE]]
            writer.write_table(pyarrow.Table.from_pylist(flat, schema=schema))
    return stream.getvalue()


def _flat(row: BatchRow) -> dict[str, Any]:
    """A row without nesting, as query tools like it."""
    found = row.model_dump(by_alias=True, exclude={"counts", "forecast", "options", "serving"})
    # A lone surrogate, as a name of a strange disk may have, is no UTF-8.
    found = {name: _utf8(value) for name, value in found.items()}
    found["options"] = json.dumps(row.options, sort_keys=True)
    if row.counts is not None:
        found |= {f"modules_{name}": value for name, value in row.counts.model_dump().items()}
    if row.forecast is not None:
        found |= {
            "forecast": row.forecast.recovery,
            "forecast_low": row.forecast.low,
            "forecast_high": row.forecast.high,
        }
    return found


def _utf8(value: Any) -> Any:
    if isinstance(value, list):
        return [_utf8(part) for part in value]
    return in_utf8(value) if isinstance(value, str) else value
