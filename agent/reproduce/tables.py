"""From requests to the ratios that the papers state: plain arithmetic on results, no plotting, no text."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from agent.reproduce.results import Cell, CellResult, Run


@dataclass(frozen=True, slots=True)
class CellMean:
    """What a rule's requests in one cell came to."""

    cell: Cell
    rule: str
    count: int
    latency_s: float
    predicted_s: float
    backbone_bytes: float
    uplink_bytes: float
    plans: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A rule and a baseline in the same cell."""

    cell: Cell
    rule: CellMean
    baseline: CellMean

    @property
    def reduction_frac(self) -> float:
        """Share of the baseline's latency that the rule saves; below 0 where it is slower."""
        return 1.0 - self.rule.latency_s / self.baseline.latency_s

    @property
    def speedup(self) -> float:
        """The baseline's latency over the rule's."""
        return self.baseline.latency_s / self.rule.latency_s

    @property
    def gap_frac(self) -> float:
        """The rule's latency over the baseline's, minus 1."""
        return self.rule.latency_s / self.baseline.latency_s - 1.0

    @property
    def predicted_gap_frac(self) -> float:
        """The same of what was predicted when each was asked, from the readings of that moment."""
        return self.rule.predicted_s / self.baseline.predicted_s - 1.0


@dataclass(frozen=True, slots=True)
class Reduction:
    """Latency that a rule saves, over a set of cells; NaN of none."""

    count: int
    mean_frac: float
    best_frac: float
    worst_frac: float


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times quicker a rule is, over a set of cells; NaN of none."""

    count: int
    best: float
    mean: float  # geometric
    worst: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Backbone bytes of a baseline over those of a rule."""

    best: float
    """Largest ratio where both send something; NaN where there is no such cell."""
    mean: float
    """Geometric, over the same cells."""
    count: int
    """How many those are."""
    only_baseline: int
    """Cells where the baseline sends and the rule does not: no ratio can be told."""
    only_rule: int
    total: float
    """All bytes of the baseline over all of the rule; inf where the rule sends nothing, NaN where neither does."""


def cell_means(results: Sequence[CellResult], kind: str | None = None) -> list[CellMean]:
    """Mean of every rule in every cell, in the order of the results.

    Requests that are late or cold show this machine: they are left out where the rule has others in the cell.

    Args:
        results: what was measured.
        kind: kind of input; None: all.
    """
    means = []
    for result in results:
        if kind is not None and result.kind != kind:
            continue
        by_rule: defaultdict[str, list[Run]] = defaultdict(list)
        for run in result.runs:
            by_rule[run.rule].append(run)
        for rule, every in by_rule.items():
            runs = [run for run in every if run.is_sound] or every
            means.append(
                CellMean(
                    cell=result.cell,
                    rule=rule,
                    count=len(runs),
                    latency_s=statistics.fmean(run.latency_s for run in runs),
                    predicted_s=statistics.fmean(run.predicted_s for run in runs),
                    backbone_bytes=statistics.fmean(run.backbone_bytes for run in runs),
                    uplink_bytes=statistics.fmean(run.uplink_bytes for run in runs),
                    plans=tuple(dict.fromkeys(run.plan for run in runs)),
                )
            )
    return means


def pair(means: Sequence[CellMean], rule: str, baseline: str) -> list[Pair]:
    """Every cell in which both were measured."""
    baselines = {mean.cell: mean for mean in means if mean.rule == baseline}
    own = [mean for mean in means if mean.rule == rule and mean.cell in baselines]
    return [Pair(mean.cell, mean, baselines[mean.cell]) for mean in own]


def reduction(pairs: Sequence[Pair]) -> Reduction:
    """Mean over the cells, the best and the worst of them."""
    if not pairs:
        return Reduction(0, math.nan, math.nan, math.nan)
    fractions = [each.reduction_frac for each in pairs]
    return Reduction(len(pairs), statistics.fmean(fractions), max(fractions), min(fractions))


def speedup(pairs: Sequence[Pair]) -> Speedup:
    """Geometric mean over the cells, the best and the worst of them."""
    if not pairs:
        return Speedup(0, math.nan, math.nan, math.nan)
    ratios = [each.speedup for each in pairs]
    return Speedup(len(pairs), max(ratios), statistics.geometric_mean(ratios), min(ratios))


def traffic(pairs: Sequence[Pair]) -> Traffic:
    """Backbone bytes of the baseline over those of the rule; cells where one of them sends none are counted apart."""
    sent = [(each.baseline.backbone_bytes, each.rule.backbone_bytes) for each in pairs]
    ratios = [theirs / ours for theirs, ours in sent if theirs > 0 and ours > 0]
    theirs_all, ours_all = math.fsum(theirs for theirs, _ in sent), math.fsum(ours for _, ours in sent)
    return Traffic(
        best=max(ratios, default=math.nan),
        mean=statistics.geometric_mean(ratios) if ratios else math.nan,
        count=len(ratios),
        only_baseline=sum(theirs > 0 and not ours for theirs, ours in sent),
        only_rule=sum(ours > 0 and not theirs for theirs, ours in sent),
        total=theirs_all / ours_all if ours_all else (math.inf if theirs_all else math.nan),
    )


def where(pairs: Sequence[Pair], **condition: str) -> list[Pair]:
    """The pairs whose cells have these conditions; `model` is one too."""
    wanted = set(condition.items())
    return [each for each in pairs if wanted <= {("model", each.cell.model), *each.cell.condition}]


def conditions(means: Sequence[CellMean], name: str) -> list[str]:
    """Every value of a condition, in the order of the results; `model` is one too."""
    values = (dict((("model", mean.cell.model), *mean.cell.condition)).get(name) for mean in means)
    return [value for value in dict.fromkeys(values) if value is not None]
