"""The file for all touches of Lightning's inner parts: each is a named function with a test of its own.

``EMA``, which extends Lightning's own callback, is the only other place.

A release of Lightning that moves one of these parts fails here and in ``tests/training/test_lightning_inside.py``.
"""

import subprocess
import traceback
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop

#: Code in which Lightning waits for batches.
_FETCHING = (_DataFetcher.__iter__.__code__, _DataFetcher.__next__.__code__)


def silence_signals(trainer: pl.Trainer) -> None:
    """Keeps Lightning from handling signals itself; call it before the trainer runs.

    Its handler of SIGTERM calls a collective at any point of a process and ends processes after different batches;
    that of SLURM requeues the job with a checkpoint that ``--resume`` does not know. Before every batch, all processes
    would exchange that handler's state and wait for the device.
    """
    connector: Any = trainer._signal_connector
    assert callable(connector.register_signal_handlers), "Lightning has moved its signal handlers"
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor), "Lightning has moved its exchange of SIGTERM"
    loop._broadcast_sigterm_tensor = lambda: None


def kill_children(trainer: pl.Trainer) -> None:
    """Kills the processes that a failing trainer has started: they could wait for it forever."""
    for child in (children := forget_children(trainer)):
        child.kill()
    for child in children:
        if isinstance(child, subprocess.Popen):
            child.wait()


def forget_children(trainer: pl.Trainer) -> list[Any]:
    """Keeps Lightning from watching the processes that the trainer has started, and returns them.

    Otherwise it kills this process as soon as one of them fails, before this one can report the reason.
    """
    launcher: Any = trainer.strategy.launcher
    if launcher is None:
        return []
    children = [*launcher.procs]
    launcher.procs.clear()  # the watching thread holds this very list, and ends when it is empty
    return children


def iteration(trainer: pl.Trainer) -> int:
    """Returns the training batches finished over all epochs; call it after a batch or before the first."""
    return trainer.fit_loop.total_batch_idx + 1


def finished_batches(trainer: pl.Trainer) -> int:
    """Returns the training batches finished over all epochs, at any time."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def is_last_batch(trainer: pl.Trainer) -> bool:
    """Tells whether the current training batch is the last one of its epoch."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def accumulates(trainer: pl.Trainer) -> bool:
    """Tells whether gradients of finished batches wait for a step; no checkpoint would hold them."""
    if trainer.validating and is_last_batch(trainer):
        return False  # Lightning steps after the last batch in any case
    processed = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return bool(processed % trainer.accumulate_grad_batches)


def forget_batch_metrics(trainer: pl.Trainer) -> None:
    """Resets all logged metrics that are not means over an epoch."""
    assert trainer._results is not None, "there are results while batches are trained on"
    for metric in trainer._results.values():
        if not metric.meta.on_epoch:
            metric.reset()


def failed_in_fetching(error: BaseException) -> bool:
    """Tells whether an exception comes from reading a batch, between two batches."""
    trace = error.__traceback__ if isinstance(error, Exception) else None
    return any(frame.f_code in _FETCHING for frame, _ in traceback.walk_tb(trace))


def count_finished_only(checkpoint: dict[str, Any], *, between: bool, validating: bool) -> None:
    """Rewrites the counters of a checkpoint so that it counts finished batches and validations only.

    Args:
        checkpoint: The checkpoint that is about to be written.
        between: The checkpoint is taken between two batches: the next batch was read, but nothing was done with it.
        validating: The checkpoint is taken before a validation.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    validated = loops["epoch_loop.val_loop.batch_progress"]
    loaders = loops["state_dict"].get("combined_loader", [])

    # Finished validations. Otherwise a run resumed in the middle of a validation has begun a batch more than it has
    # finished forever, and one resumed between two epochs does not know the length of the last validation.
    ended = validated["total"]["completed"]
    validated["total"] = dict.fromkeys(validated["total"], ended)
    validated["current"] = dict.fromkeys(validated["current"], 0)
    validated["is_last_batch"] = False

    # The batch that was only read.
    if between:
        for counts in (batches["total"], batches["current"]):
            counts.update(dict.fromkeys(("ready", "started", "processed"), counts["completed"]))
        if not validating:
            batches["is_last_batch"] = False
            for loader in loaders:
                loader["delivered"] = batches["current"]["completed"]
        else:
            # As if the run had died in the first validation batch: Lightning then validates before it goes on.
            validated["total"] |= dict.fromkeys(("ready", "started"), ended + 1)
            validated["current"] |= dict.fromkeys(("ready", "started"), 1)

    # The end of an epoch that limit_train_batches cut short: the next epoch skips none of the batches that are left.
    if batches["is_last_batch"]:
        for loader in loaders:
            loader["delivered"] = 0


def is_to_validate(checkpoint: dict[str, Any]) -> bool:
    """Tells whether a validation follows the last batch of a checkpoint; see ``count_finished_only``."""
    total = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return bool(total["started"] > total["completed"])


def leave_finished_epoch(trainer: pl.Trainer) -> None:
    """Begins the next epoch where a run with ``max_steps`` is resumed at the end of one.

    Otherwise Lightning repeats the finished epoch with no batches, which shifts the data of all later epochs by one.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        # The setter of the loop itself accepts nothing but True where there are max_steps.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]


def step_limit(trainer: pl.Trainer) -> int:
    """Returns ``max_steps`` of the training, -1 for no limit."""
    return trainer.fit_loop.max_steps


def set_step_limit(trainer: pl.Trainer, limit: int) -> None:
    """Changes ``max_steps`` of a training that has begun."""
    trainer.fit_loop.epoch_loop.max_steps = limit


def drop_minimum_length(trainer: pl.Trainer) -> None:
    """Lets a training end at any time, whatever ``min_epochs`` and ``min_steps`` say."""
    loop: Any = trainer.fit_loop
    loop.min_epochs = loop.epoch_loop.min_steps = None
