"""The README tells the truth: its code runs, its commands parse, its demo shows what it says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli import parse
from agent.photos import sample_photo
from runtime.deployment import load_deployment
from runtime.node.config import NextNode, WorkerConfig
from runtime.testbed.cluster import Cluster

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def run_example(with_word: str, folder: Path) -> str:
    """Run the first Python example that holds a word as a program beside a picture; what it printed."""
    example = next(block for block in blocks("python") if with_word in block)
    (folder / "example.py").write_text(example)
    shutil.copy(sample_photo(), folder / "frame.jpg")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_offcut_command_parses() -> None:
    assert len(commands("offcut")) >= 5
    for arguments in commands("offcut"):
        parse(arguments)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {word for words in commands("make") for word in words}
    assert used
    assert used <= targets


def test_the_deployment_file_is_valid(tmp_path: Path) -> None:
    [text] = blocks("toml")
    path = tmp_path / "deployment.toml"
    path.write_text(text)
    assert [node.name for node in load_deployment(path).nodes] == ["edge0", "cloud"]


def test_the_workers_and_the_deployment_file_agree(tmp_path: Path) -> None:
    [text] = blocks("toml")
    (tmp_path / "deployment.toml").write_text(text)
    deployment = load_deployment(tmp_path / "deployment.toml")
    workers = {config.name: config for config in map(parse, commands("offcut")) if isinstance(config, WorkerConfig)}
    assert set(workers) == {node.name for node in deployment.nodes}
    for node in deployment.nodes:
        worker = workers[node.name]
        assert (worker.tier, worker.model) == (node.tier.label, (deployment.model.spec,))
        assert str(tmp_path / str(worker.weights)) == deployment.model.weights
        assert worker.bind.rpartition(":")[2] == node.address.rpartition(":")[2]
    cloud = deployment.node("cloud")
    assert cloud.public_key is not None
    assert workers["edge0"].next_nodes() == {"cloud": NextNode(cloud.address, cloud.public_key.encode())}


@pytest.mark.integration
def test_a_model_of_ones_own_and_the_second_example_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = next(block for block in blocks("python") if "def small" in block)
    example = next(block for block in blocks("python") if "runtime.connect" in block)
    (tmp_path / "mynet.py").write_text(factory)
    shutil.copy(sample_photo(), tmp_path / "frame.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Cluster.local("mynet:small", edges=0) as cluster:
        [cloud] = cluster.deployment.nodes
        (tmp_path / "deployment.toml").write_text(
            f'model.spec = "mynet:small"\nconstraints.deadline_s = 60\n[[node]]\nname = "cloud"\ntier = "cloud"\n'
            f'address = "{cloud.address}"\n'
        )
        exec(compile(example, "example.py", "exec"), {"__name__": "__main__"})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["remote"] * 3


@pytest.mark.integration
@pytest.mark.timeout(260)
def test_the_first_example_runs_as_it_stands(tmp_path: Path) -> None:
    out = run_example("Cluster.local", tmp_path)
    assert "edge0[0:" in out
    assert "remote" in out


@pytest.mark.integration
@pytest.mark.timeout(260)
def test_the_example_of_an_emulated_device_runs_as_it_stands(tmp_path: Path) -> None:
    plan, outcome = run_example("NodeEmulation", tmp_path).splitlines()
    assert "[0:" in plan
    assert outcome in ("local", "device", "remote")


@pytest.mark.integration
@pytest.mark.timeout(420)
def test_the_demo_gives_the_same_output_under_every_rule_in_every_phase(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 40 outputs equal the whole model's" in done.stdout
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert len(list((tmp_path / "tensorboard").iterdir())) == 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_training_of_the_readme_runs_quickly_and_its_policy_can_be_compared(tmp_path: Path) -> None:
    lines = [words for words in commands("offcut") if words[0] == "train" and "--traces" in words]
    [train] = [[word if word != "runs/mine" else str(tmp_path / "mine") for word in words] for words in lines]
    del train[train.index("--traces") : train.index("--traces") + 2]  # recordings are the reader's own
    best = str(tmp_path / "mine" / "best")
    few = ["--models", "torchvision:squeezenet1_1", "--scenarios", "both", "--episodes", "1", "--no-bounds"]
    compare = [
        "compare",
        "planner",
        best,
        "--baselines",
        "planner",
        "--quick",
        *few,
        "--out",
        str(tmp_path / "compared"),
    ]
    for words in ([*train, "--quick"], compare):
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "compared" / "table.md").is_file()
