"""Sketches to influence to metrics, and SQL over all of it."""
