"""Loss → gradient → sketch.

paths          how per-sample gradients are taken: in a batch, by hooks, masked; and the rules for layers
corrections    rescaled gradients: one module per correction, and their registry
sketch         the OPORP map, a model's layout, and the kernels
"""
