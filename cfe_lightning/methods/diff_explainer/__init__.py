"""DiffExplainer: steps in the semantic code of a diffusion autoencoder."""

from cfe_lightning.methods.diff_explainer.autoencoder import DiffusionAutoencoder
from cfe_lightning.methods.diff_explainer.method import DiffExplainer

__all__ = ["DiffExplainer", "DiffusionAutoencoder"]
