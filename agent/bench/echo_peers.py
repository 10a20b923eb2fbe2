"""The far ends of the echo benchmark, one process each: `python -m agent.bench.echo_peers KIND [KEYS]`.

Every peer takes a message with a small header and one payload and sends both back. Raw pyzmq and gRPC do nothing else:
no checks, no acknowledgement, no liveness. Prints `READY <address>` and ends with standard input.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from runtime.types import Tier
from runtime.wire.channel import Hub
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits, ReceivedData
from runtime.wire.keys import load_keys
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Result, Submit, Welcome
from runtime.wire.pack import Packed, pack, unpack

GRPC_METHOD = "/offcut.Echo/Echo"
GRPC_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def serve_hub(keys: Path | None) -> None:
    """Echo over our channel, tensors decoded and checked and coded again."""
    own = None if keys is None else load_keys(keys / "node.key_secret")
    hub = Hub("node", keys=own, authorised=keys)
    welcome = Welcome(PROTOCOL_VERSION, "node", Tier.EDGE, (), CAPABILITIES)
    _announce(hub.bind("tcp://127.0.0.1:*", lambda hello: welcome))
    auto, limits, bandwidth_bps = AutoCodec(), Limits(), float("nan")
    while True:
        for event in hub.poll(1.0):
            if isinstance(event, ReceivedData) and isinstance(event.body, Submit):
                tensors = unpack(Packed(event.body.tensors, event.frames), ["x"], limits)
                packed = pack(tensors, ["x"], "raw", auto, bandwidth_bps)
                hub.send_data(event.peer, Result(event.body.request, (), packed.headers), packed.frames, 0)


def serve_pyzmq(keys: Path | None) -> None:
    """Echo over a bare ROUTER, without a copy."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    if keys is not None:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve(domain="*", location=str(keys))
        own = load_keys(keys / "node.key_secret")
        router.curve_publickey, router.curve_secretkey, router.curve_server = own.public, own.secret, True
    port = router.bind_to_random_port("tcp://127.0.0.1")
    _announce(f"tcp://127.0.0.1:{port}")
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    while True:
        poller.poll()
        client, header, payload = router.recv_multipart(copy=False)
        router.send_multipart([client, header, payload.buffer], copy=False)


def serve_grpc() -> None:
    """Echo over gRPC: one unary method on bytes."""
    import grpc  # only the `bench` extra has it

    def handle(request: bytes, context: object) -> bytes:
        del context
        return request

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
        def service(self, details: "grpc.HandlerCallDetails") -> object:
            return grpc.unary_unary_rpc_method_handler(handle) if details.method == GRPC_METHOD else None

    server = grpc.server(ThreadPoolExecutor(1), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    _announce(f"127.0.0.1:{port}")
    server.wait_for_termination()


def _announce(address: str) -> None:
    sys.stdout.write(f"READY {address}\n")
    sys.stdout.flush()


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)  # the loops above have no other end


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    kind, *rest = sys.argv[1:]
    folder = Path(rest[0]) if rest else None
    if kind == "hub":
        serve_hub(folder)
    elif kind == "pyzmq":
        serve_pyzmq(folder)
    else:
        serve_grpc()
