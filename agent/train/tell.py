"""Progress for people: a bar on a terminal, plain lines anywhere else."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.train.evaluate import Ratios

_LINE_EVERY_S = 15.0
_SPEED_S = 60.0
"""Seconds over which speed and time left are averaged."""


class Teller:
    """Shows decisions, speed, time left and the latest ratio to the planner. Used with `with`.

    Args:
        total: decisions in all.
        done: decisions of earlier runs.
    """

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._total, self._done = total, done
        self._line_s, self._line_decisions = time.monotonic(), done
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
        self._progress = Progress(
            *columns, console=self._console, speed_estimate_period=_SPEED_S, disable=not self._console.is_terminal
        )
        self._task = self._progress.add_task("", total=total, completed=done, speed="")

    def __enter__(self) -> "Teller":
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def tell(self, decisions: int, news: str) -> None:
        """Take how far it is, and what came of the last update."""
        now_s = time.monotonic()
        speed = (decisions - self._line_decisions) / max(now_s - self._line_s, 1e-9)
        text = f"{speed:,.0f}/s, {news}"
        self._progress.update(self._task, completed=min(decisions, self._total), speed=text)
        if now_s - self._line_s < _LINE_EVERY_S:
            return
        if not self._console.is_terminal:
            left_s = (self._total - decisions) / max(speed, 1e-9)
            self.say(f"{decisions:>9,} decisions, {speed:6,.0f}/s, {left_s / 60.0:5.1f} min left, {news}")
        self._line_s, self._line_decisions = now_s, decisions

    def evaluated(
        self, decisions: int, score: float, learnt: Sequence[Ratios], held_out: Sequence[Ratios], is_best: bool
    ) -> None:
        """Print an evaluation: mean / p95 ratio to the planner by scenario."""
        self.say(f"{decisions:>9,} decisions, score {score:.4f}{', best so far' if is_best else ''}")
        for name, rows in (("learnt  ", learnt), ("held out", held_out)):
            if rows:
                cells = (f"{one.scenario} {one.mean:.3f}/{one.p95:.3f}" for one in rows)
                self.say(f"          {name} {'  '.join(cells)}")


def results_table(learnt: Sequence[Ratios], held_out: Sequence[Ratios]) -> str:
    """An evaluation as Markdown, for the card."""
    lines = [
        "## Evaluation",
        "",
        "Latency over the planner's for the same requests of the same worlds; below 1 is faster. Deterministic, without "
        "the guard, on machines, seeds and traces that training did not see; latencies count up to their deadline.",
        "",
        "| models | scenario | requests | geometric mean | ratio of means | ratio of p95 | missed | planner's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in (("learnt on", learnt), ("held out", held_out)):
        lines += [
            f"| {name} | {one.scenario} | {one.requests} | {one.geometric:.3f} | {one.mean:.3f} | {one.p95:.3f} | "
            f"{one.missed_frac:.2%} | {one.planner_missed_frac:.2%} |"
            for one in rows
        ]
    return "\n".join(lines)
