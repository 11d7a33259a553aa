"""What makes training and explaining faster or smaller and changes no result: layout, compiler, recomputing.

Each is a callback for a config (``--trainer.callbacks+=cfe_lightning.compute.acceleration.ChannelsLast``) over a
function that does the same to a module by hand. None changes a name or a value in a checkpoint, so a run can be resumed
or explained with or without any of them. Mixed precision and ``micro_batches`` are other ways to the same ends and go
together with all of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cfe_lightning.compute.batch_norm import uncounted

#: Graphs that one block may need: with and without gradient, in training and not, for each of a few batch sizes.
_GRAPHS_PER_BLOCK = 16


def to_channels_last(module: nn.Module) -> None:
    """Stores the weights of all dense convolutions with the channels of a place side by side, in place.

    Tensor cores convolve half-precision maps in this layout; on a CPU it can be slower. Grouped convolutions keep
    theirs: they gain nothing, and between those of DXAI's generator, instance norms and concatenations leave maps in
    the usual layout, which each would have to convert. One that is given a map in the new layout works in it anyway.
    """
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.groups > 1:
            layer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def compile_blocks(module: nn.Module, backend: str = "inductor", *, dynamic: bool | None = None) -> None:
    """Has ``torch.compile`` make kernels for every block of a module, in place.

    Blocks, not the whole: alike blocks share one graph, so that there is less to compile (the first batch takes
    minutes all the same), and what surrounds them (search, reflection, penalties on gradients) stays plain Python.
    Passes that are differentiated twice run uncompiled (``precision.double_backward``). Dropout draws other
    numbers with "inductor".

    Args:
        module: With a method ``blocks``.
        backend: Of ``torch.compile``; "inductor" needs a C++ compiler on a CPU, and Triton on a GPU.
        dynamic: False compiles for every shape anew. None takes a second shape for a sign that any may come; as alike
            blocks count as one function, these are the sizes of their maps, and kernels are slower for it.

    Raises:
        ValueError: If the module has no blocks.
    """
    blocks = _blocks_of(module)
    # All blocks count as one function, which is no longer compiled after eight graphs.
    limits = torch._dynamo.config
    most = _GRAPHS_PER_BLOCK * len(blocks)
    limits.recompile_limit = max(limits.recompile_limit, most)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, most)
    # With several processes it would cut graphs where gradients are exchanged; a block is small enough as it is.
    limits.optimize_ddp = False
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic)


def recompute_activations(module: nn.Module) -> None:
    """Lets every block of a module forget its inner activations in training and compute them again for the gradient.

    About a third more work for a fraction of the memory; the gradient is the same.

    Args:
        module: With a method ``blocks``.

    Raises:
        ValueError: If the module has no blocks.
    """
    for block in _blocks_of(module):
        # Of arguments, not a closure: a copy of the module gets one about its own block.
        block.forward = partial(_recomputed, block, type(block).forward)


class ChannelsLast(pl.Callback):
    """``to_channels_last`` for all networks, the classifier included, and for the images of every batch."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Converts the weights."""
        to_channels_last(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Converts the images."""
        _convert(batch)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Converts the images."""
        _convert(batch)

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Converts the images."""
        _convert(batch)


class CompileBlocks(pl.Callback):
    """``compile_blocks`` while a trainer runs.

    Args:
        backend: Of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Marks the blocks; each is compiled when it is first needed."""
        # Training has few batch sizes, a search or the rest of a list of images has many.
        compile_blocks(pl_module, self.backend, dynamic=False if stage == "fit" else None)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        for block in _blocks_of(pl_module):
            block._compiled_call_impl = None


class RecomputeActivations(pl.Callback):
    """``recompute_activations`` while a trainer trains."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the first batch."""
        if stage == "fit":
            recompute_activations(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        if stage == "fit":
            for block in _blocks_of(pl_module):
                del block.forward


def _blocks_of(module: nn.Module) -> list[nn.Module]:
    blocks: list[nn.Module] = module.blocks() if hasattr(module, "blocks") else []  # type: ignore[operator]
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} names no blocks that could be compiled or recomputed: leave CompileBlocks and "
            "RecomputeActivations out, or give it a method blocks."
        )
    return blocks


def _convert(batch: dict[str, Any]) -> None:
    batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """The forward of a block whose activations are not kept; random numbers are drawn again alike."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *inputs, **named)
    if torch.compiler.is_compiling():
        # The compiler sees to it that nothing is counted twice.
        once_more = forward
    else:
        passes = itertools.count()

        def once_more(*inputs: Any, **named: Any) -> Any:
            # The same images are not seen twice.
            with nullcontext() if next(passes) == 0 else uncounted(block):
                return forward(*inputs, **named)

    return checkpoint(once_more, block, *inputs, use_reentrant=False, **named)
