"""Communication between the processes of one run: ranks, means over all images, gathered rows.

With a single process every function returns the process's own values.
"""

import os
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, distributed, nn


def is_first_process() -> bool:
    """Tells whether this process writes the files of the run; works before a trainer exists, too.

    Lightning reads the rank from the environment of the launcher. Its own launcher sets no rank for the process that a
    user starts on each machine; ``NODE_RANK`` distinguishes those.
    """
    return getattr(rank_zero_only, "rank", 0) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0


def launched_processes() -> int:
    """Returns the number of processes that torchrun or srun started for this command; 1 without them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # Not SLURM_NTASKS: a command in a batch script has it even without srun.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def log_training(
    module: pl.LightningModule, terms: Mapping[str, Tensor], count: int, *, prog_bar: bool = False
) -> None:
    """Logs terms as ``train/<name>``, averaged over the processes, whose batches are equally large.

    The terms are means over the ``count`` images of a batch, [] each, with the same names in every process.
    """
    names = [f"train/{name}" for name in terms]
    values = torch.stack([value.detach().float() for value in terms.values()])
    if num_processes() > 1:
        # One exchange for all terms: Lightning's sync_dist takes one per term, each with a barrier.
        distributed.all_reduce(values)
        values = values / num_processes()
    module.log_dict(dict(zip(names, values, strict=True)), batch_size=count, prog_bar=prog_bar)


def log_validation(module: pl.LightningModule, values: Mapping[str, Tensor], count: int) -> None:
    """Logs values as ``val/<name>``, averaged over the images of all processes.

    The values are means over the ``count`` images of a batch, [] each, with the same names in every process.
    """
    # Lightning divides the sum of the processes' weights as whole numbers; a multiple of their number is exact.
    weight = count * num_processes()
    module.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=weight, sync_dist=True)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their means over the processes, in one exchange; all have gradients of the same weights."""
    if num_processes() == 1:
        return
    # One vector of gradients.
    mine = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [parameter.grad for parameter in mine if parameter.grad is not None]
    # Missing gradients are sent as zeros: messages of different lengths would block the processes for ever.
    values = [torch.zeros_like(each) if each.grad is None else each.grad for each in mine]
    count = torch.full((1,), float(len(gradients)), device=values[0].device)
    vector = torch.cat([*(value.flatten() for value in values), count])
    # Means.
    distributed.all_reduce(vector)
    *means, mean_count = vector.div_(num_processes()).split([*(each.numel() for each in mine), 1])
    # The device checks this asynchronously; reading the value here would wait for it.
    torch._assert_async(mean_count == count, "processes have gradients of other weights")
    present = [mean.view_as(each) for mean, each in zip(means, mine, strict=True) if each.grad is not None]
    torch._foreach_copy_(gradients, present)


def broadcast_buffers(module: nn.Module) -> None:
    """Copies the buffers of the first process, the running statistics of batch norms, to all others.

    A checkpoint holds those of the first process. DDP sends no buffers where optimisers are stepped by hand, or where a
    module disables it (``ddp_options``): without this every process would validate another network.
    """
    for buffer in module.buffers() if num_processes() > 1 else ():
        sent = buffer.contiguous()  # some backends require it
        distributed.broadcast(sent, 0)
        if sent is not buffer:
            buffer.copy_(sent)


def all_gather_rows(mine: Tensor) -> Tensor:
    """Gathers the rows of all processes, [n, ...] -> [N, ...], in the order of the data and without gradient.

    Process r of W holds the rows r, r + W, r + 2 W, ...; later processes may hold one row less.
    """
    if num_processes() == 1:
        return mine
    # Rows of each process.
    counts = torch.zeros(num_processes(), dtype=torch.int64, device=mine.device)
    counts[distributed.get_rank()] = len(mine)
    distributed.all_reduce(counts)
    # Equal lengths by padding.
    padded = mine.detach().new_zeros(int(counts.max()), *mine.shape[1:])
    padded[: len(mine)] = mine.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(gathered, padded)
    # One row of each process in turn; the padding ends up last.
    return torch.stack(gathered, dim=1).flatten(0, 1)[: int(counts.sum())]


def all_reduce_max(value: int, device: torch.device) -> int:
    """Returns the largest value of all processes, exchanged on ``device``; waits for them and for the device."""
    if num_processes() == 1:
        return value
    # Not Lightning's reduce, which adds a barrier.
    largest = torch.tensor(value, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest)


def num_processes() -> int:
    """Returns the number of processes that exchange tensors now; 1 before training starts."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
