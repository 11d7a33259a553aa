"""Is it still the same person, or the same thing: what follows from the cosines of ``realism.cosine``.

Source: evaluation, section 6. With embeddings of a face network the mean cosine is FS, face similarity, and the mean of
``verified`` is FVA, face verification accuracy, both as ACE reports them (Jeanneret et al. 2023); with those of SimSiam
the mean cosine is S3 (6.2).
"""

from __future__ import annotations

from torch import Tensor

#: Faces with a larger cosine are taken to be the same person's.
SAME_PERSON = 0.5


def verified(cosines: Tensor, threshold: float = SAME_PERSON) -> Tensor:
    """Whether the edit shows the same person, whose mean over images is FVA (6.1).

    Args:
        cosines: Similarity of image and edit, [B] in [-1, 1].
        threshold: What has to be exceeded.

    Returns:
        [B] bool.

    Raises:
        ValueError: If a value is no cosine, as of embeddings with infinite entries.
    """
    if not bool((cosines.abs() <= 1 + 1e-4).all()):
        raise ValueError("Cosines lie in [-1, 1], but some do not: the face network's embeddings are not finite.")
    return cosines > threshold
