"""Per-sample gradients: `batched` in one backward pass, `hooks` one by one, `masked`.

`layers` has the rules, and `experts` the rule of a mixture's experts. `taps` connect them with the layers, `products`
add their gradients to sketches.
"""
