"""`python -m runtime.node`: the worker alone, as the test bed starts it. Users type `offcut worker`."""

import tyro

from runtime.node.config import WorkerConfig
from runtime.node.run import run_worker

if __name__ == "__main__":
    run_worker(tyro.cli(WorkerConfig))
