"""A package, so that `tests.models:chain` names a model in worker processes too, whatever else is installed."""
