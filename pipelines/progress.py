"""Progress: how far long work is. On a terminal one live view; elsewhere one plain line a minute, and one at the end.

    embed with ViT-B-16-SigLIP/webli: 12,000 of 100,000 rows, 350 a second, 4 min left, image_truncated 12

The environment variable `CURATE_PROGRESS` says otherwise: `plain`, `json` for JSON lines, `none`.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

EVERY_S = 60.0
"""Between lines."""
VARIABLE = "CURATE_PROGRESS"
TOGETHER_S = 0.5
"""Between the first lumps of work that count as one: workers who began together end together."""
LATE = 3
"""Times the mean between two updates after which work is late."""


class Bar:
    """How far one piece of work is. Safe to use from threads."""

    def __init__(self, title: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.facts: dict[str, float | int | str] = {}
        self.began = time.monotonic()
        self.told_at = self.began
        self._first: tuple[float, int] | None = None
        """When the first of it was done, and how much that was: what comes before it is the start, and no rate."""
        self._last = self.began
        self._updates = 0
        self._lock = threading.Lock()

    def update(self, done: int = 1, **facts: float | int | str) -> None:
        """Say that so much more is done, and what else there is to tell now."""
        with self._lock:
            self.done += done
            self.facts = facts or self.facts
            if done:
                self._last = time.monotonic()
                self._updates += 1
                if self._first is None or self._last - self._first[0] < TOGETHER_S:
                    self._first = (self._first[0] if self._first else self._last, self.done)
        if (metrics := _metrics()) is not None:
            metrics.count_done(self.title, self.unit, done, self.estimate()[1])

    def tell(self, **facts: float | int | str) -> None:
        """Say something beside what was told before."""
        with self._lock:
            self.facts |= facts

    def add(self, **counts: int) -> None:
        """Count rows that were met on the way and cannot be used, by reason."""
        with self._lock:
            for name, count in counts.items():
                self.facts[name] = int(self.facts.get(name, 0)) + count
                if (metrics := _metrics()) is not None:
                    metrics.count_rejected(name, count)

    def estimate(self, now: float | None = None) -> tuple[float | None, float | None]:
        """What is done a second since the first of it was, and the seconds left at this rate; None where unknown.

        Work comes in lumps, a shard at a time: between two of them the rate is that up to the last one. Where the next
        one is late by several times what they took so far, it is that up to now.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            first, done, last, updates = self._first, self.done, self._last, self._updates
        if first is None or done == first[1] or last <= first[0]:
            return None, None
        until = last if now - last <= LATE * (last - first[0]) / (updates - 1) else now
        rate = (done - first[1]) / (until - first[0])
        return rate, None if self.total is None else max(0.0, (self.total - done) / rate - (now - until))

    def told(self) -> str:
        """All that there is to say, without the title."""
        return ", ".join(part for part in (self.how_far(), self.told_facts()) if part)

    def told_facts(self) -> str:
        """What there is to tell beside how far it is."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self._facts().items())

    def _facts(self) -> dict[str, float | int | str]:
        with self._lock:
            return dict(self.facts)

    def how_far(self) -> str:
        """What is done of all, the rate, the time that is left."""
        rate, left = self.estimate()
        unit = self.unit if self.done == 1 and self.total in (None, 1) else f"{self.unit}s"
        parts = [f"{self.done:,}{'' if self.total is None else f' of {self.total:,}'} {unit}"]
        if rate is not None:
            parts.append(f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second")
        if left is not None and self.done < (self.total or 0):
            parts.append(f"{lasting(left)} left")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        rate, left = self.estimate()
        return {
            "stage": self.title,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds": round(time.monotonic() - self.began, 1),
            "per_second": rate and round(rate, 3),
            "left_s": left if left is None else round(left, 1),
            **self._facts(),
        }


@contextlib.contextmanager
def bar(title: str, total: int | None = None, *, unit: str = "row", done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """Show how far a piece of work is, for as long as it lasts.

    Args:
        title: what is done.
        total: how much there is to do; None if nobody knows.
        unit: of it, in the singular.
        done: of it already.
        shown: whether this process shows it: of several that do one piece of work, one does.
    """
    opened = Bar(title, total, unit, done=done)
    view = _view() if shown else _nothing
    view.open(opened)
    try:
        yield opened
    finally:
        view.close(opened)


def over(items: Iterable[T], total: int, *, title: str, unit: str) -> Iterator[T]:
    """Items, one by one, and how far that is."""
    with bar(title, total, unit=unit) as opened:
        for item in items:
            yield item
            opened.update()


def lasting(seconds: float) -> str:
    """A duration as people say it.

    >>> lasting(8.4), lasting(240), lasting(5000), lasting(200_000)
    ('8 s', '4 min', '1 h 23 min', '2 d 7 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def stop() -> None:
    """Give the terminal back, whatever is still shown: for a process that ends while threads of it are at work."""
    _live.stop()


def _metrics() -> ModuleType | None:
    """Ray's metrics, in a process that has loaded Ray; others answer at once, and have nobody to tell."""
    if "ray" not in sys.modules:
        return None
    from curate.pipelines import metrics  # noqa: PLC0415

    return metrics


class _Lines:
    """A line a minute for each bar that is open; of one that was open for longer, one at its end."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._open: list[Bar] = []
        self._wake = threading.Condition()
        self._ticking = False

    def open(self, opened: Bar) -> None:
        with self._wake:
            self._open.append(opened)
            if not self._ticking:
                self._ticking = True
                threading.Thread(target=self._tick, daemon=True).start()

    def close(self, closed: Bar) -> None:
        with self._wake:
            self._open.remove(closed)
            self._wake.notify_all()
            if closed.told_at > closed.began or self._as_json:
                self._tell(closed, ended=True)

    def _tick(self) -> None:
        with self._wake:
            while self._open:
                now = time.monotonic()
                for one in self._open:
                    if now - one.told_at >= EVERY_S:
                        one.told_at = now
                        self._tell(one)
                due = min(one.told_at for one in self._open) + EVERY_S - now
                self._wake.wait(max(0.01, due))
            self._ticking = False

    def _tell(self, one: Bar, *, ended: bool = False) -> None:
        if self._as_json:
            line = json.dumps(one.to_json() | {"ended": ended})
        else:
            after = f" after {lasting(time.monotonic() - one.began)}" if ended else ""
            line = f"{one.title}: {one.told()}{after}"
        # A log that nobody reads any more is no reason to stop.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


class _Live:
    """All open bars in one view at the bottom of the terminal; what is done stays above it as a line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Any] = {}
        self._shown: Progress | None = None

    def open(self, opened: Bar) -> None:
        with self._lock:
            if self._shown is None:
                self._shown = _progress()
                self._shown.start()
            self._open[id(opened)] = self._shown.add_task(
                opened.title, total=opened.total, completed=opened.done, bar=opened
            )

    def close(self, closed: Bar) -> None:
        with self._lock:
            task = self._open.pop(id(closed), None)
            if self._shown is None or task is None:  # the terminal was given back
                return
            self._shown.remove_task(task)
            self._shown.console.print(f"{closed.title}: {closed.told()}", markup=False, highlight=False, soft_wrap=True)
            if not self._open:
                self._shown.stop()
                self._shown = None

    def stop(self) -> None:
        """Show nothing any more."""
        with self._lock:
            if self._shown is not None:
                self._shown.stop()
                self._shown = None
                self._open.clear()


