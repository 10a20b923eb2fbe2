"""Compare policies in the same worlds: see `agent.compare.run`."""

import os

import tyro

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its thread pool
    from agent.compare.run import run_compare
    from agent.config import CompareConfig

    run_compare(tyro.cli(CompareConfig))
