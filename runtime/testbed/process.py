"""One child process that says READY: started, watched, killed, never left behind."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import ClusterError

STOP_S = 8.0
"""How long a process that was told to stop may take before it is killed."""


READY_S = 180.0
"""How long a process may take to be ready: a worker loads and traces its model, on a busy machine."""

COMMAND_S = 30.0
"""How long a process may take to answer a command."""


class ManagedProcess:
    """A `python -m MODULE` child on a pipe.

    Its standard input is held open by us: when we end, however we end, the pipe closes and the child ends too. Its
    standard error goes to a log file, whose tail is part of every `ClusterError`.

    Args:
        name: for messages and the log file.
        module: what to run.
        arguments: its command line.
        log_folder: where `<name>.log` goes.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], log_folder: Path) -> None:
        self.name = name
        self.log = log_folder / f"{name}.log"
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._gate = threading.Lock()
        self.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process; `wait_ready` waits for it."""
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle: the child is stopped in order
            )
        self._lines = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"offcut-read-{self.name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        process, lines = self._process, self._lines
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    def wait_line(self, prefix: str, timeout_s: float) -> str:
        """Wait for a line that starts with `prefix` and return what follows it.

        Raises:
            ClusterError: when it does not come in time, or the process ends first; with the tail of its log.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(until_s - time.monotonic(), 0.0))
            except queue.Empty:
                raise ClusterError(f"{self.name} said no {prefix!r} within {timeout_s:.0f} s\n{self.tail()}") from None
            if line is None:
                assert self._process is not None
                code = self._process.wait()
                raise ClusterError(f"{self.name} ended with code {code} before it said {prefix!r}\n{self.tail()}")
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip()

    def command(self, line: str) -> str:
        """Write a line to its standard input and give the text of its answer. Safe for threads.

        Raises:
            ClusterError: when it answers ERROR, answers not at all, or has ended; with the tail of its log.
        """
        with self._gate:
            self._forget_lines()  # the late answer to a command that was given up
            try:
                self.send_line(line)
            except OSError as error:
                raise ClusterError(f"{self.name} takes no command, it has ended\n{self.tail()}") from error
            text = self.wait_line("", COMMAND_S)
        if text.startswith("ERROR"):
            raise ClusterError(f"{self.name} refused {line}: {text.removeprefix('ERROR').strip()}")
        return text.removeprefix("OK").strip()

    def _forget_lines(self) -> None:
        while not self._lines.empty():
            if self._lines.get() is None:
                self._lines.put(None)  # the end stays the end
                return

    def send_line(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close_input(self) -> None:
        """Close its standard input, as the end of this program would."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self.is_alive:
            assert self._process is not None
            self._process.send_signal(number)

    def ask_to_stop(self) -> None:
        """Send SIGTERM, also to one that hangs: a worker drains first."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Wait for the end, by force after `STOP_S`; then nothing of it is left here."""
        process = self._process
        if process is None:
            return
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent input of a process that is gone
                    pipe.close()
        self._process = None

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""
