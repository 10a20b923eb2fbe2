"""The runtime as an environment to learn in: `import env`, then `gymnasium.make("offcut/SplitInference-v0")`."""

from env.registration import register_all

register_all()
