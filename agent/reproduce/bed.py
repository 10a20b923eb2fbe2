"""One network on its nodes: settle after a change of conditions, then let the rules take turns."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.reproduce.grids import DEADLINE_S, LATE_FRAC, MAX_REPEATS
from agent.reproduce.papers import KIND, Paper
from agent.reproduce.results import Cell, CellResult, Run
from runtime.device.session import InferenceResult, Session
from runtime.model.inputs import admit, run_input_stage
from runtime.planning.cost import value_bytes
from runtime.planning.estimators import last_value, tuned
from runtime.planning.policies.registry import PolicySpec, load_policy
from runtime.planning.problem import PlanningProblem, Policy, find_route
from runtime.types import DEVICE_NODE, GraphSpec, NodeProfile, Plan, SystemState, Tier

SETTLE_S = 20.0
"""How long readings may take to follow a change; then measuring begins and the cell says so."""

SETTLED_FRAC = 0.25
"""How near a reading must come to what is emulated."""

PAUSE_S = 0.5
PAUSE_MAX_S = 8.0
"""After a late request others have this machine for a while; each further pause is twice as long, up to the maximum."""


@dataclass(slots=True)
class PlainCodec:
    """A rule whose plans send tensors as they are, as the papers do: no compression on either side of a comparison."""

    rule: Policy
    _plans: dict[Plan, Plan] = field(default_factory=dict)

    @property
    def is_stateful(self) -> bool:
        """As the rule."""
        return self.rule.is_stateful

    def plan(self, state: SystemState) -> Plan:
        """Pick a plan."""
        plan = self.rule.plan(state)
        if plan not in self._plans:
            self._plans[plan] = replace(plan, codec="raw")
        return self._plans[plan]

    def reset(self) -> None:
        """As the rule."""
        self.rule.reset()


class Shelf:
    """Rules that are built once for a network, though they take turns: building is no part of an answer."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, str], tuple[Mapping[str, NodeProfile], Policy]] = {}

    def spec(self, rule: str) -> PolicySpec:
        """The spec that takes a rule from here."""
        return PolicySpec(rule, partial(self._build, rule))

    def _build(self, rule: str, problem: PlanningProblem) -> Policy:
        key = (rule, problem.input_kind)
        known = self._built.get(key)
        if known is None or known[0] != problem.profile.nodes:
            plain = replace(problem, profile=replace(problem.profile, lossless_ratio={}))  # nothing is packed here
            known = (problem.profile.nodes, PlainCodec(load_policy(rule).build(plain)))
            self._built[key] = known
        return known[1]

    def reset(self) -> None:
        """Let rules forget the conditions of before: the papers start each with a plan of its own."""
        for _, policy in self._built.values():
            policy.reset()


