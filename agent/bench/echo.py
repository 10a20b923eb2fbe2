"""Echo: a tensor over and back, our channel with all its checks against raw pyzmq and gRPC.

Two processes per peer on loopback, all peers interleaved in one run, so that a busy machine slows all alike. A
transport's cost shows as a ratio; the milliseconds are this machine's at this moment.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import zmq

from agent.bench.echo_peers import GRPC_METHOD, GRPC_OPTIONS
from agent.bench.report import Bar, Report
from runtime.testbed.process import ManagedProcess
from runtime.types import Plan
from runtime.wire.channel import Hub, create_keys
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Connected, Limits, ReceivedData
from runtime.wire.keys import load_keys, load_public_key
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Hello, Submit
from runtime.wire.pack import Packed, pack, unpack

SIZES_BYTES = {"4 KB": 4096, "100 KB": 100_352, "400 KB": 401_408, "800 KB": 802_816, "3.2 MB": 3_211_264}
BOUND_SIZE = "400 KB"
ROUNDS = 20
QUICK_ROUNDS = 4
WARM_UP = 20
READY_S = 60.0

Echo = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoConfig:
    """Echo tensors of five sizes: our channel, raw pyzmq, both with CURVE, and gRPC."""

    json: Path | None = None
    """Where to write the report as JSON."""

    quick: bool = False
    """Fewer rounds: shows that everything works, not how fast."""


def run_echo(config: EchoConfig) -> Report:
    """Measure all peers at all sizes."""
    report = Report("echo", "loopback, two processes a peer, interleaved; milliseconds there and back")
    rounds = QUICK_ROUNDS if config.quick else ROUNDS
    medians: dict[tuple[str, str], float] = {}
    with _open_peers() as peers:
        for label, nbytes in SIZES_BYTES.items():
            tensor = torch.rand(nbytes // 4)
            seconds = _measure(peers, tensor, rounds)
            for name, samples in seconds.items():
                medians[name, label] = statistics.median(samples)
                report.add(f"{name} {label}", "p50", medians[name, label] * 1e3, "ms")
                report.add(f"{name} {label}", "p95", sorted(samples)[int(0.95 * len(samples))] * 1e3, "ms")
                report.add(f"{name} {label}", "min", min(samples) * 1e3, "ms")
    _add_bars(report, medians)
    return report


def _add_bars(report: Report, medians: dict[tuple[str, str], float]) -> None:
    pairs = [
        ("echo_400KB_plain_over_pyzmq", "offcut", "pyzmq", 1.3),
        ("echo_400KB_curve_over_pyzmq_curve", "offcut curve", "pyzmq curve", 1.3),
        ("echo_400KB_plain_over_grpc", "offcut", "grpc", 0.6),
    ]
    for name, ours, theirs, bound in pairs:
        ratio = medians[ours, BOUND_SIZE] / medians[theirs, BOUND_SIZE]
        report.bars.append(Bar(name, ratio, bound, "lower"))


def _measure(peers: dict[str, Echo], tensor: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every echo; the peers take turns, forwards and backwards."""
    per_round = max(5, min(20, 20_000_000 // tensor.nbytes))
    for echo in peers.values():
        for _ in range(WARM_UP):
            echo(tensor)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        names = list(peers) if turn % 2 else list(peers)[::-1]
        for name in names:
            for _ in range(per_round):
                start_s = time.perf_counter()
                peers[name](tensor)
                seconds[name].append(time.perf_counter() - start_s)
    return seconds


@contextlib.contextmanager
def _open_peers() -> Iterator[dict[str, Echo]]:
    """Start every far end and connect to it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offcut-bench-")))
        keys = folder / "keys"
        for name in ("node", "device"):
            create_keys(keys, name)

        def start(name: str, *arguments: str) -> ManagedProcess:
            process = ManagedProcess(name, "agent.bench.echo_peers", arguments, folder)
            stack.callback(process.wait)
            stack.callback(process.close_input)
            return process

        processes = [
            start("hub", "hub"),
            start("pyzmq", "pyzmq"),
            start("hub-curve", "hub", str(keys)),
            start("pyzmq-curve", "pyzmq", str(keys)),
            start("grpc", "grpc"),
        ]
        # All are up before the first connection: a hub that is not polled for seconds counts as gone.
        hub, bare, hub_curve, bare_curve, grpc = [process.wait_line("READY", READY_S) for process in processes]
        yield {
            "grpc": _connect_grpc(stack, grpc),
            "pyzmq": _connect_pyzmq(stack, bare, None),
            "pyzmq curve": _connect_pyzmq(stack, bare_curve, keys),
            "offcut": _connect_hub(stack, hub, None),
            "offcut curve": _connect_hub(stack, hub_curve, keys),
        }


def _connect_hub(stack: contextlib.ExitStack, address: str, keys: Path | None) -> Echo:
    own = None if keys is None else load_keys(keys / "device.key_secret")
    server_key = None if keys is None else load_public_key(keys / "node.key")
    hub = Hub("device", keys=own)
    stack.callback(hub.close)
    hello = Hello(PROTOCOL_VERSION, "device", "", CAPABILITIES)
    peer = hub.connect("node", address, hello, server_key=server_key)
    while not any(isinstance(event, Connected) for event in hub.poll(READY_S)):
        pass
    plan, auto, limits = Plan.split(20, 10, 15), AutoCodec(), Limits()

    def echo(tensor: torch.Tensor) -> None:
        packed = pack({"x": tensor}, ["x"], "raw", auto, float("nan"))
        submit = Submit(1, "model", plan, "tensor", 9.0, packed.headers)
        hub.send_data(peer, submit, packed.frames, 0)
        while True:
            for event in hub.poll(READY_S):
                if isinstance(event, ReceivedData):
                    unpack(Packed(event.body.tensors, event.frames), ["x"], limits)
                    return

    return echo


def _connect_pyzmq(stack: contextlib.ExitStack, address: str, keys: Path | None) -> Echo:
    context = zmq.Context()
    stack.callback(context.term)
    dealer = context.socket(zmq.DEALER)
    stack.callback(dealer.close, 0)
    if keys is not None:
        own = load_keys(keys / "device.key_secret")
        dealer.curve_publickey, dealer.curve_secretkey = own.public, own.secret
        dealer.curve_serverkey = load_public_key(keys / "node.key")
    dealer.connect(address)
    poller = zmq.Poller()
    poller.register(dealer, zmq.POLLIN)
    header = bytes(170)  # as long as our own

    def echo(tensor: torch.Tensor) -> None:
        dealer.send_multipart([header, tensor.numpy().data], copy=False)
        poller.poll()
        _, payload = dealer.recv_multipart(copy=False)
        torch.frombuffer(payload.buffer, dtype=tensor.dtype)

    return echo


def _connect_grpc(stack: contextlib.ExitStack, address: str) -> Echo:
    import grpc  # only the `bench` extra has it

    channel = stack.enter_context(grpc.insecure_channel(address, options=GRPC_OPTIONS))
    call = channel.unary_unary(GRPC_METHOD)

    def echo(tensor: torch.Tensor) -> None:
        answer = call(tensor.numpy().tobytes(), wait_for_ready=True)
        torch.frombuffer(bytearray(answer), dtype=tensor.dtype)

    return echo
