"""Metrics of explanations: each file declares and computes one family, ``catalogue`` gathers them."""
