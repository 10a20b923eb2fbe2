"""Run pictures through a deployment under a trained policy behind its guard: `offcut infer --policy default`."""

import os
from dataclasses import replace

import tyro

from agent.config import InferConfig

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its thread pool
    from agent.cli import run

    config = tyro.cli(InferConfig, description=__doc__)
    run(replace(config, policy=config.policy or "default"))
