"""Faster or smaller training and explaining without other results: memory layout, compiler, recomputed activations.

Each is a callback for a config (``--trainer.callbacks+=cfe_lightning.compute.acceleration.ChannelsLast``) over a
function that changes a module by hand. None changes a name or a value in a checkpoint, so a run can be resumed or
explained with or without them. They combine with mixed precision and with ``micro_batches``.
"""

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

#: Graphs that one block may need: with and without gradient, training and not, each for a few batch sizes.
_GRAPHS_PER_BLOCK = 16


def to_channels_last(module: nn.Module) -> None:
    """Stores the weights of all dense convolutions in channels-last layout, in place.

    Tensor cores convolve half-precision maps in this layout; on a CPU it can be slower. Grouped convolutions keep the
    usual layout, because they gain nothing: in DXAI's generator, instance norms and concatenations return maps in the
    usual layout, which each of them would have to convert. They still accept maps in the new layout.
    """
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.groups > 1:
            layer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def compile_blocks(module: nn.Module, backend: str = "inductor", *, dynamic: bool | None = None) -> None:
    """Compiles every block of a module with ``torch.compile``, in place.

    Equal blocks share one graph, so there is less to compile than in the whole module; the first batch still takes
    minutes. The code around the blocks (search, reflection, penalties on gradients) stays plain Python. Passes that are
    differentiated twice run uncompiled (``precision.double_backward``). With "inductor", dropout draws other numbers.

    Args:
        module: A module with a method ``blocks``, such as every explainer.
        backend: Backend of ``torch.compile``; "inductor" needs a C++ compiler on a CPU, and Triton on a GPU.
        dynamic: False compiles for every shape anew. None takes a second shape as a sign that any may come; as equal
            blocks count as one function, maps of two sizes already give kernels for any size, which are slower.

    Raises:
        ValueError: If the module has no blocks.
    """
    blocks = _blocks_of(module)
    # All blocks count as one function, and the compiler gives up on a function after eight graphs.
    config, most = torch._dynamo.config, _GRAPHS_PER_BLOCK * len(blocks)
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    # With several processes it would cut graphs where gradients are exchanged; one block needs no cut.
    config.optimize_ddp = False
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic)


def recompute_activations(module: nn.Module) -> None:
    """Makes every block discard its inner activations in training and recompute them for the gradient.

    This costs about a third more work and saves most of the memory; the gradient is the same.

    Raises:
        ValueError: If the module has no blocks.
    """
    for block in _blocks_of(module):
        # A partial instead of a closure: a deep copy of the module then refers to its own block.
        block.forward = partial(_recomputed, block, type(block).forward)


class ChannelsLast(pl.Callback):
    """Applies ``to_channels_last`` to all networks, the classifier included, and to the images of every batch."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Converts the weights."""
        to_channels_last(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Converts the images."""
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)

    # Lightning calls all three hooks alike.
    on_validation_batch_start = on_predict_batch_start = on_train_batch_start


class CompileBlocks(pl.Callback):
    """Applies ``compile_blocks`` while a trainer runs.

    Args:
        backend: Backend of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Marks the blocks; each is compiled when it first runs."""
        # Training has few batch sizes; a search, or the end of a list of images, has many.
        compile_blocks(pl_module, self.backend, dynamic=False if stage == "fit" else None)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the uncompiled blocks."""
        for block in _blocks_of(pl_module):
            block._compiled_call_impl = None


class RecomputeActivations(pl.Callback):
    """Applies ``recompute_activations`` while a trainer trains."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replaces the forward passes of the blocks before training."""
        if stage == "fit":
            recompute_activations(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the forward passes after training."""
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


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Runs the forward pass of a block without keeping its activations; random numbers are drawn again alike."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *inputs, **named)
    if torch.compiler.is_compiling():
        # The compiler itself avoids that running statistics are updated twice.
        replayed = forward
    else:
        passes = itertools.count()

        def replayed(*inputs: Any, **named: Any) -> Any:
            # The second pass sees the same images and must not update running statistics again.
            with nullcontext() if next(passes) == 0 else uncounted(block):
                return forward(*inputs, **named)

    return checkpoint(replayed, block, *inputs, use_reentrant=False, **named)