class Bed:
    """Nodes, links and a session for one network. Use as a context manager.

    Args:
        paper: the experiment.
        model: the network.
        photo: what is sent: as it is, or as the tensor that the input stage makes of it.
        grid: fingerprint of the constants in force.

    Raises:
        ClusterError: a process did not start.
    """

    def __init__(self, paper: Paper, model: str, photo: Path, grid: str) -> None:
        self._paper, self._grid = paper, grid
        self._shelf = Shelf()
        self._warm: set[tuple[str, Plan]] = set()
        self._stack = ExitStack()
        try:
            self.cluster = self._stack.enter_context(paper.start(model))
            self.session: Session = self.cluster.session(policy=self._shelf.spec("device-only"))
        except BaseException:
            self._stack.close()
            raise
        graph = self.session.graph
        self._inputs: dict[str, Any] = {"encoded": photo, KIND: run_input_stage(graph, admit(graph, photo))}
        self._bytes = {kind: admit(graph, x).nbytes for kind, x in self._inputs.items()}

    def __enter__(self) -> "Bed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run_cell(self, cell: Cell) -> CellResult:
        """Measure one cell.

        Raises:
            OffcutError: when a request fails; the cell does not count then.
        """
        began_s = time.perf_counter()
        before = self._overruns()
        is_settled, readings = self._settle(cell)
        self._shelf.reset()
        runs: list[Run] = []
        num_warm_ups = num_late = 0
        for _ in range(self._paper.grid.repeat):
            for rule in self._paper.rules(cell.model):
                run, cold, late = self._ask(rule, cell.kind)
                runs.append(run)
                num_warm_ups += cold
                num_late += late
        overruns = {name: count - before.get(name, 0) for name, count in self._overruns().items()}
        return CellResult(
            grid=self._grid,
            model=cell.model,
            kind=cell.kind,
            condition=dict(cell.condition),
            readings=readings,
            is_settled=is_settled,
            overruns=overruns,
            num_warm_ups=num_warm_ups,
            num_late=num_late,
            seconds=time.perf_counter() - began_s,
            runs=runs,
        )

    def _settle(self, cell: Cell) -> tuple[bool, dict[str, float]]:
        """Change the conditions, and send until what is read of them is what they are."""
        self._paper.apply(self.cluster, self.session, cell)
        until_s = time.perf_counter() + SETTLE_S
        while True:
            self._sense()
            state = self._state()
            pairs = [self._paper.expected(read(state), cell) for read in (last_value, tuned)]
            errors = [abs(got / true - 1.0) for found in pairs for got, true in found.values()]
            is_settled = max(errors) <= SETTLED_FRAC
            if is_settled or time.perf_counter() >= until_s:
                return is_settled, {name: got for name, (got, _) in pairs[0].items()}

    def _sense(self) -> None:
        for plan in self._paper.sensors(self.session):
            self.session.infer(self._inputs[KIND], deadline_s=DEADLINE_S, plan=plan)

    def _ask(self, rule: str, kind: str) -> tuple[Run, int, int]:
        """One request that counts, and how many before it did not: with a new plan, which builds segments; late."""
        self.session.use(self._shelf.spec(rule))
        self.session.problem(kind)  # builds the rule for this kind of input now, not while a request waits for it
        num_cold = num_late = 0
        while True:
            result = self.session.infer(self._inputs[kind], deadline_s=DEADLINE_S)
            run = _make_run(
                rule, kind, result, (kind, result.plan) in self._warm, self.session.graph, self._bytes[kind]
            )
            self._warm.add((kind, result.plan))
            if (run.is_warm and not run.is_late) or num_cold + num_late == MAX_REPEATS:
                return run, num_cold, num_late
            num_cold += not run.is_warm
            num_late += run.is_warm
            if run.is_late:
                time.sleep(min(PAUSE_S * 2.0**num_late, PAUSE_MAX_S))
                self._sense()  # readings have aged meanwhile

    def _state(self) -> SystemState:
        return self.session.state(KIND, self._bytes[KIND], DEADLINE_S)

    def _overruns(self) -> dict[str, int]:
        return {node.name: node.overruns for node in self._state().nodes}


def _make_run(rule: str, kind: str, result: InferenceResult, is_warm: bool, graph: GraphSpec, input_bytes: int) -> Run:
    latency = result.latency
    assert latency is not None  # infer raises when there is no answer
    compute_s = latency.compute_s.get(DEVICE_NODE, 0.0)
    uplink, backbone = crossing_bytes(graph, result.plan, kind, input_bytes)
    return Run(
        rule=rule,
        latency_s=latency.total_s,
        predicted_s=result.predicted.total_s,
        outcome=result.outcome,
        plan=result.plan.describe(),
        is_warm=is_warm,
        is_late=compute_s > (1.0 + LATE_FRAC) * result.predicted.compute_s.get(DEVICE_NODE, 0.0),
        uplink_bytes=uplink,
        backbone_bytes=backbone,
        compute_s=dict(latency.compute_s),
        transfer_s=dict(latency.transfer_s),
        queueing_s=latency.queueing_s,
        codec_s=latency.codec_s,
        decision_s=latency.decision_s,
    )


def crossing_bytes(graph: GraphSpec, plan: Plan, kind: str, input_bytes: int) -> tuple[int, int]:
    """Payload bytes that leave the device, and that enter or leave the cloud, under a plan that codes nothing.

    Worked out from the plan: message headers are not among them.
    """
    route = find_route(graph, plan, kind)
    uplink = value_bytes(graph, route.up[0], input_bytes) if route.up else 0
    if Tier.CLOUD not in route.tiers:
        return uplink, 0
    results = tuple(name for name in dict.fromkeys(graph.outputs) if name in route.cloud.makes)
    return uplink, value_bytes(graph, route.up[-1], input_bytes) + value_bytes(graph, results, 0)
