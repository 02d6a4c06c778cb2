"""Scores: products of sketches, and the searches built on them.

products           stream sketches and multiply them with the queries'
search             every row's score for a block of queries, by any method
groups             scores of groups of rows
geometry           whitened and centred scores
bm25               the lexical baseline
ann, ann_index     approximate search, and its measured index
prefilter          the samples nearest to the queries, as candidates of an ingest
"""
