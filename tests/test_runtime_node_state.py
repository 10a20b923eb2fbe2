import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.node.load import LOAD_FACTOR_MAX, WINDOW_S, NodeLoad
from runtime.node.state import Forget, Forward, Instruction, Key, NodeMachine, Refuse, Reply, Resume, Run

A: Key = ("a", 1)
B: Key = ("a", 2)
X: Key = ("b", 1)


def arrive(
    machine: NodeMachine,
    key: Key,
    *,
    now_s: float = 0.0,
    remaining_s: float = math.inf,
    has_compute: bool = True,
    has_next: bool = False,
) -> list[Instruction]:
    return machine.arrive(key, remaining_s=remaining_s, has_compute=has_compute, has_next=has_next, now_s=now_s)


def kinds(instructions: list[Instruction]) -> list[str]:
    return [type(i).__name__ for i in instructions]


def test_the_first_request_runs_at_once_and_the_next_when_it_is_done() -> None:
    machine = NodeMachine(capacity=4)
    assert arrive(machine, A) == [Run(A, 0.0)]
    assert arrive(machine, B, now_s=1.0) == []
    assert machine.queue_length == 2
    assert machine.computed(A, measured_s=0.1, predicted_s=0.1, now_s=3.0) == [Reply(A), Run(B, 2.0)]
    assert machine.computed(B, measured_s=0.1, predicted_s=0.1, now_s=4.0) == [Reply(B)]
    assert machine.is_idle


def test_a_request_without_layers_here_skips_the_queue() -> None:
    machine = NodeMachine(capacity=1)
    arrive(machine, A)
    assert arrive(machine, B, has_compute=False, has_next=True, remaining_s=2.0) == [Forward(B, 2.0)]
    assert machine.answered(B, now_s=1.0) == [Reply(B)]


def test_what_goes_on_carries_the_time_that_is_left() -> None:
    machine = NodeMachine(capacity=1)
    arrive(machine, A, remaining_s=5.0, has_next=True)
    assert machine.computed(A, measured_s=1.0, predicted_s=0.1, now_s=2.0) == [Forward(A, 3.0)]


def test_a_request_that_gathers_tiles_leaves_the_processor_and_goes_on_ahead_of_the_queue() -> None:
    machine = NodeMachine(capacity=4)
    for key in (A, B, X):
        arrive(machine, key)
    assert machine.scattered(A, is_gathered=False, now_s=1.0) == [Run(B, 1.0)]
    assert machine.gathered(A, now_s=1.5) == []
    assert machine.gathered(A, now_s=1.6) == []  # told twice
    assert machine.queue_length == 3
    assert machine.computed(B, measured_s=0.1, predicted_s=0.1, now_s=2.0) == [Reply(B), Resume(A)]
    assert machine.scattered(A, is_gathered=True, now_s=3.0) == [Resume(A)]
    assert machine.computed(A, measured_s=0.1, predicted_s=0.1, now_s=4.0) == [Reply(A), Run(X, 4.0)]


def test_tiles_that_are_back_before_the_own_one_are_no_event() -> None:
    machine = NodeMachine(capacity=4)
    arrive(machine, A)
    assert machine.gathered(A, now_s=0.5) == []
    assert machine.scattered(A, is_gathered=True, now_s=1.0) == [Resume(A)]


def test_a_request_that_gathers_can_be_late_and_cancelled_and_counts_against_the_capacity() -> None:
    machine = NodeMachine(capacity=1)
    arrive(machine, A, remaining_s=2.0)
    machine.scattered(A, is_gathered=False, now_s=1.0)
    [busy] = arrive(machine, B, now_s=1.0)
    assert isinstance(busy, Refuse)
    assert busy.kind == "busy"
    [late] = machine.tick(3.0)
    assert isinstance(late, Refuse)
    assert (late.key, late.kind, late.was_forwarded) == (A, "late", False)
    arrive(machine, B, now_s=3.0)
    machine.scattered(B, is_gathered=False, now_s=4.0)
    assert machine.cancel(B) == [Forget(B, was_forwarded=False)]
    arrive(machine, X, now_s=4.0)
    assert machine.cancel(X) == []
    assert machine.scattered(X, is_gathered=False, now_s=5.0) == [Forget(X, was_forwarded=False)]
    assert machine.is_idle


def test_one_request_more_than_the_queue_holds_is_told_busy_at_once() -> None:
    machine = NodeMachine(capacity=1)
    arrive(machine, A)
    arrive(machine, B)
    [refused] = arrive(machine, X)
    assert isinstance(refused, Refuse)
    assert (refused.key, refused.kind) == (X, "busy")
    assert machine.counts["busy"] == 1


