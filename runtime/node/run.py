"""The main function of a worker's process: signals, commands on standard input, and the lines that say how far it is."""

import signal
import threading
from types import FrameType

import msgspec
import torch

from runtime.errors import ConfigError
from runtime.node.commands import listen
from runtime.node.config import WorkerConfig
from runtime.node.worker import Command, Worker


def _listen_to_input(worker: Worker) -> None:
    """Carry out commands, and end with the parent."""

    def answer(line: bytes) -> str:
        try:
            worker.obey(msgspec.json.decode(line, type=Command))
        except (msgspec.MsgspecError, ConfigError) as error:
            return f"ERROR {error}"
        return "OK"

    listen(answer)
    worker.stop()


def run_worker(config: WorkerConfig) -> None:
    """Run a node until SIGTERM or SIGINT: the main function of `offcut worker`.

    Prints `BOUND <endpoint>` on standard output when the address is taken, and `READY <endpoint>` when the models are
    loaded and requests are served.
    """
    torch.set_num_threads(config.threads)
    worker = Worker(config)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        worker.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    address = worker.bind()
    if config.exit_with_stdin:
        threading.Thread(target=_listen_to_input, args=(worker,), daemon=True).start()
    print(f"BOUND {address}", flush=True)
    try:
        worker.load()
    except BaseException:
        worker.close()
        raise
    print(f"READY {address}", flush=True)
    worker.serve()
