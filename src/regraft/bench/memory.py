"""The memory that a piece of work adds at its peak, where the system can say so."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Resident memory above what was held at the start; None where there is no way to reset the mark (not Linux).

    Attributes:
        added_mb: in MB (10⁶ bytes), known at the end.
    """

    added_mb: float | None = None
    _start: float | None = None

    def __enter__(self) -> Peak:
        try:
            # 5 sets the high-water mark back to what is resident now (proc(5)).
            _RESET.write_text("5", encoding="ascii")
            self._start = _field("VmRSS")
        except (OSError, KeyError):
            self._start = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start is not None:
            self.added_mb = round(max(0.0, _field("VmHWM") - self._start), 1)


def _field(name: str) -> float:
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii").splitlines())
    return float({words[0]: words[1] for words in lines if len(words) > 1}[f"{name}:"]) * 1024 / 1e6
