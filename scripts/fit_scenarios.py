"""Fit the synthetic bandwidth and load families to a folder of recorded traces (`env.fit`)."""

import tyro

from env.fit import fit_folder


def main(traces: str, report: str, table: str | None = None) -> None:
    """Fit on the training files of `traces`/network and `traces`/load; write a Markdown report and the table."""
    for family in fit_folder(traces, report, table):
        print(f"{family.kind:8} {family.name:16} fast {family.fast_s:g} s, slow {family.slow_s:g} s")


if __name__ == "__main__":
    tyro.cli(main)
