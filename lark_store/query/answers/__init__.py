"""Answers, one module per command: top, scores, attribute, metrics, ft-pt and others.

score_runs    runs of `attribute` in the catalog
recheck       recompute stored scores
"""
