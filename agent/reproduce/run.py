"""`offcut reproduce`: run what is missing of an experiment, then write what came of it."""

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agent.config import ReproduceConfig
from agent.photos import sample_photo
from agent.reproduce.bed import Bed
from agent.reproduce.grids import D3, LOADPART, QUICK_D3, QUICK_LOADPART, fingerprint
from agent.reproduce.papers import D3Paper, LoadpartPaper
from agent.reproduce.report import write_report
from agent.reproduce.results import Cell, Store
from runtime.errors import OffcutError

SPEED_S = 600.0
"""Seconds over which the bar's speed is averaged."""


def run_reproduce(config: ReproduceConfig) -> None:
    """Run an experiment to its end, or go on with one that was stopped; then print its tables.

    Raises:
        ConfigError: the folder holds results of other constants.
        OffcutError: a request failed, or the device finished one itself; the cells before it are kept.
    """
    torch.set_num_threads(1)
    console = Console()
    paper = _paper(config)
    store = Store(config.folder / "results.jsonl", fingerprint(paper.grid))
    missing = store.missing(paper.cells())
    try:
        with _progress(console) as progress:
            _run_cells(paper, missing, store, progress)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise
    finally:
        if store.results:
            path = write_report(paper, store.results, config.folder)
            console.print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
            console.print(f"tables, pictures, TensorBoard: {config.folder}", highlight=False)


def _paper(config: ReproduceConfig) -> LoadpartPaper | D3Paper:
    if config.paper == "loadpart":
        return LoadpartPaper(QUICK_LOADPART if config.quick else LOADPART)
    return D3Paper(QUICK_D3 if config.quick else D3)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
    return Progress(*columns, *times, console=console, speed_estimate_period=SPEED_S)


def _run_cells(paper: LoadpartPaper | D3Paper, missing: list[Cell], store: Store, progress: Progress) -> None:
    """Run cells, the nodes of each network started once."""
    photo = sample_photo()
    weights = {cell: paper.request_s(cell) * paper.grid.repeat * len(paper.rules(cell.model)) for cell in missing}
    task = progress.add_task("nothing is missing", total=sum(weights.values()) or 1.0)
    for model in dict.fromkeys(cell.model for cell in missing):
        progress.update(task, description=f"starting {model}")
        with Bed(paper, model, photo, fingerprint(paper.grid)) as bed:
            for cell in (cell for cell in missing if cell.model == model):
                progress.update(task, description=cell.label)
                result = bed.run_cell(cell)
                own = [run for run in result.runs if run.outcome in ("local", "failed")]
                if own:
                    raise OffcutError(f"{cell.label}: the device finished {len(own)} requests itself; run it again")
                store.append(result)
                progress.advance(task, weights[cell])
                if not progress.console.is_terminal:  # no bar there: a line for the log
                    done = f"{len(store.results)} of {len(paper.cells())}"
                    progress.console.print(f"{done}: {cell.label}, {result.seconds:.1f} s", highlight=False)
