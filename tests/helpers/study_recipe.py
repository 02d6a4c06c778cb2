"""A recipe of a small study."""

from __future__ import annotations

RECIPE = """
title = "A tiny model on made-up questions"
device = "cpu"
[model]
path = "model"
[finetune]
learning_rates = [3e-3, 3e-4]
[evaluate]
labels = ["yes", "no", "maybe"]
[sketch]
k = 1024
[compare]
methods = ["cosine", "bm25"]
[[source]]
name = "finetune"
stage = "finetune"
uri = "qa.jsonl"
samples = 12
[[source]]
name = "test"
stage = "query"
uri = "qa.jsonl"
skip = 12
samples = 12
[[source]]
name = "medical"
stage = "pretrain"
uri = "medical.jsonl"
samples = 12
choose = "bm25"
variants = ["raw", "chatml"]
[[source]]
name = "songs"
stage = "pretrain"
uri = "songs.jsonl"
samples = 12
choose = "random"
variants = ["raw", "chatml"]
"""
