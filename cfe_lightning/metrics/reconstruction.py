"""Faithfulness of a method's own rendering of the image, before it changes anything.

Where rendering alone changes the decision, a counterfactual explains the autoencoder and not the classifier. Images
[B, C, H, W] in [-1, 1]; a rendering may overshoot the range and is judged as it is, as in the training loop.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from cfe_lightning import images
from cfe_lightning.compute.losses import PSNR_CAP as PSNR_CAP
from cfe_lightning.compute.losses import psnr as psnr
from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.counterfactual import flipped_any
from cfe_lightning.metrics.metric import rows

#: Shortest side of an image, in pixels, that the 11 x 11 window of SSIM accepts.
SSIM_MIN_SIZE = 6

METRICS = rows(f"""
needs: reconstruction
absent: images of less than {SSIM_MIN_SIZE} pixels a side are too small for it
key         title       better  range    meaning
recon_flip  recon flip  lower   [0, 1]   share of images decided otherwise after rendering alone
psnr        PSNR        higher  dB       of the method's own rendering of the image, at most 100
ssim        SSIM        higher  [-1, 1]  of the method's own rendering of the image
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Measures the rendering of a batch, [B] by metric key."""
    rendering = case.explanation.parts["reconstruction"]
    # The classifier's decision, then the pixels.
    found = {"recon_flip": flipped_any(case.logits, case.judge(rendering)), "psnr": psnr(case.image, rendering)}
    if min(case.image.shape[-2:]) >= SSIM_MIN_SIZE:
        found["ssim"] = ssim(case.image, rendering)
    return found


def ssim(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Computes the structural similarity of each image, Gaussian window 11 x 11, sigma 1.5, [B] in [-1, 1].

    Raises:
        ValueError: If a side is shorter than ``SSIM_MIN_SIZE``.
    """
    if min(image.shape[-2:]) < SSIM_MIN_SIZE:
        raise ValueError(f"SSIM needs images of at least {SSIM_MIN_SIZE} pixels a side, got {list(image.shape[-2:])}.")
    # The declared type includes a tuple; the shape becomes [B] for any batch.
    value = structural_similarity_index_measure(
        images.to_unit(reconstruction), images.to_unit(image), data_range=1.0, reduction="none"
    )
    return torch.as_tensor(value[0] if isinstance(value, tuple) else value).reshape(len(image))
