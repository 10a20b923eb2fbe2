"""Train a policy in the twin: `offcut train`."""

import os

import tyro

from agent.train.config import TrainConfig

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its thread pool
    from agent.cli import run

    run(tyro.cli(TrainConfig))
