"""Profiles of models: the records, what a machine's measurements mean, and the ones that ship. No torch."""
