"""Episodes on the real runtime: device, edge nodes and cloud as processes over ZeroMQ, in the worlds that the twin plays.

Nodes are emulated as slow as their site says; links are relays with the world's rates and round trips; requests are real
and their answers true, but where a node replays. What the device knows is what its session measured. A request's time
begins when `step` hands it over: what a learner needs for its decision is no part of it, and when that is so long that
the next request should have come already, the world's clock is set back by as much.
"""

import contextlib
import logging
import queue
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from env.backend import Book, Ended, Seed, Sent, TwinBackend
from env.live_site import LiveSite
from env.play import Play, playable
from env.reward import EXCESS_WEIGHT
from env.scenario import Scenario
from env.site import Site
from env.spaces import Observation
from env.traces import FloatArray
from env.world import World
from runtime.device.session import Arrival, InferenceResult, Session
from runtime.errors import ConfigError, OffcutError, PeerTimeout
from runtime.model.samples import sample_file
from runtime.planning.arrays import encode_states
from runtime.planning.policies.guard import GuardSettings, guard_mask
from runtime.planning.policies.registry import fixed_policy
from runtime.testbed.cluster import Cluster
from runtime.types import DEVICE_NODE, Plan, SystemState

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
"""How long an episode waits for nodes before it begins without them."""

PROBED_S = 4.0
"""How long it waits for the first reading of every link."""

GRACE_S = 30.0
"""A request that has not ended so long after its deadline is lost: the machinery is at fault, not the plan."""

_LOW_QUALITY = 50
"""Of the JPEG that stands for an input: small, so that random bytes behind it can make up any size of the world's."""


class LiveBackend:
    """Episodes on the real runtime, one cluster at a time: it is kept while episodes stay at one site.

    Args:
        sites: where episodes can take place.
        num_requests: steps of an episode.
        log_folder: where the session's events go; None writes none.
        guard: the mask leaves out what a guard with these limits and the planner as its fallback would refuse; None:
            only what needs a node that is down.
        excess_weight: of the linear part of the reward (`env.reward`).

    Raises:
        ConfigError: when there is no site, or a number is not positive.
    """

    def __init__(
        self,
        sites: Sequence[LiveSite],
        *,
        num_requests: int,
        log_folder: Path | None = None,
        guard: GuardSettings | None = None,
        excess_weight: float = EXCESS_WEIGHT,
    ) -> None:
        if not sites:
            raise ConfigError("expected at least one site, got none")
        self._sites = tuple(sites)
        self._twin = TwinBackend([site.site for site in sites], num_requests=num_requests)
        self._books = [Book(site.site, excess_weight) for site in sites]
        self._log_folder, self._guard = log_folder, guard
        self._site = -1  # of the cluster
        self._cluster: Cluster | None = None
        self._episode: _Episode | None = None
        self.paused_s = 0.0
        """By how much the last step came too late, and the world's clock was set back."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where episodes can take place."""
        return self._twin.sites

    @property
    def num_requests(self) -> int:
        """Steps of an episode."""
        return self._twin.num_requests

    @property
    def reference_s(self) -> FloatArray:
        """The planner's latency in the twin for every request of this episode."""
        return self._twin.reference_s

    @property
    def time_s(self) -> float:
        """Instant of the request at hand."""
        return self._running().time_s

    @property
    def cluster(self) -> Cluster:
        """The processes, to look at or to break.

        Raises:
            ConfigError: before the first episode.
        """
        if self._cluster is None:
            raise ConfigError("expected a running cluster, got none: call start() first")
        return self._cluster

    def start(self, site: int, scenario: Scenario, seed: Seed) -> None:
        """Start an episode and go on to its first request.

        Raises:
            OffcutError: when processes do not start, or no node answers a device without the model.
        """
        self.start_world(site, scenario.world(self.sites[site], seed, self.num_requests + 1))

    def start_world(self, site: int, world: World) -> None:
        """Start an episode in a world at hand, of `num_requests` + 1 requests or fewer.

        Raises:
            OffcutError: as `start`.
        """
        self._end_episode()
        self._twin.start_world(site, world)
        try:
            self._start_cluster(site)
            self._episode = _Episode(
                self.cluster,
                self._sites[site],
                self._books[site],
                playable(self.sites[site], world),
                self.reference_s,
                self._log_folder,
            )
            self._episode.begin()
        except BaseException:
            self._drop()
            raise

    def state(self) -> SystemState:
        """What the session has measured as the request at hand comes."""
        return self._running().arrival.state

    def observation(self) -> Observation:
        """The same, encoded for a learner."""
        book, state = self._running().book, self._running().arrival.state
        features = book.encoder.encode_state(state)
        if self._guard is not None:
            features = replace(features, mask=guard_mask(book.site.candidates, state, self._guard)[None])
        return book.observe(features)

    def step(self, plan: Plan) -> tuple[bool, list[Ended]]:
        """Run the request at hand under any legal plan, and wait for the next.

        Raises:
            PlanError: for a plan that is not legal.
            ConfigError: when no episode is running.
            OffcutError: the machinery has failed; the episode is over, and the next one starts with new processes.
        """
        episode = self._running()
        if episode.is_over:
            raise ConfigError("expected a running episode, got one that is over: call start() first")
        try:
            ended = episode.step(plan)
        finally:
            self.paused_s = episode.paused_s
        return episode.is_over, ended

    def replace(self) -> None:
        """End all processes; the next episode starts others."""
        self._drop()

    def close(self) -> None:
        """End all processes."""
        self._drop()
        self._twin.close()

    def _running(self) -> "_Episode":
        if self._episode is None:
            raise ConfigError("expected a running episode, got none: call start() first")
        return self._episode

    def _start_cluster(self, site: int) -> None:
        if self._cluster is not None and self._site != site:
            self._drop()
        if self._cluster is None:
            self._cluster, self._site = Cluster.from_deployment(self._sites[site].deployment), site
        self._cluster.heal()

    def _end_episode(self) -> None:
        """End what is left of an episode; where that fails its processes go with it."""
        episode, self._episode = self._episode, None
        if episode is not None:
            try:
                episode.close()
            except (OffcutError, OSError) as error:
                logger.warning("an episode could not be ended in order, its processes are replaced: %s", error)
                self._drop()

    def _drop(self) -> None:
        episode, cluster = self._episode, self._cluster
        self._episode = self._cluster = None
        if episode is not None:
            with contextlib.suppress(OffcutError, OSError):
                episode.close()
        if cluster is not None:
            cluster.stop()


