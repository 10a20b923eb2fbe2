"""Every error Offcut raises on purpose; each also is the builtin it resembles.

    OffcutError
      ConfigError         (ValueError)       a field, option or file outside its range: expected, got, what to do
      ModelError          (ValueError)       a model that cannot be found, built or traced: the layer and the way out
      InputError          (ValueError)       a request's input that this model cannot take
      PlanError           (ValueError)       a plan that is not legal for this model, deployment or constraints
      TensorMismatch      (ValueError)       shape or dtype differs at a segment boundary: our bug, never hidden
      TransportError      (OSError)          anything on the wire
        PeerTimeout       (TimeoutError)     no answer within the time given: which node, how long
        PeerClosed        (ConnectionError)  the other side went away
        ProtocolError                        a malformed message, or one that breaks a cap
        HandshakeError                       a peer that must not be talked to: wrong version, fingerprint or key
      NodeError           (RuntimeError)     a node answered that it cannot finish this request
        NodeBusy                             its queue is full
        DeadlineExceeded  (TimeoutError)     the request's time ran out
      ClusterError        (RuntimeError)     a process did not become ready, or died too often

In live training a `PlanError`, or a `NodeError` whose `is_plan_fault` is set, is the plan's fault and costs
reward; every other error is the machinery's. `OffcutError` is what a caller catches to catch them all.
"""


class OffcutError(Exception):
    """Base of every error of this project."""


class ConfigError(OffcutError, ValueError):
    """A field, option or file is outside its range."""


class ModelError(OffcutError, ValueError):
    """A model cannot be found, built or traced."""


class InputError(OffcutError, ValueError):
    """A request's input is not one this model can take."""


class PlanError(OffcutError, ValueError):
    """A plan is not legal for this model, deployment or constraints."""


class TensorMismatch(OffcutError, ValueError):  # noqa: N818 - the design's name
    """A tensor at a segment boundary has another shape or dtype than the graph says."""


class TransportError(OffcutError, OSError):
    """Something on the wire failed."""


class PeerTimeout(TransportError, TimeoutError):  # noqa: N818 - the design's name
    """A peer did not answer in time."""


class PeerClosed(TransportError, ConnectionError):  # noqa: N818 - the design's name
    """A peer went away."""


class ProtocolError(TransportError):
    """A message is malformed or breaks a cap."""


class HandshakeError(TransportError):
    """A peer must not be talked to: its version, fingerprint or key is wrong."""


class NodeError(OffcutError, RuntimeError):
    """A node answered that it cannot finish a request.

    Attributes:
        is_plan_fault: True when the plan caused it (memory, a segment that cannot run), not the machinery.
    """

    def __init__(self, message: str, *, is_plan_fault: bool = False) -> None:
        super().__init__(message)
        self.is_plan_fault = is_plan_fault


class NodeBusy(NodeError):  # noqa: N818 - the design's name
    """A node's queue is full."""


class DeadlineExceeded(NodeError, TimeoutError):  # noqa: N818 - the design's name
    """A request's time ran out before an answer."""


class ClusterError(OffcutError, RuntimeError):
    """A process did not become ready, or died too often."""
