"""Tensors in, tensors out: knows neither Lightning nor classifiers."""
