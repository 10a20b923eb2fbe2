"""From a model's name to layers, segments and tiles that run."""
