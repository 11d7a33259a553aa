"""Numerics and processes without images or classifiers: precision, memory, signals, losses, searches."""
