"""Sketches → answers.

select     what is searched
methods    how it is scored, and their registry
scoring    the products and searches
nulls      references of p-values, and their registry
answers    one module per command
plots      charts of answers, and their registry
sql        SQL over all of it
"""
