"""`offcut infer`: pictures in, answers and their story out."""

import dataclasses
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import torch
from rich.console import Console

from agent.config import InferConfig
from agent.preflight import Files, Prepared
from agent.tables import LATENCY_COLUMNS, latency_cells, latency_line, loading
from runtime.deployment import Deployment
from runtime.device.session import InferenceResult, Session
from runtime.device.shadow import ShadowCounts
from runtime.device.telemetry import default_log_folder
from runtime.errors import InputError, NodeError, OffcutError, TransportError
from runtime.model.graph import trace
from runtime.model.segment import run_local
from runtime.model.zoo import load_model
from runtime.planning.policies.registry import PolicySpec
from runtime.types import Plan

OWN_FAULT = (InputError, NodeError, TransportError)
"""What fails one request and may spare the next; anything else would fail them all."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One request that has ended; `result` is None when it failed."""

    files: Files
    result: InferenceResult | None
    error: OffcutError | None
    answers: tuple[str, ...]  # one per file
    verdict: tuple[bool, float] | None  # bit-equal to the whole model, largest difference

    def without_output(self) -> "Row":
        """The same, without the tensors: thousands of rows must fit into memory."""
        result = None if self.result is None else dataclasses.replace(self.result, _output=None)
        return dataclasses.replace(self, result=result)


def run_infer(config: InferConfig, prepared: Prepared) -> None:
    """Run the inputs, and print a row or a JSON object as each answer comes.

    Args:
        config: the options.
        prepared: what `preflight.prepare` made of them, before this module and torch were loaded.

    Raises:
        OffcutError: what makes all requests impossible; or, at the end, that some have failed.
    """
    deployment, policy, requests = prepared.deployment, prepared.policy, prepared.requests
    logs = default_log_folder(config.deployment)
    printer: _Printer = _JsonLines(config.top) if config.json else _Table(deployment, policy, requests)
    names = ", ".join(node.name for node in deployment.nodes)
    with loading(f"loading {deployment.model.spec}, connecting to {names}"):
        session = Session(deployment, policy, shadow=prepared.shadow, log_folder=logs)
    rows: list[Row] = []
    with session:
        for why in session.unusable.values():
            sys.stderr.write(f"offcut: {why}; see `offcut check {config.deployment}`\n")
        whole = _load_whole(deployment) if config.verify else None
        try:
            for turn in range(config.repeat):
                is_last = turn == config.repeat - 1
                for files in requests:
                    row = _run(session, files, config, whole if is_last else None)
                    printer.show(row)
                    rows.append(row.without_output())
        finally:  # also after Ctrl-C: what has run stands
            printer.finish(rows, rows[-len(requests) :])
    if session.shadow is not None:
        printer.watched(describe_shadow(session.shadow))
    failed = [(row.files, row.error) for row in rows if row.error is not None]
    if failed:
        files, error = failed[0]
        raise type(error)(f"{len(failed)} of {len(rows)} request(s) failed; the first one, {_name(files)}: {error}")


# --- one request ------------------------------------------------------------------------------------------------------


def _run(session: Session, files: Files, config: InferConfig, whole: Callable[[Any], Any] | None) -> Row:
    given: Any = files[0] if len(files) == 1 else list(files)
    try:
        result = session.infer(given, deadline_s=config.deadline_s)
    except OWN_FAULT as error:
        return Row(files, None, error, (), None)
    answers = tuple(describe_output(result.output, config.top, item) for item in range(len(files)))
    verdict = None
    if whole is not None:
        difference, is_equal = output_error(result.output, whole(given))
        verdict = (is_equal, difference)
    return Row(files, result, None, answers, verdict)


def _load_whole(deployment: Deployment) -> Callable[[Any], Any]:
    """The whole model in this process; loaded after the session, which sets torch's threads."""
    model = deployment.model
    with loading(f"loading {model.spec} once more, to compare"):
        graph = trace(load_model(model.spec, weights=model.weights, seed=model.seed, batch_size=model.batch_size))
    plan = Plan.split(graph.num_layers, graph.num_layers, graph.num_layers)
    return lambda given: run_local(graph, plan, given)


