"""Steerable Lens: the classifier's gradient as phase shifts of a steerable pyramid."""

from cfe_lightning.methods.steerable_lens.method import SteerableLens

__all__ = ["SteerableLens"]
