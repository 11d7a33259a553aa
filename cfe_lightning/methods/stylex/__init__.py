"""StylEx: directions of a StyleGAN2 that a classifier reacts to."""

from cfe_lightning.methods.stylex.method import StylEx

__all__ = ["StylEx"]
