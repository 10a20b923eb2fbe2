"""Processes: several models and clients on one node, and nothing left when the program that started them is gone."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

import runtime
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import Session
from runtime.errors import ClusterError
from runtime.testbed.process import ManagedProcess
from runtime.types import Tier
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

MODELS = ("tests.models:chain", "tests.models:residual")

PROGRAM = """
import signal, sys, runtime
from runtime.deployment import ModelConfig
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    with runtime.Cluster(ModelConfig(spec="tests.models:chain"), edges=(), relays=("cloud",)) as cluster:
        print(cluster.folder, cluster.pid("cloud"), flush=True)
        sys.stdin.read()
"""


def open_session(spec: str, address: str) -> Session:
    node = NodeConfig(name="cloud", tier=Tier.CLOUD, address=address)
    deployment = Deployment(model=ModelConfig(spec=spec, input_kind="tensor"), nodes=(node,))
    return Session(deployment, runtime.load_policy("cloud-only"))


def test_a_node_serves_several_models_and_clients_at_once(tmp_path: Path) -> None:
    worker = ManagedProcess(
        "cloud", "runtime.node", ("--tier", "cloud", "--model", *MODELS, "--exit-with-stdin"), tmp_path
    )
    try:
        address = worker.wait_line("READY", 100.0)
        with (
            open_session(MODELS[0], address) as a,
            open_session(MODELS[1], address) as b,
            ThreadPoolExecutor(4) as pool,
        ):
            for session, spec in ((a, MODELS[0]), (b, MODELS[1])):
                model = runtime.load_model(spec)
                with torch.inference_mode():
                    whole = model.module(model.example)
                results = list(pool.map(lambda _, s=session, m=model: s.infer(m.example, deadline_s=60.0), range(8)))
                assert all(torch.equal(result.output, whole) for result in results)
                assert {result.outcome for result in results} == {"remote"}
            worker.ask_to_stop()  # with both connected: it says goodbye
            with pytest.raises(ClusterError, match="ended with code 0"):
                worker.wait_line("NEVER", 20.0)
            result = a.infer(runtime.load_model(MODELS[0]).example, deadline_s=60.0)
            assert result.outcome == "local"
    finally:
        worker.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["crash", "ctrl-c"])
def test_a_program_that_ends_takes_its_cluster_with_it(number: signal.Signals) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    with program:
        assert program.stdout is not None
        folder, pid = program.stdout.readline().split()
        children = psutil.Process(program.pid).children(recursive=True)
        assert int(pid) in {child.pid for child in children}
        assert len(children) == 2  # a node and a relay
        program.send_signal(number)
        program.wait(20.0)
        wait_for(lambda: not any(child.is_running() for child in children), 20.0)
    if number is signal.SIGINT:
        assert not Path(folder).exists()
    else:
        for path in Path(folder).iterdir():  # nobody was left to remove its logs
            path.unlink()
        Path(folder).rmdir()