def test_late_work_is_dropped_and_counted_wherever_it_is() -> None:
    machine = NodeMachine(capacity=4)
    assert kinds(arrive(machine, A, remaining_s=0.0)) == ["Refuse"]
    arrive(machine, A)
    arrive(machine, B, remaining_s=1.0)
    arrive(machine, X, remaining_s=1.0)
    assert kinds(machine.tick(0.5)) == []
    assert [i.key for i in machine.tick(1.5)] == [B, X]
    assert kinds(machine.computed(A, measured_s=1.0, predicted_s=0.1, now_s=2.0)) == ["Reply"]
    arrive(machine, A, now_s=2.0, remaining_s=1.0, has_next=True)
    [late] = machine.computed(A, measured_s=2.0, predicted_s=0.1, now_s=4.0)
    assert isinstance(late, Refuse)
    assert not late.was_forwarded
    assert machine.counts["late"] == 4


def test_a_request_that_waits_for_the_next_node_too_long_is_given_up_there_too() -> None:
    machine = NodeMachine(capacity=4)
    arrive(machine, A, remaining_s=1.0, has_compute=False, has_next=True)
    [late] = machine.tick(1.1)
    assert isinstance(late, Refuse)
    assert late.was_forwarded
    assert machine.answered(A, now_s=1.2) == []


def test_a_cancelled_request_leaves_no_trace() -> None:
    machine = NodeMachine(capacity=4)
    arrive(machine, A)
    arrive(machine, B)
    arrive(machine, X, has_compute=False, has_next=True)
    assert machine.cancel(B) == [Forget(B, was_forwarded=False)]
    assert machine.cancel(X) == [Forget(X, was_forwarded=True)]
    assert machine.cancel(A) == []  # it runs: its end forgets it
    assert machine.is_cancelled(A)
    assert machine.computed(A, measured_s=1.0, predicted_s=0.1, now_s=1.0) == [Forget(A, was_forwarded=False)]
    assert machine.is_idle
    assert machine.cancel(A) == []


def test_all_requests_of_a_client_that_left_are_forgotten_and_others_go_on() -> None:
    machine = NodeMachine(capacity=4)
    arrive(machine, A)
    arrive(machine, B)
    arrive(machine, X)
    assert machine.client_left("a") == [Forget(B, was_forwarded=False)]
    assert machine.crashed(A, text="stopped", is_plan_fault=False, now_s=1.0) == [
        Forget(A, was_forwarded=False),
        Run(X, 1.0),
    ]


def test_a_crash_is_told_to_the_client_and_the_next_request_runs() -> None:
    machine = NodeMachine(capacity=4)
    arrive(machine, A)
    arrive(machine, B)
    assert machine.crashed(A, text="no memory", is_plan_fault=True, now_s=1.0) == [
        Refuse(A, "error", "no memory", is_plan_fault=True),
        Run(B, 1.0),
    ]


def test_a_draining_node_finishes_what_it_has_and_takes_nothing_new() -> None:
    machine = NodeMachine(capacity=4)
    arrive(machine, A)
    machine.drain()
    [refused] = arrive(machine, B)
    assert isinstance(refused, Refuse)
    assert refused.kind == "busy"
    assert machine.computed(A, measured_s=0.1, predicted_s=0.1, now_s=1.0) == [Reply(A)]


def test_the_end_of_work_that_does_not_run_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="ended but"):
        NodeMachine(capacity=1).computed(A, measured_s=0.0, predicted_s=0.1, now_s=0.0)


