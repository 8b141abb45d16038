"""What a converter does with each row: tensors of tags go in under the original names, canonical ones come out.

A tag is the number of the original tensor, of the row and of the column, so that renames, cuts, swaps and transposes
are all seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, ...]]
Rules = Mapping[str, "str | tuple[str, ...]"]
Converter = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]

_ROW, _COLUMN = 22, 11
_ENDINGS = (".weight", ".bias", "")


def believed(rules: Rules, parameters: Shapes) -> dict[str, tuple[str, ...]]:
    """Original parameter → canonical ones, as ``rules`` say; ``{}`` is any number, weights and biases go together.

    Raises:
        ValueError: a canonical parameter is in no rule, or in two.
    """
    found: dict[str, tuple[str, ...]] = {}
    for original, target in rules.items():
        targets = (target,) if isinstance(target, str) else target
        for ending in _ENDINGS:
            pattern = re.escape(targets[0]).replace(re.escape("{}"), r"(\d+)") + re.escape(ending)
            for name in parameters:
                numbers = re.fullmatch(pattern, name)
                if numbers:
                    key = _fill(original, numbers.groups()) + ending
                    found[key] = tuple(_fill(t, numbers.groups()) + ending for t in targets)
    used = [name for names in found.values() for name in names]
    wrong = set(parameters) ^ set(used)
    if wrong or len(used) != len(set(used)):
        raise ValueError(f"rules cover wrongly: {sorted(wrong)[:8]} {[n for n in used if used.count(n) > 1][:8]}")
    return _by_block(found)


def _fill(template: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        template = template.replace("{}", number, 1)
    return template


def _by_block(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows of one numbered block together, blocks in the order of their numbers."""
    heads: dict[str, int] = {}

    def place(name: str) -> tuple[int, int]:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        head = name[: found.start()] if found else name
        return heads.setdefault(head, len(heads)), int(found[0]) if found else 0

    return dict(sorted(rows.items(), key=lambda row: place(row[0])))


def traced(convert: Converter, belief: Mapping[str, tuple[str, ...]], parameters: Shapes) -> dict[str, Any]:
    """Original parameter → what the converter makes of it: a name, or name → row ranges (or ``"transposed"``).

    Raises:
        ValueError: the converter leaves a canonical parameter out, or gives it other rows than the model has.
    """
    names = list(belief)
    tags = {name: _tags(k, parameters, belief[name]) for k, name in enumerate(names)}
    rows_of = {name: tag.shape[0] for name, tag in tags.items()}
    out = convert(dict(tags))
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for canonical, shape in parameters.items():
        if canonical not in out:
            raise ValueError(f"the converter gives no {canonical}")
        value = out[canonical]
        source = names[int(value.reshape(-1)[0]) >> (_ROW + _COLUMN)]
        flat = value.reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)
        if flat.shape[1] > 1 and int(flat[0, 1]) >> _COLUMN != int(flat[0, 0]) >> _COLUMN:
            found[source][canonical] = "transposed"
            continue
        rows = (flat[:, 0] >> _COLUMN) & ((1 << _ROW) - 1)
        if len(rows) != (shape[0] if shape else 1):
            raise ValueError(f"{canonical} has {len(rows)} rows of {shape}")
        ranges = _ranges(rows.tolist())
        found[source][canonical] = ranges
    result: dict[str, Any] = {}
    for name, parts in found.items():
        if not parts:
            raise ValueError(f"the converter ignores {name}")
        only = next(iter(parts))
        whole = len(parts) == 1 and parts[only] == [[0, rows_of[name]]]
        # The order of the rows in the original is the order of the parts.
        ordered = sorted(parts.items(), key=lambda part: part[1][0][0] if part[1] != "transposed" else 0)
        result[name] = only if whole else dict(ordered)
    return result


def assembled(
    belief: Mapping[str, tuple[str, ...]],
    parameters: Shapes,
    chunks: Mapping[str, tuple[int, ...]],
    swapped: tuple[str, ...],
) -> dict[str, Any]:
    """The same as `traced` where diffusers has no converter to run: parts lie one after the other.

    Args:
        belief: original parameter → its parts.
        parameters: canonical shapes.
        chunks: end of a part's module name → which equal chunks of the original are the part.
        swapped: modules of which the original has the halves the other way round.
    """
    result: dict[str, Any] = {}
    for name, targets in belief.items():
        if len(targets) == 1:
            only, rows = targets[0], parameters[targets[0]][0]
            swap = only.rpartition(".")[0] in swapped
            result[name] = {only: [[rows // 2, rows], [0, rows // 2]]} if swap else only
            continue
        end, parts = 0, {}
        total = sum(parameters[target][0] for target in targets)
        count = sum(len(which) for which in chunks.values())
        for target in targets:
            rows = parameters[target][0]
            which = next((c for ending, c in chunks.items() if target.rpartition(".")[0].endswith(ending)), None)
            parts[target] = [[end, end + rows]] if which is None else _chunks(which, total // count)
            end += rows
        result[name] = parts
    return result


def _chunks(which: tuple[int, ...], size: int) -> list[list[int]]:
    return _ranges([row for chunk in which for row in range(chunk * size, (chunk + 1) * size)])


def _tags(number: int, parameters: Shapes, targets: tuple[str, ...]) -> torch.Tensor:
    shapes = [parameters[target] for target in targets]
    rows = sum(shape[0] if shape else 1 for shape in shapes)
    # Columns only where a transpose could go unseen: square matrices are rare, whole ones few.
    square = len(shapes) == 1 and len(shapes[0]) == 2 and shapes[0][0] == shapes[0][1] and "projection" in targets[0]
    columns = shapes[0][1] if square else 1
    tag = (torch.full((rows, columns), number, dtype=torch.int64) << (_ROW + _COLUMN)) + (
        torch.arange(rows)[:, None] << _COLUMN
    )
    tag = tag + torch.arange(columns)
    trail = len(shapes[0]) - 2
    if len(shapes[0]) < 2:
        return tag[:, 0].reshape(shapes[0] if not shapes[0] else (rows,))
    return tag.reshape(rows, columns, *[1] * max(trail, 0))


def _ranges(rows: list[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] = row + 1
        else:
            ranges.append([row, row + 1])
    return ranges
