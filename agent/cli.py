"""The `offcut` command: parses one of the records of `agent.config` and runs it."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from agent.config import InferConfig, KeysConfig, StatusConfig
from runtime.errors import OffcutError
from runtime.node.config import WorkerConfig

Command = (
    Annotated[WorkerConfig, tyro.conf.subcommand("worker")]
    | Annotated[InferConfig, tyro.conf.subcommand("infer")]
    | Annotated[StatusConfig, tyro.conf.subcommand("status")]
    | Annotated[KeysConfig, tyro.conf.subcommand("keys")]
)


def parse(arguments: Sequence[str] | None = None) -> WorkerConfig | InferConfig | StatusConfig | KeysConfig:
    """Parse a command line; None takes this program's. Usage mistakes exit with 2."""
    return tyro.cli(Command, prog="offcut", args=arguments)


def run(command: WorkerConfig | InferConfig | StatusConfig | KeysConfig) -> None:
    """Run one parsed command; heavy libraries are imported here, so that `--help` and `keys` stay quick."""
    match command:
        case WorkerConfig():
            from runtime.node.worker import run_worker

            run_worker(command)
        case InferConfig():
            from agent.infer import run_infer

            run_infer(command)
        case StatusConfig():
            from agent.status import run_status

            run_status(command)
        case KeysConfig():
            from agent.keys import run_keys

            run_keys(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: exit 0 when all went well, 1 with one line of what failed and what to try, 2 for usage."""
    # Before torch loads its thread pool: waiting threads that spin take the cores from those that compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.path.insert(0, os.getcwd())  # package.module:factory means one of the folder that this was typed in
    try:
        run(parse(arguments))
    except OffcutError as error:
        print(f"offcut: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
