"""An episode's exogenous world: everything that happens whatever is decided."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from env.traces import GRID_S, FloatArray
from runtime.planning.arrays import Layout

NUM_PATHS = 6
"""Device to each of three edge nodes, device to the cloud, edge nodes to the cloud, edge nodes among each other."""

_EDGE_PATHS = 3
DEVICE_CLOUD, BACKBONE, PEERS = 3, 4, 5


@dataclass(frozen=True, slots=True)
class Background:
    """Requests of others at one node over one period of the world, or as much of it as the episode takes."""

    arrivals_s: FloatArray  # (M,) ascending
    service_s: FloatArray  # (M,) idle seconds of each


@dataclass(frozen=True, slots=True)
class World:
    """What was drawn for an episode. G: grid steps, which repeat after `period_s`; C: clients; R: requests each.

    Rates and round trips belong to paths; a directed link has its path's and `scale`. Client 0 decides by the agent's
    policy; the others see the same paths at other times (`shift`). A rate at the floor is an outage.
    """

    rate_bps: FloatArray  # (NUM_PATHS, G)
    rtt_s: FloatArray  # (NUM_PATHS, G)
    path: npt.NDArray[np.intp]  # (L,) of each link slot
    scale: FloatArray  # (L,)
    contention: FloatArray  # (N, G) factor on service times, >= 1
    is_down: npt.NDArray[np.bool_]  # (N, G) the node answers nobody
    background: tuple[Background, ...]  # (N,)
    shift: npt.NDArray[np.intp]  # (C,) grid steps
    arrivals_s: FloatArray  # (C, R) instants at which requests come
    input_bytes: FloatArray  # (C, R)
    deadline_s: FloatArray  # (C, R)
    noise: FloatArray  # (C, R, 3) factor on the service of each tier
    is_warm: npt.NDArray[np.bool_]  # (K,) candidates whose segments are built at the start
    background_until_s: float = math.inf  # no background after this; inf: all of a period, which then repeats

    @property
    def period_s(self) -> float:
        """After it the grid and the background start over."""
        return len(self.rate_bps[0]) * GRID_S

    @property
    def num_requests(self) -> int:
        """Requests of each client."""
        return len(self.arrivals_s[0])


def paths_of(layout: Layout, cloud: str | None) -> npt.NDArray[np.intp]:
    """Give every link slot its path, shape (L,); edge nodes beyond the third share its path."""
    cloud_slot = -1 if cloud is None else layout.node_slot[cloud]
    out = np.full(len(layout.links), PEERS, dtype=np.intp)
    for at, link in enumerate(layout.links):
        near, far = sorted(layout.node_slot[name] for name in link)
        if near == 0:
            out[at] = DEVICE_CLOUD if far == cloud_slot else min(far - 1, _EDGE_PATHS - 1)
        elif far == cloud_slot:
            out[at] = BACKBONE
    return out
