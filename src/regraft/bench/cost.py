"""What a piece of work costs: processor time, and the memory that it adds at its peak, where the system can say so."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """Of what is done inside of it; known at the end.

    Attributes:
        seconds: processor time.
        added_mb: resident memory above what was held at the start, in MB (10⁶ bytes); None where there is no way to
            reset the mark (not Linux).
    """

    seconds: float
    added_mb: float | None = None
    _start: float | None = None

    def __enter__(self) -> Cost:
        try:
            # 5 sets the high-water mark back to what is resident now (proc(5)).
            _RESET.write_text("5", encoding="ascii")
            self._start = _field("VmRSS")
        except (OSError, KeyError):
            self._start = None
        self._began = time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.process_time() - self._began
        if self._start is not None:
            self.added_mb = round(max(0.0, _field("VmHWM") - self._start), 1)


def _field(name: str) -> float:
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii").splitlines())
    return float({words[0]: words[1] for words in lines if len(words) > 1}[f"{name}:"]) * 1024 / 1e6
