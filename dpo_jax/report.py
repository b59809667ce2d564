"""Metrics files, progress lines, tables and confidence intervals: what a run tells people; nothing here needs jax."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple, SupportsFloat, TextIO

METRICS_FILE = "metrics.jsonl"
_SHOWN = ("loss", "margin", "accuracy", "tokens_per_second")


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
          metrics: of them loss, margin, accuracy and tokens_per_second are shown. Values on a device are waited for:
            give them only when they are logged anyway.
        """
        if self._disable:
            return
        shown = {name: _number(float(metrics[name])) for name in _SHOWN if metrics and name in metrics}
        if "tokens_per_second" in shown:
            shown["tokens/s"] = shown.pop("tokens_per_second")
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


class Interval(NamedTuple):
    """The bounds of a confidence interval."""

    low: float
    high: float


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), sound near 0 and 1 and for few trials.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  z the normal quantile

    Args:
      successes: in [0, total]; a tie may count one half.
      total: number of independent trials, at least 1.

    Raises:
      ValueError: successes lie outside [0, total], total is below 1 or confidence outside (0, 1).
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials; give 0 <= successes <= total and total >= 1")
    z = NormalDist().inv_cdf(_upper(confidence))
    share, spread = successes / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # At the ends the bound is 0 or 1 exactly; rounding would leave it a little beside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Interval(low, high)


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Student interval of a mean: mean -+ t s / sqrt(n), t the quantile with n - 1 degrees of freedom.

    Exact for normal values, and for many values of any kind that has a variance. One value alone says nothing about
    its spread: the bounds are infinite.

    Raises:
      ValueError: there are no values, or confidence is outside (0, 1).
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("no values to average; give at least one")
    upper, mean = _upper(confidence), fmean(numbers)
    if len(numbers) == 1:
        return Interval(-math.inf, math.inf)
    half = _student_quantile(upper, len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    return Interval(mean - half, mean + half)


def _upper(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")
    return 0.5 + confidence / 2


def _student_quantile(probability: float, freedom: int) -> float:
    """Quantile above the median of Student's t with a whole number of degrees of freedom."""
    z = NormalDist().inv_cdf(probability)
    if freedom > 200:
        # Abramowitz and Stegun 26.7.5; the first term left out is below 1e-9 here for the usual confidences.
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return z + sum(term / freedom ** (order + 1) for order, term in enumerate(terms))
    # The distribution is a finite sum in the angle atan(t / sqrt(freedom)), which bisection inverts to the last bit.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + _within(middle, freedom) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan angle), Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for order in range(freedom // 2):
        total += term
        # odd: 1, 2/3, 2 4 / 3 5, ...; even: 1, 1/2, 1 3 / 2 4, ...
        term *= cosine * cosine * (2 * order + 1 + odd) / (2 * order + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
