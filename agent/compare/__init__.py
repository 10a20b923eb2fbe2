"""Policies against each other in the same worlds: `offcut compare`."""
