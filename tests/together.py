"""Two processes that do the same thing at the same time."""

import subprocess
import sys


def run_together(code: str, *arguments: str) -> list[list[float]]:
    """Run code in two processes; each prints READY, waits for a line, and prints numbers: these, sorted by the first."""
    command = [sys.executable, "-c", code, *arguments]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sorted([float(word) for word in process.communicate(timeout=100)[0].split()] for process in processes)
