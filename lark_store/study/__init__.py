"""The reference experiment on any causal model, fine-tuning set and pretraining pools, as client code of `Store`.

recipe     the TOML file, read and checked
pools      samples drawn from files: first, random, or most similar to the queries
finetune   transformers' Trainer, a checkpoint per epoch
evaluate   accuracy and macro-F1 by the likelihoods of the labels
run        all of it in order, going on where it stopped
tables     the store's answers as the tables of `results`
findings   what the numbers say, in words
figures    charts
report     one HTML file
"""
