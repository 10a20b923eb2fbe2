"""The README tells the truth: its code runs, its commands parse, its demo shows what it says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli import parse
from agent.demo import sample_photo
from runtime.deployment import load_deployment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


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


@pytest.mark.integration
def test_the_first_example_runs_as_it_stands(tmp_path: Path) -> None:
    example = next(block for block in blocks("python") if "Cluster.local" in block)
    (tmp_path / "example.py").write_text(example)
    shutil.copy(sample_photo(), tmp_path / "frame.jpg")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "edge0[0:" in done.stdout
    assert "remote" in done.stdout


@pytest.mark.integration
def test_the_demo_shows_that_every_plan_gives_the_same_output() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/demo.py", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 8 outputs equal the whole model's, bit for bit." in done.stdout
