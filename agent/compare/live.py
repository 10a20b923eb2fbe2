"""The same comparison on the real runtime: one cluster at a time, in real time."""

from collections.abc import Iterator

from agent.compare.contestants import find_contestant
from agent.compare.play import Episode, Place, play_episode
from agent.compare.tasks import Plan
from env.live import LiveBackend
from env.live_site import make_live_sites


def play_live(plan: Plan) -> Iterator[tuple[tuple[str, int], list[Episode]]]:
    """Play every task; policies take turns in each world. Sites are as fast as this machine lets them be.

    Raises:
        OffcutError: when processes do not start, or the machinery fails in an episode.
    """
    contestants = [find_contestant(name) for name in plan.policies]
    for number in range(plan.num_sites):
        model, at = divmod(number, plan.per_model)
        sites = make_live_sites((plan.models[model],), input_kind=plan.input_kind, seed=plan.seed + model * 1000 + at)
        backend = LiveBackend(sites, num_requests=plan.num_requests)
        try:
            for kind in plan.scenarios:
                scenario, episodes = plan.scenario(kind), []
                policies = [contestant.build(sites[0].site.problem, has_clock=True) for contestant in contestants]
                for episode in range(plan.episodes):
                    seed = plan.world_seed(number, episode)
                    for name, policy in zip(plan.policies, policies, strict=True):
                        backend.start(0, scenario, seed)
                        place = Place(name, kind, plan.models[model], number, seed)
                        episodes.append(play_episode(backend, policy, place))
                yield (kind, number), episodes
        finally:
            backend.close()
