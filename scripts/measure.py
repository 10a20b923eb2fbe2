"""Measure the models whose profiles ship and merge them into the package: see `agent.ship`."""

import os

import tyro

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads its thread pool
    from agent.ship import ShipConfig, run_ship

    run_ship(tyro.cli(ShipConfig, description=__doc__))