def describe_output(output: Any, top: int, item: int = 0) -> str:
    """The largest outputs of a classifier for one item of the batch, or the shapes of anything else."""
    if isinstance(output, torch.Tensor) and output.ndim == 2:
        return ", ".join(f"class {index} {share:.1%}" for index, share in largest_outputs(output, top, item))
    leaves = torch.utils._pytree.tree_leaves(output)
    return ", ".join(f"{tuple(leaf.shape)}" for leaf in leaves if isinstance(leaf, torch.Tensor))


def largest_outputs(output: torch.Tensor, top: int, item: int) -> list[tuple[int, float]]:
    """Index and softmax share of the largest outputs of one item, shape (N, classes)."""
    shares, indices = output.float().softmax(dim=1)[item].topk(min(top, output.shape[1]))
    return list(zip(indices.tolist(), shares.tolist(), strict=True))


def output_error(output: Any, whole: Any) -> tuple[float, bool]:
    """Largest absolute difference between two outputs, and whether they are equal to the bit."""
    pairs = list(zip(torch.utils._pytree.tree_leaves(output), torch.utils._pytree.tree_leaves(whole), strict=True))
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor)]
    error = max(((a.double() - b.double()).abs().max().item() for a, b in tensors if a.numel()), default=0.0)
    return error, all(torch.equal(a, b) for a, b in tensors)


# --- telling ----------------------------------------------------------------------------------------------------------


class _Printer(Protocol):
    """Tells of requests: each as it ends, and all of them in the end."""

    def show(self, row: Row) -> None: ...

    def finish(self, rows: Sequence[Row], last_turn: Sequence[Row]) -> None: ...

    def watched(self, text: str) -> None: ...


class _Table:
    """Rows for people."""

    OUTCOME_CHARACTERS = 9
    MIN_NAME_CHARACTERS = 12

    def __init__(self, deployment: Deployment, policy: PolicySpec, requests: Sequence[Files]) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._title = f"{deployment.model.spec}, policy {policy.name}; milliseconds"
        self._cloud = deployment.cloud.name if deployment.cloud is not None else ""
        numbers = len(latency_line("", LATENCY_COLUMNS)) + 1 + self.OUTCOME_CHARACTERS
        widest = max(len("input"), *(len(_name(files)) for files in requests))
        self._name_characters = min(widest, max(self._console.width - numbers, self.MIN_NAME_CHARACTERS))
        self._reasons: dict[str, int] = {}

    def show(self, row: Row) -> None:
        """Print a row; the first one brings the header."""
        if self._title:
            self._print(self._title)
            self._print(latency_line(self._left("input", "outcome"), LATENCY_COLUMNS))
            self._title = ""
        name = _name(row.files)
        if row.result is None or row.result.latency is None:
            self._print(self._left(name, "failed" + self._note(str(row.error))))
            return
        result, latency = row.result, row.result.latency
        left = self._left(name, result.outcome + self._note(result.reason))
        self._print(latency_line(left, latency_cells(latency, self._cloud), " " if result.deadline_met else "!"))

    def finish(self, rows: Sequence[Row], last_turn: Sequence[Row]) -> None:
        """Print reasons, answers and the summary."""
        for reason, number in self._reasons.items():
            self._print(f"[{number}] {reason}")
        for row in last_turn:
            for path, answer in zip(row.files, row.answers, strict=False):
                self._print(f"{path.name}: {answer}")
            if row.verdict is not None:
                is_equal, difference = row.verdict
                difference_text = f"largest difference from the whole model {difference:.3g}"
                self._print(f"{_name(row.files)}: {'bit-equal to the whole model' if is_equal else difference_text}")
        if rows:
            self._print(summarise(rows))

    def watched(self, text: str) -> None:
        """Print what the shadow would have done."""
        self._print(text)

    def _left(self, name: str, outcome: str) -> str:
        if len(name) > self._name_characters:
            name = "…" + name[1 - self._name_characters :]  # frames differ at the end of their names
        return f"{name:<{self._name_characters}} {outcome:<{self.OUTCOME_CHARACTERS}}"

    def _note(self, reason: str) -> str:
        return f"[{self._reasons.setdefault(reason, len(self._reasons) + 1)}]" if reason else ""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)


