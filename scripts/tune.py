"""Search the settings of the rules on training seeds: see `agent.compare.tune`."""

import tyro

from agent.compare.tune import TuneConfig, run_tune

if __name__ == "__main__":
    print(run_tune(tyro.cli(TuneConfig)).read_text(encoding="utf-8"))
