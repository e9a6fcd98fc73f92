"""Runs engines: scheduling, paged cache, sampling, text. docs/structures.md shows the way of a request."""