def _name(files: Files) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} +{len(files) - 1}"


def summarise(rows: Sequence[Row]) -> str:
    """What became of all requests, and the plans they ran under."""
    results = [row.result for row in rows if row.result is not None]
    counts = Counter("failed" if row.result is None else row.result.outcome for row in rows)
    parts = [", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())]
    totals_s = [result.latency.total_s for result in results if result.latency is not None]
    if totals_s:
        parts.append(f"total: median {statistics.median(totals_s) * 1e3:.1f} ms, longest {max(totals_s) * 1e3:.1f} ms")
    num_late = sum(not result.deadline_met for result in results)
    parts.append(f"{num_late} past the deadline (!)" if num_late else "none past the deadline")
    plans = Counter(result.plan.describe() for result in results)
    lines = [f"{len(rows)} request(s): {'; '.join(parts)}"]
    lines += [f"plan{f', {count}x' if len(plans) > 1 else ''}: {plan}" for plan, count in plans.most_common()]
    return "\n".join(lines)


def describe_shadow(counts: ShadowCounts) -> str:
    """Sum up what a shadow would have done."""
    parts = []
    if counts.decisions > counts.failures.total():
        parts.append(f"the same plan in {counts.agreed} of {counts.decisions} decisions ({counts.agreed_frac:.0%})")
    if counts.compared:
        both = (1e3 * seconds / counts.compared for seconds in (counts.shadow_s, counts.taken_s))
        parts.append("predicted mean {:.1f} ms, taken {:.1f} ms ({:+.1%})".format(*both, counts.difference_frac))
    for what, found in (("its guard decided", counts.guarded), ("no plan", counts.failures)):
        parts += [f"{what} {count}x: {reason}" for reason, count in found.items()]
    return f"shadow {counts.policy}: {'; '.join(parts) or 'not asked'}"


class _JsonLines:
    """One JSON object per request for programs."""

    def __init__(self, top: int) -> None:
        self._top = top

    def show(self, row: Row) -> None:
        """Print one request."""
        sys.stdout.write(json.dumps(to_record(row, self._top)) + "\n")
        sys.stdout.flush()  # a program may be reading

    def finish(self, rows: Sequence[Row], last_turn: Sequence[Row]) -> None:
        """Print nothing more."""

    def watched(self, text: str) -> None:
        """Tell people; programs find it in the events."""
        sys.stderr.write(text + "\n")


def to_record(row: Row, top: int) -> dict[str, Any]:
    """One request as plain values; what is not known is null."""
    record: dict[str, Any] = {"inputs": [str(path) for path in row.files]}
    if row.result is None:
        return {**record, "outcome": "failed", "reason": f"{type(row.error).__name__}: {row.error}"}
    result, output = row.result, row.result.output
    is_classifier = isinstance(output, torch.Tensor) and output.ndim == 2
    record |= {name: getattr(result, name) for name in ("outcome", "reason", "deadline_met", "protected")}
    record |= {"plan": result.plan.describe(), "codec": result.plan.codec}
    record |= {"latency": msgspec.to_builtins(result.latency), "predicted": msgspec.to_builtins(result.predicted)}
    if is_classifier:
        record["top"] = [largest_outputs(output, top, item) for item in range(len(row.files))]
    if row.verdict is not None:
        record["bit_equal"], record["largest_difference"] = row.verdict
    return msgspec.json.decode(msgspec.json.encode(record))  # type: ignore[no-any-return]  # NaN and inf become null
