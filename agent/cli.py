"""The `offcut` command: parses one of the records of `agent.config` and runs it."""

import inspect
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any, TypeAlias, Union

import tyro

from agent.config import (
    CalibrateConfig,
    CheckConfig,
    CompareConfig,
    InferConfig,
    KeysConfig,
    LayersConfig,
    MeasureConfig,
    PlanConfig,
    ReproduceConfig,
    StatusConfig,
)
from agent.tables import loading
from agent.train.config import TrainConfig
from runtime.errors import OffcutError
from runtime.node.config import WorkerConfig

Config: TypeAlias = (
    WorkerConfig
    | InferConfig
    | PlanConfig
    | StatusConfig
    | CheckConfig
    | LayersConfig
    | MeasureConfig
    | CalibrateConfig
    | KeysConfig
    | ReproduceConfig
    | TrainConfig
    | CompareConfig
)

COMMANDS: dict[str, type[Config]] = {
    "worker": WorkerConfig,
    "infer": InferConfig,
    "plan": PlanConfig,
    "status": StatusConfig,
    "check": CheckConfig,
    "layers": LayersConfig,
    "measure": MeasureConfig,
    "calibrate": CalibrateConfig,
    "keys": KeysConfig,
    "reproduce": ReproduceConfig,
    "train": TrainConfig,
    "compare": CompareConfig,
}

DESCRIPTION = """Split DNN inference across a device, edge nodes and a cloud. `offcut COMMAND --help` explains a command;
`offcut --version` prints what device and nodes must agree on."""


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Parse a command line; None takes this program's. Usage mistakes exit with 2."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    is_overview = not given or given[0] not in COMMANDS
    kinds = []
    for name, kind in COMMANDS.items():
        summary = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, description=summary if is_overview else None)])
    command: Any = Union[tuple(kinds)]  # noqa: UP007 - made at run time
    config: Config = tyro.cli(command, prog="offcut", description=DESCRIPTION, args=given)
    return config


def run(command: Config) -> None:
    """Run one parsed command; heavy libraries are imported here, so that `--help` and `keys` stay quick."""
    match command:
        case WorkerConfig():
            from runtime.node.run import run_worker

            run_worker(command)
        case InferConfig():
            from agent.preflight import prepare

            prepared = prepare(command)  # before torch is loaded: a mistake shows at once
            with loading("loading torch"):
                from agent.infer import run_infer

            run_infer(command, prepared)
        case PlanConfig():
            from agent.plan import run_plan

            run_plan(command)
        case StatusConfig():
            from agent.status import run_status

            run_status(command)
        case CheckConfig():
            from agent.check import run_check

            run_check(command)
        case LayersConfig():
            from agent.layers import run_layers

            run_layers(command)
        case KeysConfig():
            from agent.keys import run_keys

            run_keys(command)
        case MeasureConfig() | CalibrateConfig():
            _run_measurement(command)
        case ReproduceConfig() | TrainConfig() | CompareConfig():
            _run_experiment(command)


def _run_experiment(command: ReproduceConfig | TrainConfig | CompareConfig) -> None:
    """Run what takes minutes to hours."""
    with loading("loading torch"):
        from agent.compare.run import run_compare
        from agent.reproduce.run import run_reproduce
        from agent.train.run import run_train

    match command:
        case ReproduceConfig():
            run_reproduce(command)
        case TrainConfig():
            run_train(command)
        case CompareConfig():
            run_compare(command)


def _run_measurement(command: MeasureConfig | CalibrateConfig) -> None:
    match command:
        case MeasureConfig():
            from agent.measure import run_measure

            run_measure(command)
        case CalibrateConfig():
            from agent.calibrate import run_calibrate

            run_calibrate(command)


def version() -> str:
    """This release, and the others that device and nodes must share."""
    libraries = ("torch", "torchvision", "timm")
    return f"offcut {_release('offcut')} (Python {platform.python_version()}, " + (
        ", ".join(f"{library} {_release(library)}" for library in libraries) + ")"
    )


def _release(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit 0 when all went well, 1 with one line of what failed and what to try, 2 for usage."""
    # Before torch loads its thread pool: waiting threads that spin take the cores from those that compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.path.insert(0, os.getcwd())  # package.module:factory means one of the folder that this was typed in
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        print(version())
        return
    try:
        run(parse(given))
    except OffcutError as error:
        print(f"offcut: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
