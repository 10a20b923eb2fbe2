"""`offcut infer`: pictures in, answers and their story out."""

import dataclasses
from typing import Any

import torch
from rich.console import Console

from agent import load_policy
from agent.config import InferConfig
from agent.tables import latency_cells, make_latency_table
from runtime.deployment import Deployment, load_deployment
from runtime.device.session import InferenceResult, Session, default_log_folder
from runtime.model.graph import trace
from runtime.model.segment import run_local
from runtime.model.zoo import load_model
from runtime.planning.policies.registry import PolicySpec
from runtime.planning.problem import PlanningProblem, Policy
from runtime.types import Plan, SystemState


def run_infer(config: InferConfig) -> None:
    """Run the inputs and print a row for each request.

    Raises:
        OffcutError: the first thing that goes wrong.
    """
    console = Console()
    deployment = load_deployment(config.deployment)
    policy = load_policy(config.policy)
    if config.codec is not None:
        policy = _with_codec(policy, config.codec)
    table = make_latency_table(f"{deployment.model.spec}, policy {policy.name}", "input", "outcome")
    answers: list[tuple[str, InferenceResult]] = []
    with Session(deployment, policy, log_folder=default_log_folder(config.deployment)) as session:
        for _ in range(config.repeat):
            for path in config.inputs:
                result = session.infer(path, deadline_s=config.deadline_s)
                answers.append((path.name, result))
                assert result.latency is not None  # infer raises when there is no answer
                outcome = f"{result.outcome}: {result.reason}" if result.reason else result.outcome
                table.add_row(path.name, outcome, *latency_cells(result.latency))
        console.print(table)
        console.print(f"plan: {answers[-1][1].plan.describe()}", markup=False)
    for name, result in answers[-len(config.inputs) :]:
        console.print(f"{name}: {describe_output(result.output, config.top)}", markup=False)
    if config.verify:
        _verify(console, deployment, config, answers[-len(config.inputs) :])


def _with_codec(spec: PolicySpec, codec: str) -> PolicySpec:
    """The same rule, with every plan's codec replaced."""

    def build(problem: PlanningProblem) -> Policy:
        return _CodecPolicy(spec.build(problem), codec)

    return PolicySpec(f"{spec.name} ({codec})", build)


@dataclasses.dataclass(frozen=True)
class _CodecPolicy:
    inner: Policy
    codec: str

    @property
    def is_stateful(self) -> bool:
        return self.inner.is_stateful

    def plan(self, state: SystemState) -> Plan:
        return dataclasses.replace(self.inner.plan(state), codec=self.codec)

    def reset(self) -> None:
        self.inner.reset()


def describe_output(output: Any, top: int) -> str:
    """The largest outputs of a classifier, or the shapes of anything else."""
    if isinstance(output, torch.Tensor) and output.ndim == 2:
        values, indices = output.float().softmax(dim=1)[0].topk(min(top, output.shape[1]))
        return ", ".join(f"class {i} {v:.1%}" for v, i in zip(values.tolist(), indices.tolist(), strict=True))
    leaves = torch.utils._pytree.tree_leaves(output)
    return ", ".join(f"{tuple(leaf.shape)}" for leaf in leaves if isinstance(leaf, torch.Tensor))


def _verify(
    console: Console, deployment: Deployment, config: InferConfig, answers: list[tuple[str, InferenceResult]]
) -> None:
    """Compare with the whole model in this process."""
    model = deployment.model
    graph = trace(load_model(model.spec, weights=model.weights, seed=model.seed, batch_size=model.batch_size))
    for path, (name, result) in zip(config.inputs, answers, strict=True):
        whole = run_local(graph, Plan.split(graph.num_layers, graph.num_layers, graph.num_layers), path)
        error, is_equal = output_error(result.output, whole)
        verdict = "bit-equal to the whole model" if is_equal else f"largest difference from the whole model {error:.3g}"
        console.print(f"{name}: {verdict}", markup=False)


def output_error(output: Any, whole: Any) -> tuple[float, bool]:
    """Largest absolute difference between two outputs, and whether they are equal to the bit."""
    pairs = list(zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(whole), strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    error = max(((a.double() - b.double()).abs().max().item() for a, b in tensors if a.numel()), default=0.0)
    return error, all(torch.equal(a, b) for a, b in tensors)
