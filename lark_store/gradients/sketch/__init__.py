"""Sketches: `oporp` is the map, `layout` a sketcher's parameters, `kernels` the arithmetic per device."""
