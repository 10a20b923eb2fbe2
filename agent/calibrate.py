"""`offcut calibrate`: how far the twin's seconds are from the runtime's, and a correction for it."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from agent.config import CalibrateConfig
from agent.tables import loading
from env.correction import ComponentError, Correction, component_errors
from env.log_scenario import site_from_log
from env.logs import read_log
from env.scenario import SyntheticScenario
from runtime.profiles.shipped import load_shipped_profile
from runtime.types import DEVICE_NODE

if TYPE_CHECKING:
    from env.calibrate import Check

BAR_FRAC = 0.1
"""Medians of twin and runtime should not differ by more."""

BAR_REQUESTS = 200
"""Over so many requests, where nodes compute."""


def run_calibrate(config: CalibrateConfig) -> None:
    """Calibrate, print what was found, and write the correction.

    Raises:
        OffcutError: the first thing that goes wrong.
    """
    console = Console()
    if config.from_logs is None:
        correction, components, checks = _run_live(config, console)
    else:
        correction, components, checks = *_read_logs(config, console), ()
    for title, rows in components.items():
        console.print(_component_table(title, rows, config.from_logs is not None))
    if checks:
        console.print(_check_table(checks))
    correction.write(config.out)
    console.print(f"{_describe(correction)}; written to {config.out}", highlight=False, markup=False)
    if config.json is not None:
        found = {"correction": correction, "components": components, "checks": checks}
        config.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))


def _run_live(
    config: CalibrateConfig, console: Console
) -> "tuple[Correction, Mapping[str, Sequence[ComponentError]], Sequence[Check]]":
    scenarios = [SyntheticScenario(kind) for kind in config.scenario]
    with loading("loading torch"):
        from env.calibrate import calibrate
        from env.live_site import make_live_sites
    slow_down = dict(zip((DEVICE_NODE, "edge0", "cloud"), config.slow_down, strict=True))
    with console.status("loading and profiling") as status:
        sites = make_live_sites(config.model, slow_down=slow_down)
        found = calibrate(
            sites,
            scenarios,
            num_probes=config.probes,
            num_requests=config.requests,
            seeds=range(config.seeds),
            show=status.update,
        )
    return found.correction, found.components, found.checks


def _read_logs(config: CalibrateConfig, console: Console) -> tuple[Correction, Mapping[str, Sequence[ComponentError]]]:
    assert config.from_logs is not None
    log, model = read_log(config.from_logs), load_shipped_profile(config.model[0])
    site = site_from_log(log, model)
    slow = {
        name: profile.layer_s[-1] / model.profile.layer_s[-1] for name, profile in site.problem.profile.nodes.items()
    }
    speeds = ", ".join(f"{name} {factor:.3g}" for name, factor in slow.items())
    console.print(
        f"{len(log.arrivals_s)} requests over {log.length_s:.0f} s; times over the shipped profile's machine: {speeds}",
        highlight=False,
    )
    return log.correction(), {f"{model.spec}, predicted by the session": component_errors(log.pairs)}


def _component_table(title: str, rows: Sequence[ComponentError], is_log: bool) -> Table:
    table = Table(title=f"{title}; medians in milliseconds", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("component")
    for column in ("requests", "predicted" if is_log else "twin", "measured" if is_log else "live", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.count:
            cells = (f"{1e3 * row.worked_s:.2f}", f"{1e3 * row.measured_s:.2f}", _percent(row.error_frac))
            table.add_row(row.component, str(row.count), *cells)
    return table


def _check_table(checks: "Sequence[Check]") -> Table:
    title = "Same worlds and plans: median milliseconds in the twin, with the correction, live; errors against live"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("model", "scenario"):
        table.add_column(column, overflow="fold")
    for column in ("n", "twin", "fixed", "live", "twin", "fixed", "10 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for check in checks:
        medians = (f"{1e3 * seconds:.1f}" for seconds in (check.twin_s, check.corrected_s, check.live_s))
        errors = (_percent(check.plain_error_frac), _percent(check.error_frac))
        table.add_row(check.model, check.scenario, str(check.count), *medians, *errors, _verdict(check))
    return table


def _verdict(check: "Check") -> str:
    """Whether the bar holds; in brackets where there are fewer requests than it speaks of."""
    if check.is_replayed:
        return "replayed"
    holds = "yes" if abs(check.error_frac) <= BAR_FRAC else "no"
    return holds if check.count >= BAR_REQUESTS else f"({holds})"


def _percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else f"{100.0 * fraction:+.1f} %"


def _describe(correction: Correction) -> str:
    factors = {**correction.compute, **correction.transfer, "codec": correction.codec}
    text = ", ".join(f"{name} x{factor:.3f}" for name, factor in factors.items())
    return f"Correction from {correction.samples} requests: {text}, {1e3 * correction.message_s:+.2f} ms per message"
