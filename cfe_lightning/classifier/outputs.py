"""Reads the logits out of the answers of networks: tensors of any usual shape, dictionaries, tuples, model outputs."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cfe_lightning.compute.precision import to_float32

#: Meaning of a network's outputs.
Outputs = Literal["logits", "probabilities"]

#: Name under which libraries return the logits among other results.
_NAME = "logits"


def logits_of(answer: Any, batch_size: int, num_classes: int | None = None) -> Tensor:
    """Returns the outputs for a batch as a matrix, [B, N] float32.

    A tensor [B, N], [B, N, 1, 1], [B] or [], which ``squeeze`` makes of a single image, is a matrix by itself. Out of a
    dictionary, tuple or model output, the entry called ``logits`` is taken, else the first tensor of K numbers per
    image, else the first of a single number, else the first of one row per image.

    Args:
        answer: Anything that the network returned.
        batch_size: Number of images that went in, B.
        num_classes: Number of class names, K, by which to choose among several tensors; None takes the first.

    Raises:
        ValueError: If the answer holds no such tensor.
    """
    found = [tensor for tensor in _tensors(answer) if _is_rows(tensor, batch_size)]
    if not found:
        raise ValueError(f"logits [B, K] are needed, but {batch_size} images gave {_described(answer)}")
    rows = [tensor.reshape(batch_size, -1) for tensor in found]
    fitting = [row for wanted in (num_classes, 1) for row in rows if row.shape[1] == wanted]
    return to_float32((fitting or rows)[0])


def logits_of_probabilities(probabilities: Tensor, exclusive: bool) -> Tensor:
    """Returns the logits of probabilities [B, N], with which softmax (if ``exclusive``) or sigmoid gives them back.

    Probabilities that were rounded to 0 or 1 become the smallest or largest number that single precision tells apart.
    """
    tiny = torch.finfo(torch.float32).tiny
    logits = probabilities.clamp_min(tiny).log()
    # The complement is exact in float64 only.
    return logits if exclusive else (logits - (1 - probabilities.double()).clamp_min(tiny).log()).float()


def _tensors(answer: Any) -> Iterator[Tensor]:
    """Yields the tensors of an answer, or only the one called ``logits``."""
    if is_dataclass(answer) and not isinstance(answer, type | Mapping):
        answer = {field.name: getattr(answer, field.name) for field in fields(answer)}
    if hasattr(answer, "_asdict"):
        answer = answer._asdict()
    if isinstance(answer, Mapping):
        answer = [answer[_NAME]] if _NAME in answer else list(answer.values())
    yield from (one for one in (answer if isinstance(answer, list | tuple) else [answer]) if isinstance(one, Tensor))


def _is_rows(tensor: Tensor, batch_size: int) -> bool:
    """Tells whether a tensor holds one row of numbers for each image, whatever ``squeeze`` has left of its shape."""
    wide = sum(size > 1 for size in tensor.shape[1:])
    if tensor.is_floating_point() and tensor.ndim >= 1 and len(tensor) == batch_size and wide <= 1:
        return True
    # A single image may have lost its dimension.
    return tensor.is_floating_point() and batch_size == 1 and tensor.numel() == max(tensor.shape, default=1)


def _described(answer: Any) -> str:
    kind = type(answer).__name__
    if isinstance(answer, Tensor):
        return f"{list(answer.shape)} of {answer.dtype}".replace("torch.", "")
    held = [f"{list(tensor.shape)}" for tensor in _tensors(answer)]
    return f"a {kind} of {', '.join(held)}" if held else f"a {kind} without a tensor"
