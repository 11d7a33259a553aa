"""StylEx: explains a classifier by directions of a StyleGAN2's latent that change its decisions."""

from cfe_lightning.methods.stylex.method import StylEx

__all__ = ["StylEx"]
