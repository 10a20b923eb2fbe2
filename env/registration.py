"""Tell gymnasium what there is."""

from gymnasium.envs.registration import register, registry

TWIN = "offcut/SplitInference-v0"
LIVE = "offcut/SplitInferenceLive-v0"


def register_all() -> None:
    """Register the environments, once; nothing of them is loaded before one is made."""
    if TWIN not in registry:
        register(
            id=TWIN,
            entry_point="env.split_inference:SplitInferenceEnv",
            vector_entry_point="env.vector:SplitInferenceVectorEnv",
            disable_env_checker=True,  # it steps the first environment of every process; tests do it once
        )
    if LIVE not in registry:
        register(
            id=LIVE,
            entry_point="env.split_inference_live:SplitInferenceLiveEnv",
            nondeterministic=True,
            disable_env_checker=True,  # it would start processes for an environment that is thrown away
        )
