"""What `offcut` finds wrong before it loads a model: quick, and one line."""

from pathlib import Path

import pytest
from PIL import Image

from agent.check import check_node, compare_fingerprints, worker_command
from agent.cli import main, version
from agent.config import InferConfig
from agent.preflight import Prepared, group_files, prepare
from runtime.deployment import Deployment, ModelConfig, NodeConfig, SecurityConfig
from runtime.device.ask import NodeAnswer
from runtime.errors import ConfigError, InputError
from runtime.node.config import NextNode, WorkerConfig
from runtime.types import NodeState, Tier
from runtime.wire.messages import PROTOCOL_VERSION, Offer, Status, Welcome
from tests.test_agent_checkpoint import write as write_checkpoint

KEY = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    Image.effect_noise((48, 40), 60.0).convert("RGB").save(path)
    return path


def write(folder: Path, *tiers: str, extra: str = "") -> Path:
    lines = ["[model]", 'spec = "tests.models:chain_image"', extra]
    for index, tier in enumerate(tiers):
        lines += [
            "[[node]]",
            f'name = "{tier}0"',
            f'tier = "{tier}"',
            f'address = "tcp://127.0.0.1:{7001 + 2 * index}"',
        ]
    path = folder / "deployment.toml"
    path.write_text("\n".join(lines))
    return path


def prepared(path: Path, *inputs: Path, **options: object) -> Prepared:
    return prepare(InferConfig(deployment=path, inputs=inputs, **options))  # type: ignore[arg-type]


def test_the_default_policy_is_one_that_the_deployment_can_run(tmp_path: Path, photo: Path) -> None:
    assert prepared(write(tmp_path, "edge", "cloud"), photo).policy.name == "cloud-only"
    assert prepared(write(tmp_path, "edge"), photo).policy.name == "edge-only"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "clod-only"}, "did you mean cloud-only"),
        ({"policy": "cloud-only"}, "expected a cloud node"),
        ({"policy": "fixed:1,2@edge7"}, r"among \['edge0'\].*got 'edge7'"),
        ({"codec": "int8"}, "lossless_only = false"),
    ],
)
def test_an_option_that_cannot_work_is_named(
    tmp_path: Path, photo: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(write(tmp_path, "edge"), photo, **options)


def test_the_policy_may_be_a_checkpoint_and_a_bad_one_is_named(tmp_path: Path, photo: Path) -> None:
    path = write(tmp_path, "edge")
    folder = write_checkpoint(tmp_path / "mine")
    assert prepared(path, photo, policy=str(folder)).policy.name == "mine"
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no readable weights\.safetensors"):
        prepared(path, photo, policy=str(folder))


def test_a_file_that_cannot_work_is_named(tmp_path: Path, photo: Path) -> None:
    path = write(tmp_path, "cloud")
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    for bad in (broken, tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(InputError, match=bad.name):
            prepared(path, photo, bad)
    with pytest.raises(ConfigError, match=r"weights file at .*w\.safetensors"):
        prepared(write(tmp_path, "cloud", extra='weights = "w.safetensors"'), photo)
    with pytest.raises(ConfigError, match=r"no\.key_secret"):
        prepared(write(tmp_path, "cloud", extra='[security]\nsecret_key = "no.key_secret"'), photo)


def test_files_become_batches_or_an_error_that_says_what_is_left_over() -> None:
    files = tuple(Path(f"{index}.jpg") for index in range(6))
    assert group_files(files, 1) == tuple((file,) for file in files)
    assert group_files(files, 3) == (files[:3], files[3:])
    with pytest.raises(ConfigError, match="the last 2 fill no batch; add 2, or leave 2 out"):
        group_files(files, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "KEYS"),
        ("keys", "KEYS", "a", "a"),
        ("infer", "x.toml"),
        ("infer", "x.toml", "a.jpg", "--codec", "zip"),
        ("infer", "x.toml", "a.jpg", "--deadline-s", "0"),
        ("status", "x.toml", "--timeout-s", "0"),
        ("layers", "a:b", "--batch-size", "0"),
        ("no-such-command",),
    ],
)
def test_a_usage_mistake_exits_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_no_key_is_made_when_one_of_the_names_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(("keys", str(tmp_path), "cloud"))
    assert capsys.readouterr().out.startswith('public_key = "')
    with pytest.raises(SystemExit) as ended:
        main(("keys", str(tmp_path), "device", "cloud"))
    assert ended.value.code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cloud.key", "cloud.key_secret"]


