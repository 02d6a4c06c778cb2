"""Probe facts: whether a checkpoint knows an exact answer, and how likely it is.

units       the facts of one checkpoint, source and variant, and which are missing
runs        probe runs in the catalog: lock, begin or reopen, commit
run         teacher forcing and sampling, batch by batch
cost        the estimate of a dry run
"""
