"""`offcut compare`: play, then write tables, pictures and TensorBoard logs."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agent.bench.report import describe_machine
from agent.compare.board import write_board
from agent.compare.contestants import BOUNDS, find_contestant
from agent.compare.figures import Figure, draw_latencies, draw_maps, draw_timeline
from agent.compare.live import play_live
from agent.compare.play import Episode
from agent.compare.scenes import decision_map, record_timeline
from agent.compare.tables import Row, details, make_rows, summary, write_episodes, write_table
from agent.compare.tasks import Plan, in_order, play_all
from agent.config import CompareConfig
from agent.report import load_pyplot
from agent.train.config import HELD_OUT
from env.draw import SCENARIOS
from runtime.errors import ConfigError
from runtime.profiles.shipped import shipped_specs

RULES = (
    "device-only",
    "edge-only",
    "cloud-only",
    "neurosurgeon",
    "neurosurgeon-k",
    "dads-light",
    "dads-heavy",
    "loadpart",
    "d3",
    "optimal",
    "planner",
    "planner-priced",
)
"""What the README compares."""

QUICK = ("device-only", "loadpart")
QUICK_MODELS, QUICK_SCENARIOS = ("torchvision:alexnet", "torchvision:resnet18"), ("static", "both", "streaming")


def run_compare(config: CompareConfig) -> list[Row]:
    """Compare policies as the settings say, write the folder, print the summary.

    Raises:
        ConfigError: when there is no such policy, scenario, model or trace.
        PlanError: when a policy can do nothing at some site.
    """
    plan = make_plan(config)
    console = Console()
    console.print(
        f"{len(plan.tasks())} tasks, {len(plan.policies)} policies, {config.workers} processes", highlight=False
    )
    played = play_live(plan) if config.backend == "live" else play_all(plan, config.workers)
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, *times, console=console) as progress:
        bar = progress.add_task("starting", total=len(plan.tasks()))
        for (scenario, site), episodes in played:
            found.append(((scenario, site), episodes))
            progress.update(bar, advance=1, description=f"{scenario}, {episodes[0].model}")
    rows = write_report(config, plan, in_order(plan, found))
    console.print(
        (config.folder / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True
    )
    console.print(f"tables and pictures: {config.folder}; {board_command(config.folder)}", highlight=False)
    return rows


def make_plan(config: CompareConfig) -> Plan:
    """Fill in what the settings leave open, and check every name.

    Raises:
        ConfigError: when there is no such policy, scenario, model or trace.
    """
    policies = list(dict.fromkeys((*(config.policies or (QUICK if config.quick else RULES)), *config.baselines)))
    is_live = config.backend == "live"
    is_alone = not is_live and not config.self_play
    policies += [name for name in BOUNDS if config.bounds and is_alone and name not in policies]
    if not is_alone and set(policies) & set(BOUNDS):
        given = "--backend live" if is_live else "--self-play"
        raise ConfigError(
            f"expected policies with {given}, got {' or '.join(BOUNDS)}, which decide for one device only"
        )
    for name in policies:
        find_contestant(name)
    models = config.models or (QUICK_MODELS if config.quick else shipped_specs())
    unknown = sorted(set(config.scenarios) - set(SCENARIOS))
    if unknown:
        raise ConfigError(f"expected --scenarios among {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    plan = Plan(
        policies=tuple(policies),
        scenarios=config.scenarios or (QUICK_SCENARIOS if config.quick else SCENARIOS),
        models=tuple(models),
        per_model=1 if config.quick else config.per_model,
        episodes=config.episodes,
        num_requests=min(config.num_requests, 64) if config.quick else config.num_requests,
        input_kind=config.input_kind,
        seed=config.seed,
        traces=config.traces,
        split=config.split,
        self_play=config.self_play,
    )
    plan.scenario(plan.scenarios[0])  # an empty folder shows now
    return plan


def write_report(config: CompareConfig, plan: Plan, episodes: Sequence[Episode]) -> list[Row]:
    """Write the folder; what stood there of an earlier comparison is replaced."""
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(episodes, config.baselines, HELD_OUT, config.resamples)
    write_episodes(episodes, folder)
    write_table(rows, folder / "table.csv")
    text = [_header(config, plan), summary(rows), "## Details, all models", details(rows)]
    figures = draw_figures(plan, episodes)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    write_board(episodes, rows, figures, folder)
    load_pyplot().close("all")
    (folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return rows


def draw_figures(plan: Plan, episodes: Sequence[Episode]) -> dict[str, Figure]:
    """Draw the distributions of all scenarios, one episode of the most varied one, and the maps of the first site."""
    figures = {f"latency-{scenario}": draw_latencies(episodes, scenario) for scenario in plan.scenarios}
    shown = next(kind for kind in (*_SHOWN, plan.scenarios[0]) if kind in plan.scenarios)
    policies = [find_contestant(name) for name in plan.policies if name not in BOUNDS]
    site = plan.site(0)
    timeline = record_timeline(
        site, plan.scenario(shown), plan.world_seed(0, 0), plan.num_requests, policies, self_play=plan.self_play
    )
    figures["timeline"] = draw_timeline(timeline)
    maps = {contestant.name: decision_map(site, contestant) for contestant in policies}
    figures["decisions"] = draw_maps(maps, f"Tiers that run layers, {site.name}")
    return figures


_SHOWN = ("both", "streaming")


def _header(config: CompareConfig, plan: Plan) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    worlds = "fitted families" if plan.traces is None else f"recorded traces, {plan.split} files"
    return (
        f"# Policies in the same worlds ({config.backend})\n\n"
        f"{len(plan.models)} models, {plan.per_model} sites of each, {plan.episodes} worlds of each site and scenario, "
        f"{plan.num_requests} requests of each world; {worlds}; seeds from {plan.seed} on. Latencies are over the site's "
        "best latency on idle nodes at nominal rates; a request that was never answered counts as its deadline. "
        f"Intervals: {config.resamples} bootstrap draws of worlds, the same for every policy; * where 1 is outside. "
        f"{'In contention all devices decide by the same policy. ' if config.self_play else ''}"
        "*clairvoyant* and *rollout* know the future and are no policies. Decision times are this machine's, which may "
        f"have been busy: {machine}."
    )


def board_command(folder: Path) -> str:
    """How to look at the logs."""
    return f"tensorboard --logdir {folder / 'tensorboard'}"
