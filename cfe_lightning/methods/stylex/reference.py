"""The latents of validation images from which directions are searched; kept in the checkpoint, which then suffices.

Shapes: n images, D entries of the latent (or L x D in the space "w+"), K classes, H, W pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Largest number of images whose known cause is kept for the atlas.
_MASKED = 64


class Reference(nn.Module):
    """Latents, logits and known causes of validation images, as buffers.

    Args:
        size: Largest number of images.
        latent: Shape of one latent.
        num_classes: Number of classes, K.
        image_size: Side of the images in pixels.
    """

    latents: Tensor
    logits: Tensor
    masks: Tensor
    count: Tensor

    def __init__(self, size: int, latent: Sequence[int], num_classes: int, image_size: int) -> None:
        super().__init__()
        self.register_buffer("latents", torch.zeros(size, *latent))
        self.register_buffer("logits", torch.zeros(size, num_classes))
        self.register_buffer("masks", torch.zeros(min(_MASKED, size), image_size, image_size, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._collected: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def collect(self, latent: Tensor, logits: Tensor, mask: Tensor | None) -> None:
        """Collects a batch: latents, logits [B, K] and, where the cause is known, masks [B, 1, H, W]."""
        self._collected.append((latent, logits, None if mask is None else mask[:, 0] > 0))

    def keep(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Replaces the buffers by the collected batches; ``gather`` joins tensors [n, ...] of all processes by rows."""
        # Latents and logits.
        latent = gather(torch.cat([entry[0] for entry in self._collected]))
        logits = gather(torch.cat([entry[1] for entry in self._collected]))
        count = min(len(latent), len(self.latents))
        self.count.fill_(count)
        self.latents[:count], self.logits[:count] = latent[:count], logits[:count]
        masks = [mask for _, _, mask in self._collected if mask is not None]
        self._collected.clear()
        # The data may know no cause.
        if masks:
            known = gather(torch.cat(masks))[: len(self.masks)]
            self.masks[: len(known)] = known


def first_of_each_class(predicted: Tensor, count: int) -> Tensor:
    """Returns the places of the first ``count`` images of every predicted class, in order, [n] -> [m]."""
    # The rank of an image is its place among those of its class.
    rank = F.one_hot(predicted).cumsum(0).gather(1, predicted[:, None]).squeeze(1)
    return (rank <= count).nonzero().squeeze(1)
