"""`make bench`: see `agent.bench`. Prints a table and the bars; exits 1 when a bar is missed."""

import os
import sys

import tyro
from rich.console import Console

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its thread pool

from agent.bench.echo import EchoConfig, run_echo
from agent.bench.env import EnvConfig, run_env
from agent.bench.plan import PlanConfig, run_plan
from agent.bench.predict import PredictConfig, run_predict
from agent.bench.recovery import RecoveryConfig, run_recovery
from agent.bench.split import SplitConfig, run_split
from agent.bench.testbed import TestbedConfig, run_testbed
from agent.bench.tiles import TilesConfig, run_tiles

if __name__ == "__main__":
    config = tyro.extras.subcommand_cli_from_dict(
        {
            "echo": EchoConfig,
            "env": EnvConfig,
            "plan": PlanConfig,
            "predict": PredictConfig,
            "recovery": RecoveryConfig,
            "split": SplitConfig,
            "testbed": TestbedConfig,
            "tiles": TilesConfig,
        }
    )
    assert isinstance(
        config,
        EchoConfig
        | EnvConfig
        | PlanConfig
        | PredictConfig
        | RecoveryConfig
        | SplitConfig
        | TestbedConfig
        | TilesConfig,
    )
    match config:
        case EchoConfig():
            report = run_echo(config)
        case EnvConfig():
            report = run_env(config)
        case PlanConfig():
            report = run_plan(config)
        case PredictConfig():
            report = run_predict(config)
        case RecoveryConfig():
            report = run_recovery(config)
        case SplitConfig():
            report = run_split(config)
        case TestbedConfig():
            report = run_testbed(config)
        case TilesConfig():
            report = run_tiles(config)
    report.show(Console(width=max(Console().width, 120)))
    if config.json is not None:
        report.write(config.json)
    sys.exit(0 if all(bar.holds for bar in report.bars) else 1)
