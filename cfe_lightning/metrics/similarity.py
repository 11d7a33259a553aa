"""Similarity of image and edit in the eyes of a network: identity and perceptual distance.

FS and FVA are of ACE (arXiv 2303.09962), from embeddings of a face network; S3 is the same cosine in SimSiam (arXiv
2011.10566). ``lpips_f`` is built like LPIPS (arXiv 1801.03924) on the explained classifier's maps, without learned
weights, and is not comparable with published LPIPS.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.metric import rows

#: Cosine above which two faces are taken to be the same person's.
SAME_PERSON = 0.5

IDENTITY = rows("""
needs: counterfactual
key  better  range    needs    published  meaning
fva  higher  [0, 1]   face     flipped
    share of faces that a face network still takes for the same person (similarity above 0.5)
fs   higher  [-1, 1]  face     flipped    cosine in a face network
s3   higher  [-1, 1]  simsiam  correct    cosine in SimSiam
""")
PERCEPTION = rows("""
needs: counterfactual
key      better   range    needs     meaning
lpips    lower    [0, ~1]  lpips     published perceptual distance
sim_f    neither  [-1, 1]  features  cosine of the classifier's features before and after, which are meant to move
lpips_f  lower    [0, 4]   stages    distance of the classifier's maps; not comparable with published LPIPS
""")


def measure_identity(case: Case) -> dict[str, Tensor]:
    """Compares embeddings of the images of a batch and of their edits, [B] by metric key."""
    # Networks from files.
    found, face, simsiam = {}, case.instruments.face, case.instruments.simsiam
    if face is not None:
        found["fs"] = cosine(face(case.image), face(case.shown))
        found["fva"] = verified(found["fs"])
    if simsiam is not None:
        found["s3"] = cosine(simsiam(case.image), simsiam(case.shown))
    return found


def measure_perception(case: Case) -> dict[str, Tensor]:
    """Measures perceptual distances between the images of a batch and their edits, [B] by metric key."""
    # The published distance, then stand-ins from the judge.
    found, lpips = {}, case.instruments.lpips
    if lpips is not None:
        found["lpips"] = lpips(case.image, case.shown)
    if "f" in case.embedded:
        found["sim_f"] = cosine(*case.embedded["f"])
    if case.stages:
        found["lpips_f"] = lpips_f(case, case.shown)
    return found


def lpips_f(case: Case, edited: Tensor) -> Tensor:
    """Measures the distance of edits from the images of a batch in the judge's maps, [B]."""
    return feature_distance(case.maps, case.judge.maps(edited, case.stages)[0])


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Computes the similarity of two embeddings of the same images, [B, D] twice -> [B] in [-1, 1]."""
    return F.cosine_similarity(one.double(), other.double(), dim=1).float()


def verified(cosines: Tensor, threshold: float = SAME_PERSON) -> Tensor:
    """Tells whether cosines [B] of image and edit exceed ``threshold``, [B] bool; the mean over faces is FVA.

    Raises:
        ValueError: If a value is no cosine, such as those of embeddings with infinite entries.
    """
    if not bool((cosines.abs() <= 1 + 1e-4).all()):
        raise ValueError("Cosines lie in [-1, 1], but some do not: the face network's embeddings are not finite.")
    return cosines > threshold


def feature_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Sums squared distances of unit-length features over channels; mean over places, then over stages, [B].

    ``one`` and ``other`` are outputs of the same stages for two batches of images, each [B, C_i, H_i, W_i].
    """
    # Unit length makes the distance blind to the brightness of a map.
    stages = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).flatten(1).mean(dim=1)
        for a, b in zip(one, other, strict=True)
    ]
    return torch.stack(stages).mean(dim=0)
