"""Prefect flows: the method as a composition of cached stages, and the command line."""
