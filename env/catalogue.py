"""Sites to learn at: shipped models and made-up ones, each with machines drawn around its profile.

Made-up models have no maps, so nothing of them is ever cut into tiles.
"""

from collections.abc import Sequence

import numpy as np

from env.ranges import Ranges
from env.site import Site, make_site, random_model
from runtime.errors import ConfigError
from runtime.profiles.shipped import load_shipped_profile, shipped_specs

RANDOM = "random:"
"""`random:NUMBER` is a made-up model; the same number gives the same."""


def make_sites(
    models: Sequence[str] | None = None,
    *,
    per_model: int = 1,
    input_kind: str = "encoded",
    seed: int = 0,
    ranges: Ranges | None = None,
) -> tuple[Site, ...]:
    """Draw sites.

    Args:
        models: specs of shipped models, or `random:NUMBER`; None takes every shipped one.
        per_model: sites of each, with machines of their own.
        input_kind: what requests bring.
        seed: of the machines.
        ranges: what to draw from.

    Raises:
        ConfigError: when there is no such model.
        PlanError: when no split is legal at a site.
    """
    specs = shipped_specs() if models is None else tuple(models)
    if not specs or per_model < 1:
        raise ConfigError(f"expected at least one model and per_model >= 1, got {specs} and {per_model}")
    return tuple(
        _make_site(spec, number, at, input_kind, seed, ranges)
        for at, spec in enumerate(specs)
        for number in range(per_model)
    )


def _make_site(spec: str, number: int, at: int, input_kind: str, seed: int, ranges: Ranges | None) -> Site:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(at, number)))
    if spec.startswith(RANDOM):
        digits = spec.removeprefix(RANDOM)
        if not digits.isdigit():
            raise ConfigError(f"expected {RANDOM}NUMBER, got {spec!r}")
        graph, machine, ratios = random_model(np.random.default_rng(int(digits)))
    else:
        model = load_shipped_profile(spec)
        graph, machine, ratios = model.graph, model.profile, dict(model.ratios.by_value)
    return make_site(spec, graph, machine, rng, ratios=ratios, input_kind=input_kind, ranges=ranges)
