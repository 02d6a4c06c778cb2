"""Statistics: pure functions of arrays and frames, independent of a store.

bootstrap        figures over queries with intervals and paired tests
significance     p-values, q-values and the noise of sketching
metrics          the paper's metrics over source influences
sketch_error     how far a figure moves with the seed of the sketcher
running_top_k    the best scores of a stream
"""
