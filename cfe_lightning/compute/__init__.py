"""Numerics and processes: precision, memory, signals, losses and searches that know neither images nor classifiers."""
