"""Explains as many images at a time as memory allows, and remembers how many those were."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from cfe_lightning.explanation import Explanation

log = logging.getLogger(__name__)

Explain = Callable[[Tensor, Tensor | None], Explanation]


class BackOff:
    """Halves the batch where memory runs out, for this batch and for all that follow.

    Every attempt starts from the seed that was set last, so that a method with random numbers is not moved by what an
    attempt in vain has drawn; its numbers depend on the size of the parts all the same.

    Attributes:
        at_once: Images at a time since memory ran out; None while it never did.
    """

    def __init__(self) -> None:
        self.at_once: int | None = None

    def __call__(self, explain: Explain, image: Tensor, target: Tensor | None) -> Explanation:
        """``explain(image, target)``, in parts if need be.

        Raises:
            RuntimeError: As the device raises it, if not even a single image fits.
        """
        while True:
            size = min(self.at_once or len(image), len(image))
            explanation = _attempt(explain, image, target, size)
            if explanation is not None:
                return explanation
            garbage_collection_cuda()
            torch.manual_seed(torch.initial_seed())
            self.at_once = (size + 1) // 2
            log.warning("Memory is too small for %d images at a time: going on with %d.", size, self.at_once)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the main memory, had no room left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


def _attempt(explain: Explain, image: Tensor, target: Tensor | None, size: int) -> Explanation | None:
    """The explanation in parts of ``size`` images; None where memory ran out and smaller parts are possible.

    A function of its own: an exception that is being handled keeps alive what had filled the memory.
    """
    images = image.split(size)
    targets = [None] * len(images) if target is None else target.split(size)
    try:
        return Explanation.joined([explain(*part) for part in zip(images, targets, strict=True)])
    except RuntimeError as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    return None
