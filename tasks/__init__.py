"""Prefect around the science: cached stages, their locks and the environment they run in."""
