"""Settings of a training: the fields and their texts are `offcut train --help`."""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ConfigError
from runtime.profiles.shipped import shipped_specs
from runtime.types import INPUT_KINDS

HELD_OUT = ("timm:xception", "torchvision:googlenet", "torchvision:vgg16")
"""Models that no shipped policy was trained on: a light, a middling and a heavy one."""

QUICK_MODELS = ("torchvision:squeezenet1_1", "torchvision:resnet18")
"""What `--quick` learns on where no models are named."""

LIVE_MODELS = ("torchvision:squeezenet1_1",)
"""What `--live` learns on where no models are named."""

LIVE_STEPS = 256
"""Most decisions of `--live`: some minutes."""

_POSITIVE = (
    "per_model", "num_envs", "num_requests", "n_steps", "batch_size", "epochs", "hidden", "steps", "eval_every",
    "eval_episodes", "save_every", "threads", "learning_rate", "grad_norm", "rehearsal_steps", "rehearsal_keep",
    "rehearsal_width", "rehearsal_horizon", "rehearsal_epochs", "rehearsal_rate",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Train a policy in the twin; the best one is kept as a frozen folder. Ctrl-C saves, `--resume` goes on.

    What OUT holds in the end: best (the frozen policy: `offcut infer --policy OUT/best`), tensorboard, config.json,
    state.json and state-DECISIONS.zip (what --resume needs).
    """

    out: Path = Path("runs/train")
    """Folder for everything."""

    resume: bool = False
    """Go on in OUT with the settings that were saved there; of the others only --threads counts."""

    quick: bool = False
    """Two small models, few decisions: shows in a minute or two that everything works, not what comes of it."""

    live: bool = False
    """A short training on the real runtime: processes on this machine, in real time, with the guard's rules in the mask.
    One small model unless --models names others, 256 steps unless --steps are fewer, no rehearsal; evaluated in the twin."""

    start_from: str | None = None
    """Folder or name of a checkpoint to begin with, instead of the planner; the network is as wide as its own."""

    # --- where it learns
    models: tuple[str, ...] = ()
    """Models to learn on: shipped ones, or random:NUMBER; none takes every shipped one that is not held out."""

    held_out: tuple[str, ...] = HELD_OUT
    """Models that evaluation shows besides, and that nothing is learnt or chosen on."""

    random_models: int = 24
    """Made-up models besides."""

    per_model: int = 10
    """Sites of each model and input kind, with machines of their own."""

    input_kinds: tuple[str, ...] = ("encoded",)
    """What requests bring: encoded, image, tensor."""

    scenarios: tuple[str, ...] = ("both", "streaming", "streaming", "contention", "outage", "static")
    """What happens around a site; one that is named twice comes twice as often."""

    traces: Path | None = None
    """Folder with network/ and load/: every scenario also plays its training files; evaluation plays validation files."""

    from_logs: Path | None = None
    """The events.jsonl of your own sessions, or its folder: learns and evaluates at the deployment that they tell of,
    instead of at sites drawn at random. --models names the one model that they are of."""

    synthetic: bool = True
    """Also play the fitted families where there are --traces."""

    num_requests: int = 128
    """Steps of an episode."""

    # --- what it learns before it explores (agent/train/rehearse.py)
    rehearsal: int = 400_000
    """Decisions whose outcomes are looked up in the twin before the steps of PPO; 0: PPO begins as the planner."""

    rehearsal_steps: int = 64
    """Steps of each environment between two updates."""

    rehearsal_keep: int = 4
    """Rounds that an update learns from: the last one and those before it."""

    rehearsal_width: int = 6
    """Plans that are tried at each decision, the network's own choice among them."""

    rehearsal_horizon: int = 8
    """Requests that follow, which the network decides on."""

    rehearsal_gamma: float = 0.9
    """Discount of what each of those brings."""

    rehearsal_epochs: int = 2
    """How often an update sees every decision."""

    rehearsal_rate: float = 1e-3
    """Learning rate of the first update; falls linearly to almost 0."""

    rehearsal_divergence: float = 0.02
    """Weight of the divergence from the network before an update."""

    # --- how it learns
    steps: int = 200_000
    """Decisions that PPO learns from; rounded up to whole updates."""

    seed: int = 0
    """Of everything: equal settings and seed give equal weights."""

    num_envs: int = 128
    """Environments side by side."""

    n_steps: int = 64
    """Steps of each between two updates."""

    batch_size: int = 8192
    """Decisions of a gradient step."""

    epochs: int = 4
    """How often an update sees every decision."""

    learning_rate: float = 2e-4
    """Of the first update; falls linearly to almost 0."""

    gamma: float = 0.9
    """Discount of what comes one request later."""

    gae_lambda: float = 0.9
    """Of generalised advantage estimation."""

    clip: float = 0.2
    """How far an update may move the odds of a decision."""

    entropy: float = 0.0
    """Weight of the entropy bonus."""

    value_weight: float = 0.5
    """Weight of the critic's loss, whose gradients end at the layers that it shares with the actor."""

    grad_norm: float = 0.5
    """Longer gradients are cut to this length."""

    hidden: int = 64
    """Width of the network's layers."""

    credit: Literal["arrival", "decision"] = "decision"
    """Where a request's term counts: at the step in which it ended, or at the step that decided on it."""

    hold: int = 16
    """With credit decision: the last so many steps wait for the next update, so that their requests have ended."""

    excess_weight: float = 0.1
    """Weight of the reward's linear part, which makes long waits count."""

    # --- how it is watched
    eval_every: int = 50_000
    """Decisions between evaluations."""

    eval_scenarios: tuple[str, ...] = ("both", "streaming", "contention", "static")
    """What evaluations play, whatever is learnt on: the best policy is the one that is best over all of these."""

    eval_episodes: int = 8
    """Episodes of each model, input kind and scenario in an evaluation. With 2 chance decides which policy is kept."""

    save_every: int = 100_000
    """Decisions between saves of what --resume needs."""

    threads: int = 1
    """Torch threads."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(f"expected --{name.replace('_', '-')} > 0, got {getattr(self, name)}")
        not_negative = ("random_models", "rehearsal", "rehearsal_divergence", "seed", "hold", "entropy", "value_weight")
        for name in (*not_negative, "excess_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"expected --{name.replace('_', '-')} >= 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda", "clip", "rehearsal_gamma"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"expected --{name.replace('_', '-')} within 0 and 1, got {getattr(self, name)}")
        self._check_choices()
        self._check_places()

    def _check_choices(self) -> None:
        for kind in self.input_kinds:
            if kind not in INPUT_KINDS:
                raise ConfigError(f"expected --input-kinds among {', '.join(INPUT_KINDS)}, got {kind!r}")
        for name in ("input_kinds", "scenarios", "eval_scenarios"):
            if not getattr(self, name):
                raise ConfigError(f"expected at least one of --{name.replace('_', '-')}, got none")
        if self.num_envs * self.n_steps < self.batch_size:
            raise ConfigError(
                f"expected --batch-size <= num_envs * n_steps = {self.num_envs * self.n_steps}, got {self.batch_size}"
            )
        if self.credit == "decision" and self.hold >= self.n_steps:
            raise ConfigError(f"expected --hold < n_steps = {self.n_steps}, got {self.hold}")

    def _check_places(self) -> None:
        if self.traces is None and not self.synthetic:
            raise ConfigError("expected --traces DIR with --no-synthetic: there would be nothing to play")
        if self.from_logs is not None and len(self.models) != 1:
            raise ConfigError(
                f"expected one of --models with --from-logs, got {len(self.models)}; name the logs' model"
            )
        if self.from_logs is not None and self.live:
            raise ConfigError("expected --live or --from-logs, got both: logs are played in the twin")
        both = set(self.models) & set(self.held_out)
        if both:
            raise ConfigError(f"expected models to be learnt on or held out, got both for {', '.join(sorted(both))}")

    def effective(self) -> "TrainConfig":
        """These settings, or with `quick` or `live` the small ones instead of what makes a training long."""
        if self.live:
            return self._live()
        if not self.quick:
            return self
        return replace(
            self,
            quick=False,
            models=self.models or QUICK_MODELS,
            held_out=(),
            random_models=0,
            per_model=1,
            rehearsal=1024,
            rehearsal_steps=32,
            steps=2048,
            num_envs=16,
            batch_size=256,
            eval_episodes=1,
            eval_every=2048,
            save_every=2048,
        )

    def _live(self) -> "TrainConfig":
        steps = min(self.steps, LIVE_STEPS)
        n_steps = min(self.n_steps, 32, steps)
        return replace(
            self,
            quick=False,
            models=self.models or LIVE_MODELS,
            held_out=(),
            random_models=0,
            per_model=1,
            rehearsal=0,
            steps=steps,
            num_envs=1,
            num_requests=min(self.num_requests, 32),
            n_steps=n_steps,
            batch_size=min(self.batch_size, n_steps),
            hold=min(self.hold, n_steps // 4),
            eval_episodes=1,
            eval_every=steps,
            save_every=steps,
        )

    @property
    def rollout(self) -> int:
        """Steps between two updates, of all environments."""
        return self.num_envs * self.n_steps

    @property
    def num_updates(self) -> int:
        """Updates of PPO in all."""
        return math.ceil(self.steps / self.rollout)

    @property
    def num_decisions(self) -> int:
        """Decisions in all, of the rehearsal and of PPO, each rounded up to whole updates."""
        a_round = self.num_envs * self.rehearsal_steps
        return math.ceil(self.rehearsal / a_round) * a_round + self.num_updates * self.rollout

    @property
    def learnt_models(self) -> tuple[str, ...]:
        """Shipped models to learn on, then the made-up ones."""
        shipped = self.models or tuple(spec for spec in shipped_specs() if spec not in self.held_out)
        return shipped + tuple(f"random:{number}" for number in range(self.random_models))

    def settings(self) -> dict[str, Any]:
        """What the result follows from, as JSON can hold it: no folders, and traces by their folder's name only."""
        left_out = ("out", "resume", "threads", "save_every")
        named = {key: value for key, value in asdict(self).items() if key not in left_out}
        start = None if self.start_from is None else Path(self.start_from)
        folders = {"traces": self.traces, "from_logs": self.from_logs, "start_from": start}
        return named | {key: None if path is None else path.name for key, path in folders.items()}

    def to_json(self) -> dict[str, Any]:
        """Every field but `resume`, as JSON can hold it."""
        fixed = {key: value for key, value in asdict(self).items() if key != "resume"}
        paths = {"out": self.out, "traces": self.traces, "from_logs": self.from_logs}
        return fixed | {key: None if path is None else str(path) for key, path in paths.items()}

    @classmethod
    def from_json(cls, saved: dict[str, Any], **others: Any) -> "TrainConfig":
        """Read what `to_json` gave; `others` replaces fields."""
        known = {field.name for field in fields(cls)}
        if set(saved) - known:
            raise ConfigError(f"expected the settings of this version, got {', '.join(sorted(set(saved) - known))} too")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()
        }
        for name in ("out", "traces", "from_logs"):
            values[name] = None if values.get(name) is None else Path(values[name])
        return cls(**(values | others))
