"""`make demo`: see `agent.demo`."""

import os
import sys

import tyro

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its thread pool
    from agent.demo import DemoConfig, run_demo

    sys.exit(0 if run_demo(tyro.cli(DemoConfig)) else 1)
