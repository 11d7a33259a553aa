"""Explains and judges as many images at a time as memory allows, and remembers how many those were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

log = logging.getLogger(__name__)

#: Pixels that a network renders per pass on a CPU: decoders were fastest with 2 pictures of 256 x 256, 8 of 128, 32 of
#: 64.
_PIXELS_ON_CPU = 1 << 17

Part = TypeVar("Part")
Whole = TypeVar("Whole")


class BackOff:
    """Halves the batch where memory runs out, for this batch and for all that follow.

    Every attempt starts from the seed that was set last, so that a method with random numbers is not moved by what an
    attempt in vain has drawn; its numbers depend on the size of the parts all the same.

    Attributes:
        at_once: Images at a time since memory ran out; None while it never did.
    """

    def __init__(self) -> None:
        self.at_once: int | None = None

    def in_parts(self, count: int, part: Callable[[slice], Part], join: Callable[[list[Part]], Whole]) -> Whole:
        """What is made of a batch, in parts if need be.

        Args:
            count: Images of the batch.
            part: Makes it of some of them.
            join: Makes one of the parts, of which there may be one.

        Raises:
            RuntimeError: As the device raises it, if not even a single image fits.
        """
        while True:
            size = min(self.at_once or count, count)
            whole = _attempt(count, part, join, size)
            if whole is not None:
                return whole
            garbage_collection_cuda()
            torch.manual_seed(torch.initial_seed())
            self.at_once = (size + 1) // 2
            log.warning("Memory is too small for %d images at a time: going on with %d.", size, self.at_once)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the main memory, had no room left for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


def _attempt(count: int, part: Callable[[slice], Part], join: Callable[[list[Part]], Whole], size: int) -> Whole | None:
    """The whole in parts of ``size`` images; None where memory ran out and smaller parts are possible.

    A function of its own: an exception that is being handled keeps alive what had filled the memory.
    """
    try:
        return join([part(slice(first, first + size)) for first in range(0, count, size)])
    except RuntimeError as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    return None


def pictures_at_once(pixels: int, device: torch.device) -> int:
    """How many pictures a network is given at a time: bounds the memory, and on a CPU what has to fit its cache.

    Args:
        pixels: Of one picture.
        device: Where they are.
    """
    return min(128, max(1, _PIXELS_ON_CPU // pixels)) if device.type == "cpu" else 128
