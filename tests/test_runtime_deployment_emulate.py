"""What `deployment.toml` says of a test bed: emulated nodes, device and links, with errors that name the line."""

import re
from pathlib import Path

import pytest

from runtime.deployment import Deployment, LinkConfig, ModelConfig, NodeConfig, load_deployment
from runtime.errors import ConfigError
from runtime.presets import LinkEmulation, NodeEmulation
from runtime.types import Tier

WHOLE = """\
[model]
spec = "torchvision:resnet50"

[device]
emulate = { slow_down = 4.0 }

[[node]]
name = "edge0"
tier = "edge"
address = "tcp://127.0.0.1:7001"
emulate = { preset = "desktop" }

[[node]]
name = "cloud"
tier = "cloud"
address = "tcp://127.0.0.1:7011"
[node.emulate]
slow_down = 3.0
mode = "replay"

[[link]]
between = ["device", "edge0"]
emulate = { trace = "lte.csv", scale = 0.3, jitter_s = 0.005 }
back = { rate_bps = 50e6, delay_s = 0.02 }

[[link]]
between = ["edge0", "cloud"]
emulate = { rate_bps = 1000000 }
"""


def write(folder: Path, text: str) -> Path:
    (folder / "lte.csv").write_text("time_s,bandwidth_mbps\n0,8\n1,4\n")
    path = folder / "deployment.toml"
    path.write_text(text)
    return path


def test_a_file_says_what_is_emulated(tmp_path: Path) -> None:
    loaded = load_deployment(write(tmp_path, WHOLE))
    assert loaded.device_emulate == NodeEmulation(slow_down=4.0)
    assert loaded.node("edge0").emulate == NodeEmulation(preset="desktop")
    assert loaded.node("cloud").emulate == NodeEmulation(slow_down=3.0, mode="replay")
    assert loaded.links == (
        LinkConfig(
            between=("device", "edge0"),
            emulate=LinkEmulation(trace=str(tmp_path / "lte.csv"), scale=0.3, jitter_s=0.005),
            back=LinkEmulation(rate_bps=50e6, delay_s=0.02),
        ),
        LinkConfig(between=("edge0", "cloud"), emulate=LinkEmulation(rate_bps=1000000)),
    )


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('"desktop"', '"laptop"', 11, "expected preset to be one of rpi4, desktop, jetson, gpu, got 'laptop'"),
        ("{ preset =", "{ reset =", 11, "in [node.emulate], got 'reset'; did you mean 'preset'?"),
        ('{ preset = "desktop" }', '"desktop"', 11, "expected emulate to be a table such as { ... }, got 'desktop'"),
        ("slow_down = 3.0", "slow_down = -3.0", 17, "expected slow_down to be a number above 0, got -3.0"),
        ("slow_down = 3.0\nmode", "slow_up = 3.0\nmode", 18, "in [node.emulate], got 'slow_up'"),
        ("slow_down = 4.0", "slow_down = 0.5", 5, "expected mode compute and slow_down >= 1 for the device"),
        ('"replay"', '"dream"', 17, "expected mode to be compute or replay, got 'dream'"),
        ("[device]\nemulate", "[device]\nemulates", 5, "in [device], got 'emulates'; did you mean 'emulate'?"),
        ('"lte.csv"', '"5g.csv"', 23, "5g.csv; check the path"),
        ("50e6", "0", 24, "back: expected rate_bps to be a number above 0, got 0"),
        ('["device", "edge0"]', '["device", "edge1"]', 22, "got 'edge1'; did you mean 'edge0'?"),
        ('["edge0", "cloud"]', '["cloud", "edge0"]', 27, "or edge - cloud, got cloud - edge"),
        ('["edge0", "cloud"]', '["device", "edge0"]', 27, "expected every link once, got device - edge0 twice"),
        ('["edge0", "cloud"]', '"edge0"', 27, 'such as ["device", "edge0"], got \'edge0\''),
        ("emulate = { rate_bps = 1000000 }\n", "", 26, "expected a key 'emulate' in [[link]], got none"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert WHOLE.count(old) == 1
    path = write(tmp_path, WHOLE.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_deployment(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


def test_records_made_in_code_are_checked_alike() -> None:
    node = NodeConfig(name="edge0", tier=Tier.EDGE, address="tcp://127.0.0.1:7001")
    link = LinkConfig(between=("device", "cloud"), emulate=LinkEmulation())
    with pytest.raises(ConfigError, match="expected ends among"):
        Deployment(model=ModelConfig(spec="a:b"), nodes=(node,), links=(link,))
    with pytest.raises(ConfigError, match="for the device"):
        Deployment(model=ModelConfig(spec="a:b"), nodes=(node,), device_emulate=NodeEmulation(preset="gpu"))
