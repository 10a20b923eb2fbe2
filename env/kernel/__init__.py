"""The twin's dynamics, compiled: arrays in, arrays out, one lane at a time. Only `env.twin` uses it."""
