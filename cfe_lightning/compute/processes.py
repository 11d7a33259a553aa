"""What the processes of one run tell each other: who is the first, means over all images, the rows of all.

Alone, a process hears itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, distributed, nn


def is_first_process() -> bool:
    """Whether this process writes what is written once; right before there is a trainer, too.

    Lightning reads the rank from the environment that launchers set. Its own launcher sets none for the process that a
    user starts on each machine: there ``NODE_RANK`` tells them apart.
    """
    return getattr(rank_zero_only, "rank", 0) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def launched_processes() -> int:
    """How many processes torchrun or srun has started for this command; 1 where neither has."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # Not SLURM_NTASKS: a batch script has it, too, and so has a command in it that is started without srun.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def log_training(
    module: pl.LightningModule, terms: Mapping[str, Tensor], count: int, *, prog_bar: bool = False
) -> None:
    """Logs ``train/<name>`` of a training step: the mean over the processes, whose batches are equally large.

    Args:
        module: Whose training step it is.
        terms: Means over the batch, [] each; the same names in every process.
        count: Images of the batch.
        prog_bar: Show them beside the progress, too.
    """
    names = [f"train/{name}" for name in terms]
    values = torch.stack([value.detach().float() for value in terms.values()])
    if num_processes() > 1:
        # One exchange for all: Lightning's sync_dist takes one, and a barrier that waits for the device, for each.
        distributed.all_reduce(values)
        values = values / num_processes()
    module.log_dict(dict(zip(names, values, strict=True)), batch_size=count, prog_bar=prog_bar)


def log_validation(module: pl.LightningModule, values: Mapping[str, Tensor], count: int) -> None:
    """Logs ``val/<name>`` of a validation step: the mean over the images of all processes.

    Args:
        module: Whose validation step it is.
        values: Means over the batch, [] each; the same names in every process.
        count: Images of the batch.
    """
    # Lightning averages the processes' numbers of images as whole numbers; a multiple leaves no remainder to be lost.
    weight = count * num_processes()
    module.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=weight, sync_dist=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients become their means over the processes, in one exchange.

    Args:
        parameters: The same in every process, with a gradient of the same ones in each.
    """
    if num_processes() == 1:
        return
    mine = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [parameter.grad for parameter in mine if parameter.grad is not None]
    # Equally long in every process whatever has a gradient, or they would wait for each other for ever.
    values = [torch.zeros_like(each) if each.grad is None else each.grad for each in mine]
    count = torch.full((1,), float(len(gradients)), device=values[0].device)
    together = torch.cat([*(value.flatten() for value in values), count])
    distributed.all_reduce(together)
    *means, mean_count = together.div_(num_processes()).split([*(each.numel() for each in mine), 1])
    # Told by the device when it comes to it: asking would wait for it.
    torch._assert_async(mean_count == count, "processes have gradients of other weights")
    present = [mean.view_as(each) for mean, each in zip(means, mine, strict=True) if each.grad is not None]
    torch._foreach_copy_(gradients, present)


def broadcast_buffers(module: nn.Module) -> None:
    """All processes hold the buffers of the first, which a checkpoint holds: the running statistics of batch norms.

    DDP does not send them where optimisers are stepped by hand, nor where a module has told it not to in every
    iteration (``ddp_options``): without this every process would measure another network.
    """
    if num_processes() > 1:
        for buffer in module.buffers():
            sent = buffer.contiguous()  # not every backend takes another layout
            distributed.broadcast(sent, 0)
            if sent is not buffer:
                buffer.copy_(sent)


def all_gather_rows(mine: Tensor) -> Tensor:
    """The rows of all processes in the order of the data, of which process r of W has every W-th row from r on.

    Args:
        mine: [n, ...], n the same or, in the later processes, one less.

    Returns:
        [N, ...], without gradient.
    """
    if num_processes() == 1:
        return mine
    counts = torch.zeros(num_processes(), dtype=torch.int64, device=mine.device)
    counts[distributed.get_rank()] = len(mine)
    distributed.all_reduce(counts)
    padded = mine.detach().new_zeros(int(counts.max()), *mine.shape[1:])
    padded[: len(mine)] = mine.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(gathered, padded)
    # In turn; what was padded comes last.
    return torch.stack(gathered, dim=1).flatten(0, 1)[: int(counts.sum())]


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest of the processes' numbers; waits for all of them, and for the device.

    Args:
        value: This process's.
        device: Where the processes exchange tensors.
    """
    if num_processes() == 1:
        return value
    # Lightning's own reduce would have all wait at a barrier before.
    told = torch.tensor(value, device=device)
    distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
    return int(told)


def num_processes() -> int:
    """How many processes exchange tensors now; 1 before training and without several."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
