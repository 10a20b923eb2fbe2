"""Policies that misbehave on a live session: watched ones change nothing, guarded ones are replaced."""

import dataclasses
import json
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import runtime
from agent import load_policy
from agent.cli import main
from runtime.deployment import ModelConfig
from runtime.device import shadow
from runtime.device.session import Session
from runtime.device.telemetry import EVENTS_FILE, read_status
from runtime.planning.policies.guard import GuardedPolicy
from runtime.planning.policies.registry import PolicySpec
from runtime.testbed.cluster import Cluster
from runtime.types import LinkSample, Plan, SystemState

pytestmark = pytest.mark.integration

MODEL = "tests.models:chain_image"
FAR_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ModelConfig(spec=MODEL), edges=()) as running:
        yield running


@pytest.fixture(scope="module")
def whole() -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and what the whole model makes of it."""
    model = runtime.load_model(MODEL)
    with torch.inference_mode():
        return model.example, model.module(model.example)


@dataclass
class Odd:
    """Answers what it is told to, or raises it, once it may."""

    answer: Plan | Exception
    may: threading.Event
    is_stateful: bool = False

    def plan(self, state: SystemState) -> Plan:
        del state
        assert self.may.wait(FAR_S)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def reset(self) -> None: ...


def odd(answer: Plan | Exception, may: threading.Event) -> PolicySpec:
    return PolicySpec("odd", lambda problem: Odd(answer, may))


def events_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]


# --- watched ----------------------------------------------------------------------------------------------------------


def test_a_shadow_is_noted_beside_every_decision_and_summed_up(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, photo = tmp_path / "deployment.toml", tmp_path / "frame.png"
    Image.effect_noise((48, 40), 60.0).convert("RGB").save(photo)
    node = '[[node]]\nname = "cloud"\ntier = "cloud"\n' + f'address = "{cluster.deployment.nodes[0].address}"\n'
    path.write_text(f'[model]\nspec = "{MODEL}"\n[constraints]\ndeadline_s = 60\n{node}')
    for name, agreed in (("device-only", 3), ("cloud-only", 0), ("checkpoints/default", None)):
        main(("infer", str(path), str(photo), "--repeat", "3", "--policy", "device-only", "--shadow", name))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"shadow {Path(name).name}: the same plan in ")
        events = events_of(tmp_path / "deployment.offcut")[-3:]
        for event in events:
            opinion = event["shadow"]
            assert event["policy"] == "device-only"
            assert opinion["policy"] == Path(name).name
            assert opinion["plan"]
            assert opinion["predicted_s"] > 0
            assert opinion["agrees"] == (opinion["plan"] == event["plan"])
            if opinion["agrees"]:
                assert opinion["predicted_s"] == event["predicted"]["total_s"]
        found = sum(event["shadow"]["agrees"] for event in events)
        assert agreed is None or found == agreed
        assert f" {found} of 3 decisions" in last
        assert "predicted mean" in last
    assert read_status(tmp_path / "deployment.offcut")["shadow"]["decisions"] == 3
    main(("status", str(path)))
    assert "shadow default: the same plan in" in capsys.readouterr().out


def test_a_shadow_that_fails_or_hangs_changes_nothing_and_is_counted(
    cluster: Cluster, whole: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "MOST_WAITING", 1)
    may = threading.Event()
    planner = runtime.load_policy("planner")
    answers = (ZeroDivisionError("boom"), Plan.split(1, 1, 1))
    for answer, reason in zip(answers, ("ZeroDivisionError", "PlanError"), strict=True):
        may.clear()
        folder = tmp_path / reason
        with Session(cluster.deployment, planner, shadow=odd(answer, may), log_folder=folder) as session:
            for _ in range(2):
                result = session.infer(whole[0], deadline_s=FAR_S)  # the shadow still hangs
                assert torch.equal(result.output, whole[1])
                assert result.outcome != "local"
            may.set()
        assert session.shadow is not None
        assert (session.shadow.decisions, session.shadow.agreed) == (2, 0)
        assert session.shadow.failures == {reason: 1, shadow.BEHIND: 1}
        assert math.isnan(session.shadow.difference_frac)
        told = [event["shadow"]["error"].partition(":")[0] for event in events_of(folder)]
        assert sorted(told) == sorted([reason, shadow.BEHIND])


def test_a_shadow_that_cannot_be_built_is_counted_and_a_plan_of_ones_own_is_no_decision(
    cluster: Cluster, whole: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with cluster.session(policy=runtime.load_policy("planner"), shadow=runtime.load_policy("edge-only")) as session:
        n = session.graph.num_layers
        session.infer(whole[0], deadline_s=FAR_S)
        session.infer(whole[0], deadline_s=FAR_S, plan=Plan.split(n, n, n))
    assert session.shadow is not None
    assert (session.shadow.decisions, dict(session.shadow.failures)) == (1, {"PlanError": 1})


# --- guarded ----------------------------------------------------------------------------------------------------------


def poison(state: SystemState, value: float, what: str) -> SystemState:
    """The same state with readings that are no numbers, or out of any range."""
    if what == "links":
        links = tuple(
            dataclasses.replace(link, samples=(LinkSample(value, value),), mean_bandwidth_bps=value, rtt_s=value)
            for link in state.links
        )
        return dataclasses.replace(state, links=links)
    if what == "nodes":
        nodes = tuple(
            dataclasses.replace(n, load_factor=value, queue_delay_s=value, utilisation_frac=value) for n in state.nodes
        )
        return dataclasses.replace(state, nodes=nodes)
    if what == "errors":
        return dataclasses.replace(state, recent_errors=(value,) * 8)
    return dataclasses.replace(state, request_rate_hz=value, device_backlog_s=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30, 1e30])
def test_with_readings_that_are_no_numbers_outputs_stay_right_and_reasons_are_counted(
    cluster: Cluster, whole: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    with cluster.session(policy=load_policy("checkpoints/default")) as session:
        clean = session.state
        for what in ("links", "nodes", "errors", "request"):
            monkeypatch.setattr(session, "state", lambda *given, what=what: poison(clean(*given), value, what))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # arithmetic on what is no number
                result = session.infer(whole[0], deadline_s=FAR_S)
            assert torch.equal(result.output, whole[1]), what
            monkeypatch.undo()
        guard = session._policies["tensor"][1]
        assert isinstance(guard, GuardedPolicy)
        assert guard.decisions == 4
        assert sum(guard.reasons.values()) >= 1