def _progress() -> "Progress":
    """Rich's, with what a bar says itself."""
    from rich.console import Console, RenderableType  # noqa: PLC0415 what answers at once has nothing to show
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    class HowFar(ProgressColumn):
        """What a bar says; the bar beside it as well, which is filled here, for rich asks each task once a look."""

        def render(self, task: "Task") -> Text:
            opened: Bar = task.fields["bar"]
            task.completed = opened.done
            return Text(opened.how_far(), no_wrap=True)

    class WithFacts(Progress):
        """And what else there is to tell of each, a line below."""

        def get_renderables(self) -> "Iterable[RenderableType]":
            for task in self.tasks:
                yield self.make_tasks_table([task])
                if facts := task.fields["bar"].told_facts():
                    yield Text(f"  {facts}", style="dim")

    return WithFacts(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        HowFar(),
        console=Console(stderr=True),
        refresh_per_second=4,
        # Only what goes to this terminal, too: an answer in a file must not end up here.
        redirect_stdout=sys.stdout.isatty(),
    )


class _Nothing:
    def open(self, opened: Bar) -> None:
        pass

    def close(self, closed: Bar) -> None:
        pass


_live, _plain, _json, _nothing = _Live(), _Lines(as_json=False), _Lines(as_json=True), _Nothing()


def _view() -> _Live | _Lines | _Nothing:
    """Where bars are shown."""
    match os.environ.get(VARIABLE, ""):
        case "none":
            return _nothing
        case "json":
            return _json
        case "plain":
            return _plain
    return _live if sys.stderr.isatty() else _plain


def _shown(value: float | int | str) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value:,}"
        case _:
            return value
