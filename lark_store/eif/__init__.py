"""Measured influence in the store: train on one sample, or put it in context, and store each query's change of loss.

run        `Store.eif`: its runs, one per learning rate and draw
material   the samples and queries, chosen and rendered
meter      the loss of queries before and after, with one loaded model
runs       runs in the catalog and their rows: begin or resume, commit sample by sample
sweep      the comparison of learning rates
"""