def test_the_version_names_what_machines_must_share(capsys: pytest.CaptureFixture[str]) -> None:
    main(("--version",))
    assert capsys.readouterr().out.strip() == version()
    assert "torch 2" in version()


# --- judging what nodes say -------------------------------------------------------------------------------------------

EDGE = NodeConfig(name="edge0", tier=Tier.EDGE, address="tcp://192.0.2.10:7001", public_key=KEY)
CLOUD = NodeConfig(name="cloud", tier=Tier.CLOUD, address="tcp://192.0.2.20:7001", public_key=KEY)
DEPLOYMENT = Deployment(
    model=ModelConfig(spec="m:f", weights="w.pt", batch_size=2),
    nodes=(EDGE, CLOUD),
    security=SecurityConfig(secret_key="k"),
)


def answer(
    spec: str = "m:f", tier: Tier = Tier.EDGE, name: str = "edge0", model_id: str = "1", hears_cloud: bool = True
) -> NodeAnswer:
    cloud = Status(NodeState("cloud", Tier.CLOUD, True), ())
    status = Status(NodeState(name, tier, True), (), (cloud,) if hears_cloud else ())
    welcome = Welcome(PROTOCOL_VERSION, name, tier, (Offer(model_id, spec, "g"),), ())
    return NodeAnswer("up", welcome=welcome, status=status, rtt_s=0.001)


def verdicts(given: NodeAnswer, node: NodeConfig = EDGE) -> list[str]:
    return [finding.verdict for finding in check_node(DEPLOYMENT, node, given)]


def test_a_node_as_the_file_says_is_ok_and_each_difference_is_found() -> None:
    assert verdicts(answer()) == ["ok"]
    assert verdicts(answer(tier=Tier.CLOUD)) == ["WRONG", "ok"]
    assert verdicts(answer(spec="m:other")) == ["WRONG"]
    assert verdicts(answer(name="edge")) == ["ok", "note"]
    assert verdicts(answer(hears_cloud=False)) == ["ok", "note"]
    assert verdicts(answer(tier=Tier.CLOUD, name="cloud", hears_cloud=False), CLOUD) == ["ok"]
    assert verdicts(NodeAnswer("down", "nothing listens")) == ["WRONG", "try"]
    assert verdicts(NodeAnswer("refused", "another key")) == ["WRONG"]


def test_the_command_that_starts_a_node_gives_it_what_the_file_says() -> None:
    import shlex

    from agent.cli import parse

    config = parse(shlex.split(worker_command(DEPLOYMENT, EDGE))[1:])
    assert isinstance(config, WorkerConfig)
    assert (config.tier, config.name, config.model, config.batch_size) == ("edge", "edge0", ("m:f",), 2)
    assert (config.bind, config.weights) == ("tcp://0.0.0.0:7001", "w.pt")
    assert config.keys is not None
    assert config.next_nodes() == {"cloud": NextNode(CLOUD.address, KEY.encode())}


def test_other_weights_are_found_against_the_device_or_else_among_the_nodes() -> None:
    answers = {"edge0": answer(model_id="1"), "cloud": answer(model_id="2", tier=Tier.CLOUD), "off": NodeAnswer()}

    def wrong(model_id: str | None) -> list[str]:
        found = compare_fingerprints(answers, DEPLOYMENT, model_id)
        return [finding.subject for finding in found if finding.verdict == "WRONG"]

    assert wrong("1") == ["cloud"]
    assert wrong("3") == ["edge0", "cloud"]
    assert wrong(None) == ["cloud"]
