"""Mirror-CFE: features mirrored at the classifier's decision boundary, then decoded."""

from cfe_lightning.methods.mirror_cfe.method import MirrorCFE

__all__ = ["MirrorCFE"]