class NodeRules(RuleBasedStateMachine):
    """Random lives of a node: whatever happens, every request ends exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = NodeMachine(capacity=3)
        self.now_s = 0.0
        self.number = 0
        self.open: set[Key] = set()
        self.queued: list[Key] = []
        self.running: Key | None = None
        self.waiting: set[Key] = set()
        self.gathering: set[Key] = set()
        self.ready: list[Key] = []

    def carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            key = instruction.key
            if isinstance(instruction, Run):
                assert self.running is None
                self.running = key
                assert not self.ready  # what has begun goes on before anything new
                assert self.queued[0] == key  # first in, first out
                self.queued.remove(key)
            elif isinstance(instruction, Resume):
                assert self.running is None
                self.running = key
                assert self.ready[0] == key
                self.ready.remove(key)
            elif isinstance(instruction, Forward):
                self.queued = [k for k in self.queued if k != key]
                self.waiting.add(key)
            else:
                assert key in self.open
                self.open.remove(key)
                self.waiting.discard(key)
                self.gathering.discard(key)
                self.ready = [k for k in self.ready if k != key]
                self.queued = [k for k in self.queued if k != key]

    @rule(
        client=st.sampled_from("ab"),
        remaining_s=st.sampled_from([-1.0, 0.5, 3.0, math.inf]),
        has_compute=st.booleans(),
        has_next=st.booleans(),
    )
    def new_request(self, client: str, remaining_s: float, has_compute: bool, has_next: bool) -> None:
        self.number += 1
        key: Key = (client, self.number)
        self.open.add(key)
        if has_compute:
            self.queued.append(key)
        self.carry_out(
            arrive(
                self.machine,
                key,
                now_s=self.now_s,
                remaining_s=remaining_s,
                has_compute=has_compute,
                has_next=has_next,
            )
        )

    @precondition(lambda self: self.running is not None)
    @rule(crashes=st.booleans())
    def running_ends(self, crashes: bool) -> None:
        key, self.running = self.running, None
        assert key is not None
        if crashes:
            self.carry_out(self.machine.crashed(key, text="x", is_plan_fault=False, now_s=self.now_s))
        else:
            self.carry_out(self.machine.computed(key, measured_s=0.1, predicted_s=0.1, now_s=self.now_s))

    @precondition(lambda self: self.running is not None)
    @rule(is_gathered=st.booleans())
    def running_scatters(self, is_gathered: bool) -> None:
        key, self.running = self.running, None
        assert key is not None
        (self.ready.append if is_gathered else self.gathering.add)(key)
        self.carry_out(self.machine.scattered(key, is_gathered=is_gathered, now_s=self.now_s))

    @precondition(lambda self: self.gathering)
    @rule(data=st.data())
    def tiles_are_back(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.gathering)))
        self.gathering.remove(key)
        self.ready.append(key)
        self.carry_out(self.machine.gathered(key, now_s=self.now_s))

    @precondition(lambda self: self.waiting)
    @rule(fails=st.booleans(), data=st.data())
    def next_node_speaks(self, fails: bool, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.waiting)))
        if fails:
            self.carry_out(self.machine.next_failed(key, kind="lost", text="x"))
        else:
            self.carry_out(self.machine.answered(key, now_s=self.now_s))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def client_cancels(self, data: st.DataObject) -> None:
        self.carry_out(self.machine.cancel(data.draw(st.sampled_from(sorted(self.open)))))

    @rule(client=st.sampled_from("ab"))
    def client_leaves(self, client: str) -> None:
        self.carry_out(self.machine.client_left(client))

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.carry_out(self.machine.tick(self.now_s))

    @invariant()
    def queue_is_bounded(self) -> None:
        assert self.machine.queue_length <= 4
        assert self.machine.is_idle == (not self.open)


TestNodeRules = NodeRules.TestCase
TestNodeRules.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_k_is_measured_over_predicted_within_its_bounds() -> None:
    load = NodeLoad()
    assert load.load_factor(0.0) == 1.0
    load.add_segment(0.3, 0.1, 1.0)
    load.add_segment(0.1, 0.1, 1.0)
    assert load.load_factor(1.0) == pytest.approx(2.0)
    load.add_segment(1e9, 0.1, 1.0)
    assert load.load_factor(1.0) == LOAD_FACTOR_MAX
    assert load.load_factor(1.0 + 2 * WINDOW_S) == 1.0


def test_the_watcher_forgets_the_load_of_a_node_that_has_become_idle() -> None:
    load = NodeLoad()
    load.start(queue_s=0.2, now_s=0.0)
    load.stop(1.0)
    load.add_segment(0.9, 0.1, 1.0)
    load.watch(2.0, is_idle=True)
    assert load.load_factor(2.0) == pytest.approx(9.0)
    assert load.queue_delay_s(2.0) == pytest.approx(0.2)
    load.watch(1.0 + WINDOW_S, is_idle=True)
    assert load.load_factor(2.0) == 1.0
    assert load.queue_delay_s(2.0) == 0.0


def test_utilisation_is_the_busy_share_of_the_window_running_work_included() -> None:
    load = NodeLoad()
    load.start(0.0, 0.0)
    load.stop(1.0)
    assert load.utilisation_frac(WINDOW_S) == pytest.approx(1.0 / WINDOW_S)
    load.start(0.0, WINDOW_S)
    assert load.utilisation_frac(WINDOW_S + 1.0) == pytest.approx(1.0 / WINDOW_S)
    assert load.utilisation_frac(10 * WINDOW_S) == 1.0
