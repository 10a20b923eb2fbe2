"""The commands of `offcut` against one real node, in this process: what they print and how they end."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from agent.cli import main
from agent.layers import find_cuts, input_bytes
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.ask import ask_nodes
from runtime.errors import ClusterError
from runtime.model.graph import trace
from runtime.model.zoo import load_model
from runtime.testbed.cluster import Cluster
from runtime.types import Tier

pytestmark = pytest.mark.integration

MODEL = "tests.models:chain_image"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ModelConfig(spec=MODEL, batch_size=2), edges=()) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"frame{index}.png" for index in range(4)]
    for index, path in enumerate(paths):
        Image.effect_noise((48, 40), 40.0 + index).convert("RGB").save(path)
    return [str(path) for path in paths]


def write(folder: Path, address: str) -> str:
    path = folder / "deployment.toml"
    path.write_text(
        f'[model]\nspec = "{MODEL}"\nbatch_size = 2\n[constraints]\ndeadline_s = 60\n'
        f'[[node]]\nname = "cloud"\ntier = "cloud"\naddress = "{address}"\n'
    )
    return str(path)


def address_of(cluster: Cluster) -> str:
    return cluster.deployment.nodes[0].address


def test_infer_prints_batches_answers_and_a_summary(
    cluster: Cluster, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(("infer", write(tmp_path, address_of(cluster)), *files, "--verify", "--policy", "fixed:3,3"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("frame") and "remote" in line]
    assert [row[:3] for row in rows] == [["frame0.png", "+1", "remote"], ["frame2.png", "+1", "remote"]]
    assert [line.partition(":")[0] for line in lines if "class" in line] == [f"frame{i}.png" for i in range(4)]
    assert sum("bit-equal to the whole model" in line for line in lines) == 2
    assert any(line.startswith("2 request(s): 2 remote; total: median") for line in lines)
    assert lines[-1] == "plan: device[0:3) cloud[3:8)"


def test_infer_json_is_one_object_per_request_and_one_broken_picture_fails_only_its_own(
    cluster: Cluster, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_short = Path(files[1])
    cut_short.write_bytes(cut_short.read_bytes()[:600])
    with pytest.raises(SystemExit) as ended:
        main(("infer", write(tmp_path, address_of(cluster)), *files, "--json"))
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert "1 of 2 request(s) failed; the first one, frame0.png +1" in printed.err
    broken, good = (json.loads(line) for line in printed.out.splitlines())
    assert broken["outcome"] == "failed"
    assert "cut short" in broken["reason"]
    assert (good["inputs"], good["outcome"], good["deadline_met"]) == (files[2:], "remote", True)
    assert good["latency"]["total_s"] > 0
    assert [len(item) for item in good["top"]] == [5, 5]


def test_status_and_check_of_a_node_that_is_up(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, address_of(cluster))
    main(("status", path, "--timeout-s", "20"))
    shown = capsys.readouterr().out
    assert " up " in shown
    assert "nan" not in shown
    main(("check", path, "--timeout-s", "20"))
    shown = capsys.readouterr().out
    assert "cloud: same graph, weights and torch version as the device" in shown
    assert "WRONG" not in shown


def test_status_waits_for_the_round_trip(cluster: Cluster) -> None:
    answer = ask_nodes(cluster.deployment, 20.0)["cloud"]
    assert answer.state == "up"
    assert 0 < answer.rtt_s < 20
    assert answer.is_settled


def test_what_is_known_of_nodes_that_do_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = [silent.getsockname()[1], closed.getsockname()[1]]
        closed.close()
        nodes = tuple(
            NodeConfig(name=f"edge{index}", tier=Tier.EDGE, address=f"tcp://127.0.0.1:{port}")
            for index, port in enumerate(ports)
        )
        if abs(ports[0] - ports[1]) == 1:
            pytest.skip("the system gave two ports that are one node's")
        answers = ask_nodes(Deployment(model=ModelConfig(spec=MODEL), nodes=nodes), 0.3)
    assert (answers["edge0"].state, answers["edge1"].state) == ("loading?", "down")
    assert "still loading" in answers["edge0"].problem
    assert "nothing listens" in answers["edge1"].problem


@pytest.mark.parametrize("command", ["status", "check"])
def test_nobody_who_answers_is_exit_1_with_what_to_try(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main((command, write(tmp_path, "tcp://127.0.0.1:9"), "--timeout-s", "0.3"))
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert len(printed.err.splitlines()) == 1
    assert "nothing listens at" in printed.out.replace("\n", " ")


def test_layers_shows_what_crosses_at_every_cut(capsys: pytest.CaptureFixture[str]) -> None:
    main(("layers", MODEL, "--encoded-bytes", "2000"))
    lines = capsys.readouterr().out.splitlines()
    assert "encoded enters at layer 0, 2,000 bytes; cuts that send less: before layer 6-7" in lines
    assert "tensor enters at layer 2, 12,288 bytes; cuts that send less: before layer 6-7" in lines
    graph = trace(load_model("tests.models:residual")).spec
    cuts = find_cuts(graph, input_bytes(graph))
    for cut in cuts:  # by hand: each value that is made before the cut and read behind it, once
        crossing = [v for v in graph.values if v.producer < cut.layer and any(c >= cut.layer for c in v.consumers)]
        assert cut.sends_bytes == sum(value.tensor.nbytes for value in crossing)
        assert cut.smaller_than == ("tensor" if cut.layer and cut.sends_bytes < 4 * 3 * 32 * 32 else "")
    assert any(cut.smaller_than for cut in cuts)


def test_a_model_that_cannot_be_traced_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "untraceable.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x if x.sum() > 0 else -x\n"
        "def net(): return Net()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(("layers", "untraceable:net"))
    assert ended.value.code == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("offcut: torch.export cannot trace this model: layer (root) (Net), line 4")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet51", "no node can start: torchvision has no model 'resnet51'; did you mean resnet50"),
        ("tests.models:nothing", "cloud could not start: tests.models has no function 'nothing'"),
    ],
)
def test_a_cluster_with_a_bad_model_says_why_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ClusterError) as failed:
        Cluster.local(spec, edges=0)
    assert str(failed.value).startswith(message)
    assert "\n" not in str(failed.value)
