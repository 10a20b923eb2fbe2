"""`offcut check`: everything about a deployment that can be found wrong before the first request."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agent.config import CheckConfig
from agent.tables import loading
from runtime.deployment import PRETRAINED, SEEDED, Deployment, NodeConfig, load_deployment
from runtime.device.ask import NodeAnswer, ask_nodes
from runtime.errors import ConfigError, OffcutError
from runtime.types import Tier
from runtime.wire.keys import load_keys


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    verdict: str  # ok, WRONG, note, try
    subject: str
    text: str


def run_check(config: CheckConfig) -> None:
    """Check a deployment and print a line per finding.

    Raises:
        ConfigError: when the file is not valid, or something was found wrong.
    """
    console = Console(highlight=False, soft_wrap=True)
    deployment = load_deployment(config.deployment)
    console.print(f"{config.deployment}: {deployment.model.spec}, {len(deployment.nodes)} node(s)", markup=False)
    num_wrong = 0
    for finding in _find(deployment, config):
        num_wrong += finding.verdict == "WRONG"
        console.print(f"  {finding.verdict:<6} {finding.subject}: {finding.text}", markup=False)
    if num_wrong:
        raise ConfigError(f"{num_wrong} thing(s) wrong with {config.deployment}; see the lines marked WRONG")


def _find(deployment: Deployment, config: CheckConfig) -> Iterator[Finding]:
    device = [*_check_key(deployment), *_check_weights(deployment)]
    yield from device
    if any(finding.verdict == "WRONG" for finding in device):
        return  # without its key the device can ask nobody, without its weights there is nothing to compare
    answers = ask_nodes(deployment, config.timeout_s)
    for node in deployment.nodes:
        yield from check_node(deployment, node, answers[node.name])
    if config.quick or not any(answer.welcome for answer in answers.values()):
        return
    if not deployment.constraints.device_has_model:
        yield from compare_fingerprints(answers, deployment, None)
        return
    with loading(f"loading {deployment.model.spec} to compare weights"):
        model_id, problem = _own_model_id(deployment)
    if problem:
        yield Finding("WRONG", "device", problem)
    else:
        yield from compare_fingerprints(answers, deployment, model_id)


def _check_key(deployment: Deployment) -> Iterator[Finding]:
    path = deployment.security.secret_key
    if path is None:
        return
    try:
        load_keys(Path(path))
    except ConfigError as error:
        yield Finding("WRONG", "device", str(error))
    else:
        yield Finding("ok", "device", f"has its key, {path}")


def _check_weights(deployment: Deployment) -> Iterator[Finding]:
    weights = deployment.model.weights
    if weights in (None, SEEDED, PRETRAINED) or not deployment.constraints.device_has_model:
        return
    assert weights is not None
    if Path(weights).is_file():
        yield Finding("ok", "device", f"has the weights, {weights}")
    else:
        yield Finding("WRONG", "device", f"there is no file {weights}; correct weights under [model]")


def check_node(deployment: Deployment, node: NodeConfig, answer: NodeAnswer) -> Iterator[Finding]:
    """Judge what one node answered, but for its weights."""
    if answer.welcome is None:
        yield Finding("WRONG", node.name, answer.problem)
        if answer.state == "down":
            yield Finding("try", node.name, f"on its machine: {worker_command(deployment, node)}")
        return
    welcome = answer.welcome
    if welcome.tier is not node.tier:
        text = f"it is of tier {welcome.tier.label}, the file says {node.tier.label}; correct one of them"
        yield Finding("WRONG", node.name, text)
    specs = [offer.spec for offer in welcome.offers]
    if deployment.model.spec not in specs:
        text = f"it runs {', '.join(specs)}, the file says {deployment.model.spec}; start it with that --model"
        yield Finding("WRONG", node.name, text)
    else:
        yield Finding("ok", node.name, f"{answer.state}, runs {deployment.model.spec}, rtt {answer.rtt_s * 1e3:.1f} ms")
    if welcome.threads != 1:
        text = f"it runs {welcome.threads} torch threads, a session 1: outputs agree within rounding, not bit for bit"
        yield Finding("note", node.name, text)
    if welcome.node != node.name:
        yield Finding("note", node.name, f"it calls itself {welcome.node}; --name {node.name} makes its tables agree")
    is_alone = answer.status is not None and not answer.status.peers
    if node.tier is Tier.EDGE and deployment.cloud is not None and is_alone:
        text = (
            "it hears nothing of a cloud, so no plan can go through it to there; start the cloud first, then: "
            f"{worker_command(deployment, node)}"
        )
        yield Finding("note", node.name, text)


def worker_command(deployment: Deployment, node: NodeConfig) -> str:
    """The command line that starts a node of this deployment, quoted for a shell; folders are the user's to name."""
    model, endpoint, cloud = deployment.model, node.endpoint, deployment.cloud
    host = endpoint.host if endpoint.is_loopback else "0.0.0.0"
    words = ["offcut", "worker", "--tier", node.tier.label, "--name", node.name, "--model", model.spec]
    words += ["--bind", f"tcp://{host}:{endpoint.port}"]
    if model.weights is not None:
        words += ["--weights", model.weights]
    if model.seed:
        words += ["--seed", str(model.seed)]
    if model.batch_size != 1:
        words += ["--batch-size", str(model.batch_size)]
    if node.public_key is not None:
        words += ["--keys", "keys/"]
    elif not endpoint.is_loopback:
        words += ["--insecure"]
    if node.tier is Tier.EDGE and cloud is not None:
        words += ["--connect", ",".join(filter(None, (f"{cloud.name}={cloud.address}", cloud.public_key)))]
    return shlex.join(words)


def _own_model_id(deployment: Deployment) -> tuple[str, str]:
    """Fingerprint of the model as a session would load it, or the reason why there is none."""
    import torch  # seconds: not for --quick

    from runtime.model.graph import trace
    from runtime.model.zoo import load_model

    model = deployment.model
    torch.set_num_threads(1)  # as a session does: seeded weights depend on it
    try:
        loaded = load_model(model.spec, weights=model.weights, seed=model.seed, batch_size=model.batch_size)
        return trace(loaded).model_id, ""
    except OffcutError as error:
        return "", str(error)


def compare_fingerprints(
    answers: dict[str, NodeAnswer], deployment: Deployment, model_id: str | None
) -> Iterator[Finding]:
    """Compare the nodes' model with the device's; with the first node's on a device that holds none."""
    ids = {
        name: {offer.model_id for offer in answer.welcome.offers if offer.spec == deployment.model.spec}
        for name, answer in answers.items()
        if answer.welcome is not None
    }
    ids = {name: offered for name, offered in ids.items() if offered}
    reference = "the device" if model_id is not None else next(iter(ids), "")
    expected = {model_id} if model_id is not None else ids.get(reference, set())
    for name, offered in ids.items():
        if offered & expected:
            yield Finding("ok", name, f"same graph, weights and torch version as {reference}")
        else:
            text = (
                f"its {deployment.model.spec} is not the one of {reference}; give both the same weights file, seed and "
                "batch size, and the same torch version (`offcut --version`)"
            )
            yield Finding("WRONG", name, text)
