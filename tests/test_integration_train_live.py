"""`offcut train --live`: a few decisions on real processes, frozen like any other training."""

from pathlib import Path

import pytest

from agent.checkpoint import load_checkpoint
from agent.train.config import TrainConfig
from agent.train.run import run_train
from agent.train.watch import BEST
from env.logs import read_log
from runtime.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(600)]


def test_a_live_training_ends_with_a_frozen_policy_that_another_can_begin_with(tmp_path: Path) -> None:
    small = {"live": True, "models": ("tests.models:chain",), "steps": 64, "num_requests": 16}
    run_train(TrainConfig(out=tmp_path / "first", hidden=8, scenarios=("streaming",), **small))
    first = load_checkpoint(tmp_path / "first" / BEST)
    assert first.manifest.training["steps"] == 64
    assert first.manifest.config["live"]
    assert len(read_log(tmp_path / "first" / "session").arrivals_s) == 64
    again = TrainConfig(
        out=tmp_path / "again", start_from=str(tmp_path / "first" / BEST), epochs=1, **small | {"steps": 16}
    )
    run_train(again)
    second = load_checkpoint(tmp_path / "again" / BEST)
    assert second.manifest.hidden == 8
    seen = (first.manifest.seen, second.manifest.seen)
    assert all(now[0] <= was[0] and now[1] >= was[1] for was, now in zip(seen[0].context, seen[1].context, strict=True))


def test_what_cannot_be_begun_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="planner"):
        run_train(TrainConfig(out=tmp_path, live=True, start_from="planner"))
    with pytest.raises(ConfigError, match="no readable manifest"):
        run_train(TrainConfig(out=tmp_path, live=True, start_from="./none"))
    with pytest.raises(ConfigError, match="got both"):
        TrainConfig(live=True, from_logs=tmp_path, models=("torchvision:alexnet",))
