"""Metrics files, progress lines and tables: what a run tells people; nothing here needs jax."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

METRICS_FILE = "metrics.jsonl"
_SHOWN = ("loss", "margin", "accuracy", "tokens_per_second", "images_per_second")


class MetricsWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard event files; made by `open_metrics`."""

    def __init__(self, lines: TextIO | None, board: Any):
        self._lines = lines
        self._board = board

    def write(self, step: int, split: str, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write one JSON object on a line of its own: `step`, `split`, and each metric as a number.

        JSON knows no nan and no infinity: they are written as the strings "nan", "inf" and "-inf", and `read_metrics`
        turns them back. Reading a value off a device waits for it.

        Args:
          step: optimizer steps done.
          split: `train` or `eval`.
          metrics: name -> scalar.

        Raises:
          ValueError: a metric is named `step` or `split`.
        """
        if self._lines is None:
            return
        if taken := {"step", "split"} & set(metrics):
            raise ValueError(f"metrics may not be named {' or '.join(sorted(taken))}; rename them")
        values = {name: float(value) for name, value in metrics.items()}
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": int(step), "split": split, **shown}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, int(step))

    def close(self) -> None:
        """Flush and close the files."""
        if self._lines is not None:
            self._lines.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_metrics(folder: str | os.PathLike, *, resume_step: int = 0, active: bool = True) -> MetricsWriter:
    """Open `folder/metrics.jsonl` and `folder/tensorboard` for writing.

    Args:
      folder: local; made if need be.
      resume_step: optimizer steps that the run has done. Lines of later steps are dropped, because those steps will be
        written again, and so is a half-written last line; 0 begins the file anew.
      active: False writes nothing; give `jax.process_index() == 0`.

    Raises:
      ValueError: the folder is remote, or an earlier line of the file is not JSON.
    """
    if not active:
        return MetricsWriter(None, None)
    if "://" in os.fspath(folder):
        raise ValueError(f"metrics are appended line by line, which {folder} does not allow; give a local folder")
    from tensorboardX import SummaryWriter

    path = Path(folder) / METRICS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line, entry in _entries(path) if resume_step and entry["step"] <= resume_step]
    # Written beside and moved over, so that a kill leaves either the old file or the new one.
    beside = path.with_suffix(".partial")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)
    board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
    return MetricsWriter(path.open("a", encoding="utf-8"), board)


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Lines of `folder/metrics.jsonl` in order, numbers as floats (nan and infinities too); [] if there is no file.

    Raises:
      ValueError: a line other than a half-written last one is not JSON.
    """
    spelled = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

    def number(name: str, value: Any) -> Any:
        return spelled.get(value, value) if name != "split" and isinstance(value, str) else value

    return [
        {name: number(name, value) for name, value in entry.items()}
        for _, entry in _entries(Path(folder) / METRICS_FILE)
    ]


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, object) of each whole line."""
    if not path.exists():
        return
    # A kill may cut the last line anywhere, inside a letter too.
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for index, line in enumerate([*lines, rest]):
        try:
            entry = json.loads(line)
            yield line, {"step": int(entry["step"]), **entry}
        except (ValueError, TypeError, KeyError) as error:
            if index >= len(lines):
                return
            raise ValueError(f"{path}, line {index + 1} is not a line of metrics: {line[:80]!r}") from error


class Progress:
    """How far a run is; made by `progress`."""

    def __init__(
        self,
        total: int,
        start: int,
        description: str,
        stream: TextIO,
        disable: bool,
        interval: float,
        clock: Callable[[], float],
    ):
        self._total, self._start, self._description, self._stream = total, start, description, stream
        self._disable, self._interval, self._clock = disable, interval, clock
        self._bar, self._printed = None, None
        self._begin, self._step = clock(), start
        if not disable and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=description, file=stream, dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, SupportsFloat] | None = None) -> None:
        """Show that `step` steps of all are done.

        Args:
          step: counted from 0, not from `start`.
          metrics: of them loss, margin, accuracy, tokens_per_second and images_per_second are shown. Values on a device
            are waited for: give them only when they are logged anyway.
        """
        if self._disable:
            return
        shown = {name: _number(float(metrics[name])) for name in _SHOWN if metrics and name in metrics}
        shown = {name.replace("_per_second", "/s"): value for name, value in shown.items()}
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._step)
        elif self._due(step):
            self._print(step, shown)
        self._step = step

    def message(self, text: str) -> None:
        """Print a line of its own without tearing the bar."""
        if self._disable:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due(self, step: int) -> bool:
        return self._printed is None or step >= self._total or self._clock() - self._printed >= self._interval

    def _print(self, step: int, shown: Mapping[str, str]) -> None:
        self._printed = self._clock()
        rate = (step - self._start) / max(self._printed - self._begin, 1e-9)
        parts = [f"{self._description} {step}/{self._total} ({100 * step / max(self._total, 1):.0f}%)"]
        parts += [f"{name} {value}" for name, value in shown.items()]
        if rate > 0 and step < self._total:
            parts.append(f"left {_duration((self._total - step) / rate)}")
        print("  ".join(parts), file=self._stream, flush=True)


def progress(
    total: int,
    start: int = 0,
    *,
    description: str,
    stream: TextIO | None = None,
    disable: bool = False,
    interval: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A bar on a terminal, plain lines elsewhere (a log file, a pipe).

    Args:
      total: steps of the whole run.
      start: steps done before, by the run that is resumed.
      stream: standard error by default.
      disable: show nothing; give it on every process but one.
      interval: seconds from one plain line to the next; the first and the last step are always printed.
      clock: in seconds.
    """
    return Progress(total, start, description, stream or sys.stderr, disable, interval, clock)


def table(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> str:
    """Plain text table: columns as wide as they need, numbers to the right with four digits, None as an empty cell.

    Raises:
      ValueError: a row has another number of cells than the headers.
    """
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells, the table {len(headers)} columns: {row}")
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    right = [bool(rows) and all(isinstance(value, int | float | None) for value in column) for column in zip(*rows)]
    right = right or [False] * len(headers)

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, cells)])


def human_bytes(count: float) -> str:
    """A number of bytes in the binary unit that fits: 1536 is `1.5 KiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while abs(count) >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.{1 if power else 0}f} {units[power]}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