class _Episode:
    """One world on one cluster, from its first request to the end of its last."""

    def __init__(
        self,
        cluster: Cluster,
        site: LiveSite,
        book: Book,
        world: World,
        reference_s: FloatArray,
        log_folder: Path | None,
    ) -> None:
        self.book = book
        self.is_over = False
        self.paused_s = 0.0
        self._world = world
        self._reference_s = reference_s
        self._arrivals_s = world.arrivals_s[0]
        self._inputs = _Inputs(site, world)
        self._play = Play(cluster, site.site, world, float(self._arrivals_s[-1] + world.deadline_s.max()))
        self._play.prepare()
        self._number = 0
        self._sent: list[Sent] = []
        self._ended: queue.SimpleQueue[tuple[int, InferenceResult]] = queue.SimpleQueue()
        self._num_ended = 0
        self._session = Session(
            cluster.deployment,
            fixed_policy(site.site.candidates.plans[0]),  # asked for nothing: every request comes with its plan
            log_folder=log_folder,
            connect_timeout_s=CONNECT_S,
            local=site.local,
        )
        self.arrival: Arrival

    @property
    def time_s(self) -> float:
        """Instant at which the request at hand came."""
        return float(self._arrivals_s[self._number])

    def begin(self) -> None:
        """Let the world run, and wait for its first request."""
        self._wait_probed()
        self._play.start()
        self._arrive()

    def _wait_probed(self) -> None:
        """Wait until every link from and to a node that is there has a reading, as a twin's episode begins."""
        until_s = time.perf_counter() + PROBED_S
        while time.perf_counter() < until_s:
            state = self._session.state(self.book.site.problem.input_kind, 0, 1.0)
            up = {node.name for node in state.nodes if node.is_up} | {DEVICE_NODE}
            known = {(link.source, link.target) for link in state.links if link.samples}
            if all((DEVICE_NODE, name) in known and (name, DEVICE_NODE) in known for name in up - {DEVICE_NODE}):
                return
            time.sleep(0.05)

    def step(self, plan: Plan) -> list[Ended]:
        number = self._number
        following_s = float(self._arrivals_s[number + 1])
        sent = self.book.send(plan, encode_states(self.book.encoder.layout, (self.arrival.state,)))
        self.paused_s = max(self._play.now_s - following_s, 0.0)
        if self.paused_s > 0.0:
            self._play.postpone(self.paused_s)
        future = self._session.submit(self.arrival, plan)
        future.add_done_callback(lambda done: self._ended.put((number, done.result())))
        self._sent.append(sent)
        self._number += 1
        self._arrive()
        ended = self._take()
        if self._number + 1 == len(self._arrivals_s):
            ended += self._drain()
            self.close()
        return ended

    def _arrive(self) -> None:
        """Wait for the request that comes next, and note what is known then."""
        while (left_s := self.time_s - self._play.now_s) > 0:
            time.sleep(left_s)
        self._check()
        self.arrival = self._session.arrive(
            self._inputs.make(self._number), deadline_s=float(self._world.deadline_s[0, self._number])
        )

    def _take(self) -> list[Ended]:
        out = []
        while not self._ended.empty():
            out.append(self._end(*self._ended.get()))
        return out

    def _drain(self) -> list[Ended]:
        """Wait for all that is under way."""
        out = self._take()
        until_s = time.perf_counter() + float(self._world.deadline_s.max()) + GRACE_S
        while self._num_ended < len(self._sent):
            self._check()
            try:
                out.append(self._end(*self._ended.get(timeout=1.0)))
            except queue.Empty:
                if time.perf_counter() > until_s:
                    missing = len(self._sent) - self._num_ended
                    raise PeerTimeout(
                        f"{missing} requests have not ended {GRACE_S:.0f} s after their deadline"
                    ) from None
        return out

    def _end(self, number: int, result: InferenceResult) -> Ended:
        self._num_ended += 1
        latency_s = float("inf") if result.latency is None else result.latency.total_s
        deadline_s = float(self._world.deadline_s[0, number])
        reference_s = float(self._reference_s[number])
        return self.book.end(
            number, self._sent[number], latency_s, deadline_s, reference_s, result.outcome, result.latency
        )

    def _check(self) -> None:
        if (error := self._play.error) is not None:
            raise error

    def close(self) -> None:
        """End session and world; the cluster stays."""
        if self.is_over:
            return
        self.is_over = True
        try:
            self._session.close()
        finally:
            self._play.close()


class _Inputs:
    """Real inputs of the sizes that a world gives."""

    def __init__(self, site: LiveSite, world: World) -> None:
        self._kind = site.site.problem.input_kind
        self._bytes = world.input_bytes[0]
        self._random = np.random.default_rng(0)
        graph = site.local.graph.spec
        self._batch_size = graph.batch_size
        self._picture = sample_file(0, _LOW_QUALITY)
        value = next(value for value in graph.values if value.producer == graph.num_stage_layers - 1)
        self._shape, self._dtype = value.tensor.shape, value.tensor.dtype

    def make(self, number: int) -> bytes | list[bytes] | torch.Tensor | np.ndarray:
        """Make the input of one request."""
        if self._kind == "tensor":
            return torch.from_numpy(self._random.standard_normal(self._shape, dtype=np.float32)).to(
                getattr(torch, self._dtype)
            )
        if self._kind == "image":
            height, width = self._shape[-2:]
            return self._random.integers(0, 256, size=(self._batch_size, height, width, 3), dtype=np.uint8)
        more = max(round(float(self._bytes[number]) / self._batch_size) - len(self._picture), 0)
        files = [self._picture + self._random.bytes(more) for _ in range(self._batch_size)]
        return files[0] if self._batch_size == 1 else files
