"""`offcut train`: from settings to a frozen folder."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import configure

from agent.checkpoint import Checkpoint, load_checkpoint
from agent.network import CandidatePolicy, import_weights
from agent.policies import find_checkpoint
from agent.tables import loading
from agent.train.buffer import CreditRolloutBuffer
from agent.train.config import TrainConfig
from agent.train.evaluate import Evaluator
from agent.train.live import LiveLane
from agent.train.rehearse import Rehearsal
from agent.train.state import State, load_config, load_state, save_config, save_state
from agent.train.tell import Teller
from agent.train.vecenv import LearnerVecEnv
from agent.train.watch import BEST, Watch
from agent.train.worlds import Worlds, describe_traces, training_worlds, validation_worlds
from env.split_inference_live import SplitInferenceLiveEnv
from env.vector import SplitInferenceVectorEnv
from runtime.errors import ConfigError
from runtime.planning.policies.guard import GuardSettings


def run_train(config: TrainConfig) -> None:
    """Train, or go on with a training; leaves with 128 + its number after a signal.

    Raises:
        ConfigError: when a model, scenario, trace or the training to go on with is not there.
    """
    config = config.effective()
    torch.set_num_threads(config.threads)
    torch.distributions.Distribution.set_default_validate_args(False)  # a third of a step otherwise
    if config.resume:
        config = load_config(config)
    config, start = _find_start(config)
    with loading("choosing plans for every site"):
        worlds = training_worlds(config)
        env = make_env(config, worlds)
        evaluators = _evaluators(config)
    model = make_model(config, env)
    state = load_state(config.out, model) if config.resume else State()
    if start is not None and not config.resume:
        import_weights(cast("CandidatePolicy", model.policy), start.weights)
        state.facts.seen = start.manifest.seen
    save_config(config)
    env.seed(config.seed * 2**20 + state.steps // config.rollout)
    model.set_logger(configure(str(config.out / "tensorboard"), ["tensorboard"]))
    with Teller(config.num_decisions, state.decisions) as teller:
        watch = Watch(config, state, evaluators, teller, _facts(config))
        watch.init_callback(model)
        before = {number: signal.signal(number, watch.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _learn(config, worlds, model, watch)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            model.logger.close()
            env.close()
        _say_end(config, state, teller)
    if watch.stop_signal:
        sys.exit(128 + watch.stop_signal)


def _find_start(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Read the checkpoint to begin with, and make the network as wide as its own."""
    if config.start_from is None or config.resume:
        return config, None
    folder = find_checkpoint(config.start_from)
    if folder is None:
        raise ConfigError(f"expected a checkpoint as --start-from, got the rule {config.start_from}")
    start = load_checkpoint(folder)
    return replace(config, hidden=start.manifest.hidden), start


def _learn(config: TrainConfig, worlds: Worlds, model: MaskablePPO, watch: Watch) -> None:
    """Rehearse what is left to rehearse, then let PPO learn, until all is done or a signal comes."""
    state = watch.state
    if not state.curve:
        watch.evaluate()
    if state.rehearsed < config.rehearsal:
        rehearsal = Rehearsal(config, worlds, cast("CandidatePolicy", model.policy), state.facts, state.rehearsed)
        while state.rehearsed < config.rehearsal:
            facts = rehearsal.round(lambda: bool(watch.stop_signal))
            if facts is None:
                break
            watch.rehearsed(rehearsal.done, facts)
    if watch.stop_signal:
        save_state(config.out, model, state)
    else:
        left = config.num_updates * config.rollout - state.steps
        model.learn(left, callback=watch, reset_num_timesteps=False, log_interval=1)


def _say_end(config: TrainConfig, state: State, teller: Teller) -> None:
    if state.decisions < config.num_decisions:
        done = f"saved after {state.decisions:,} of {config.num_decisions:,} decisions"
        teller.say(f"{done}; go on: offcut train --out {config.out} --resume")
    else:
        best = f"best after {state.best_decisions:,}: {config.out / BEST}"
        teller.say(f"{state.decisions:,} decisions in {state.trained_s / 60.0:.1f} min; {best}")


def make_env(config: TrainConfig, worlds: Worlds) -> LearnerVecEnv:
    """Make what is learnt in."""
    if worlds.live:
        scenarios = tuple(worlds.scenarios.values())
        log_folder = config.out / "session"
        live = SplitInferenceLiveEnv(
            scenario=scenarios,
            num_requests=config.num_requests,
            sites=worlds.live,
            log_folder=log_folder,
            guard=GuardSettings(),
            excess_weight=config.excess_weight,
        )
        return LearnerVecEnv(LiveLane(live))
    env = SplitInferenceVectorEnv(
        config.num_envs,
        scenario=tuple(worlds.scenarios.values()),
        sites=worlds.sites,
        num_requests=config.num_requests,
        staggered=True,
        excess_weight=config.excess_weight,
    )
    return LearnerVecEnv(env)


def make_model(config: TrainConfig, env: LearnerVecEnv) -> MaskablePPO:
    """Make the learner, untrained."""
    last = 1.0 / config.num_updates

    def learning_rate(progress_left: float) -> float:
        return config.learning_rate * (progress_left + last)  # SB3 asks after the rollout: what is left then

    return MaskablePPO(
        CandidatePolicy,
        env,
        learning_rate=learning_rate,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        ent_coef=config.entropy,
        vf_coef=config.value_weight,
        max_grad_norm=config.grad_norm,
        policy_kwargs={"hidden": config.hidden},
        rollout_buffer_class=CreditRolloutBuffer,
        rollout_buffer_kwargs={"hold": config.hold if config.credit == "decision" else 0},
        seed=config.seed,
        device="cpu",
    )


def _evaluators(config: TrainConfig) -> tuple[Evaluator, Evaluator | None]:
    def make(models: tuple[str, ...]) -> Evaluator:
        worlds = validation_worlds(config, models)
        return Evaluator(worlds, episodes=config.eval_episodes, num_requests=config.num_requests)

    learnt = config.models or config.learnt_models[: -config.random_models or None]
    return make(learnt), make(config.held_out) if config.held_out and config.from_logs is None else None


def _facts(config: TrainConfig) -> dict[str, Any]:
    """Facts that stand before the training begins."""
    facts: dict[str, Any] = {"revision": _revision(), "models": list(config.learnt_models)}
    return facts | {"held-out models": list(config.held_out), "traces": describe_traces(config)}


def _revision() -> str | None:
    """Git revision of the code, `+` behind it when files differ; None where it is not a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        revision, changes = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changes else "")
