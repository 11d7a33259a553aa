"""Fits work into memory: halves batches after an out-of-memory error, and bounds the pictures per pass."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

log = logging.getLogger(__name__)

#: Pixels per pass on a CPU: decoders were fastest with 2 pictures of 256 x 256 pixels, 8 of 128, or 32 of 64.
_PIXELS_ON_CPU = 1 << 17

Part = TypeVar("Part")
Whole = TypeVar("Whole")


class BackOff:
    """Halves the batch when memory runs out, for this batch and for all later ones.

    Every attempt starts from the seed that was set last, so that a failed attempt does not shift the random numbers of
    a method. They still depend on the size of the parts.

    Attributes:
        at_once: Largest number of images per part since memory ran out; None while it never did.
    """

    def __init__(self) -> None:
        self.at_once: int | None = None

    def in_parts(self, count: int, part: Callable[[slice], Part], join: Callable[[list[Part]], Whole]) -> Whole:
        """Joins the results of parts of a batch of ``count`` images, a single part where memory suffices.

        Raises:
            RuntimeError: If not even a single image fits; the device's own error.
        """
        while True:
            size = min(self.at_once or count, count)
            if (whole := _attempt(count, part, join, size)) is not None:
                return whole
            # Next attempt, with half the size.
            garbage_collection_cuda()
            torch.manual_seed(torch.initial_seed())
            self.at_once = (size + 1) // 2
            log.warning("Memory is too small for %d images at a time: going on with %d.", size, self.at_once)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error means that a device, or the main memory, had no room for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


def _attempt(count: int, part: Callable[[slice], Part], join: Callable[[list[Part]], Whole], size: int) -> Whole | None:
    """Computes all parts of ``size`` images; returns None if memory ran out and smaller parts are possible.

    This is a separate function because an exception being handled keeps the tensors of its frames in memory.
    """
    try:
        return join([part(slice(first, first + size)) for first in range(0, count, size)])
    except RuntimeError as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    return None


def pictures_at_once(pixels: int, device: torch.device) -> int:
    """Returns the number of pictures, of ``pixels`` each, per pass of a network: bounds memory, fits a CPU's cache."""
    return min(128, max(1, _PIXELS_ON_CPU // pixels)) if device.type == "cpu" else 128
