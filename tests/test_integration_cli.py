"""The `offcut` command as a user types it, in processes of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from runtime.errors import ClusterError
from runtime.testbed.process import ManagedProcess
from runtime.wire.keys import load_keys

pytestmark = pytest.mark.integration

MODEL = "tests.models:chain_image"


def offcut(*arguments: str, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    Image.effect_noise((48, 40), 60.0).convert("RGB").save(path)
    return path


def start_worker(folder: Path, *arguments: str, name: str = "cloud") -> ManagedProcess:
    command = ("--tier", "cloud", "--model", MODEL, "--name", name, "--exit-with-stdin", *arguments)
    return ManagedProcess(name, "runtime.node", command, folder)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The keys and the address of a cloud that asks for keys."""
    folder = tmp_path_factory.mktemp("secured")
    keys = folder / "keys"
    made = offcut("keys", str(keys), "device", "cloud")
    assert made.returncode == 0, made.stderr
    worker = start_worker(folder, "--keys", str(keys))
    try:
        yield keys, worker.wait_line("READY", 100.0)
    finally:
        worker.ask_to_stop()
        worker.wait()


def write_deployment(folder: Path, address: str, keys: Path | None = None, secret: Path | None = None) -> Path:
    lines = ["[model]", f'spec = "{MODEL}"']
    if secret is not None:
        lines += ["[security]", f'secret_key = "{secret}"']
    lines += ["[[node]]", 'name = "cloud"', 'tier = "cloud"', f'address = "{address}"']
    if keys is not None:
        lines += [f'public_key = "{load_keys(keys / "cloud.key_secret").public.decode()}"']
    path = folder / "deployment.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_help_is_complete_and_a_usage_mistake_is_2() -> None:
    text = offcut("--help").stdout
    for command in ("worker", "infer", "status", "keys"):
        assert command in text
    assert "busy" in offcut("worker", "--help").stdout
    assert offcut("worker").returncode == 2
    assert offcut("no-such-command").returncode == 2


def test_infer_and_status_work_over_curve(secured: tuple[Path, str], photo: Path, tmp_path: Path) -> None:
    keys, address = secured
    deployment = write_deployment(tmp_path, address, keys, keys / "device.key_secret")
    done = offcut("infer", str(deployment), str(photo), "--verify", "--repeat", "2", "--deadline-s", "60")
    assert done.returncode == 0, done.stderr
    assert "remote" in done.stdout
    assert "bit-equal to the whole model" in done.stdout
    assert "class" in done.stdout
    shown = offcut("status", str(deployment))
    assert shown.returncode == 0, shown.stderr
    assert "remote 2" in shown.stdout
    assert "up" in shown.stdout


def test_a_lossy_codec_needs_the_constraint_and_shows_its_error(
    secured: tuple[Path, str], photo: Path, tmp_path: Path
) -> None:
    keys, address = secured
    deployment = write_deployment(tmp_path, address, keys, keys / "device.key_secret")
    arguments = ("infer", str(deployment), str(photo), "--policy", "fixed:3,3", "--codec", "int8", "--verify")
    refused = offcut(*arguments)
    assert refused.returncode == 1
    assert "lossless_only" in refused.stderr
    deployment.write_text(deployment.read_text() + "[constraints]\nlossless_only = false\n")
    done = offcut(*arguments, "--deadline-s", "60")
    assert done.returncode == 0, done.stderr
    assert "largest difference from the whole model" in done.stdout


def test_a_device_that_the_node_does_not_know_is_refused_by_name(
    secured: tuple[Path, str], photo: Path, tmp_path: Path
) -> None:
    keys, address = secured
    assert offcut("keys", str(tmp_path / "other"), "stranger").returncode == 0
    deployment = write_deployment(tmp_path, address, keys, tmp_path / "other" / "stranger.key_secret")
    done = offcut("infer", str(deployment), str(photo))
    assert done.returncode == 1
    assert "key" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_goes_wrong_is_one_line_with_a_way_out(photo: Path, tmp_path: Path) -> None:
    missing = offcut("infer", str(tmp_path / "no.toml"), str(photo))
    assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 1)
    deployment = write_deployment(tmp_path, "tcp://127.0.0.1:9")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    done = offcut("infer", str(deployment), str(broken), "--policy", "device-only")
    assert done.returncode == 1
    assert "broken.jpg" in done.stderr
    deployment.write_text(deployment.read_text().replace("tier", "teir"))
    typo = offcut("status", str(deployment))
    assert typo.returncode == 1
    assert "line" in typo.stderr


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    assert offcut("keys", str(tmp_path), "edge0").returncode == 0
    again = offcut("keys", str(tmp_path), "edge0")
    assert again.returncode == 1
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "torchvision:resnet51"), "resnet50"),
        (("--model", "tests.models:nothing"), "nothing"),
        (("--bind", "tcp://0.0.0.0:*", "--model", MODEL), "--insecure"),
        (("--queue", "0", "--model", MODEL), "--queue"),
        (("--connect", "cloud", "--model", MODEL), "NAME=tcp://"),
    ],
)
def test_a_worker_that_cannot_start_says_why(arguments: tuple[str, ...], message: str) -> None:
    done = offcut("worker", "--tier", "edge", *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr + done.stdout


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    first = start_worker(tmp_path, name="first")
    try:
        address = first.wait_line("BOUND", 100.0)
        done = offcut("worker", "--tier", "cloud", "--model", MODEL, "--bind", address)
        assert done.returncode == 1
        assert address.rpartition(":")[2] in done.stderr
    finally:
        first.ask_to_stop()
        first.wait()


def test_a_worker_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    worker = start_worker(tmp_path)
    worker.wait_line("READY", 100.0)
    worker.close_input()
    with pytest.raises(ClusterError, match="ended with code 0"):
        worker.wait_line("NEVER", 20.0)
    worker.wait()


def test_ctrl_c_ends_a_worker_in_order(tmp_path: Path) -> None:
    worker = start_worker(tmp_path)
    worker.wait_line("READY", 100.0)
    worker.signal(signal.SIGINT)
    with pytest.raises(ClusterError, match="ended with code 0"):
        worker.wait_line("NEVER", 20.0)
    worker.wait()
