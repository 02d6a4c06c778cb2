"""Ingest: samples become stored sketches.

sources              add the samples of a file or dataset
run                  the ingest: units (missing samples), pipeline (model, correction, path), worker, writer
runs, distributed    the runs in the catalog; several processes
plan, verify         estimate an ingest; recompute its sketches
fit_corrections      factors of corrections: fit_resume (drafts), correction_store, saved_optimizer
import_vectors       sketches computed elsewhere: vector_formats
new_query            the sketch of a text outside the store
embeddings           vectors of sentence encoders, kept in the store
"""
