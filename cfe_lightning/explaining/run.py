"""One run of ``explain.py`` in three steps: plan what is missing, explain it, finish the output folder."""

import importlib.metadata
import logging
import os
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cfe_lightning.compute.acceleration import ChannelsLast, CompileBlocks
from cfe_lightning.compute.memory import is_out_of_memory
from cfe_lightning.compute.processes import is_first_process, launched_processes
from cfe_lightning.data.patient_table import find_patients
from cfe_lightning.data.stream import ImageStream, source_of
from cfe_lightning.explainer import ExplainerModule, sha256_of
from cfe_lightning.explaining.folder import OutputFolder, Shard
from cfe_lightning.explaining.options import ExplainOptions
from cfe_lightning.explaining.overview import write_overview
from cfe_lightning.explaining.survey import SurveyFile
from cfe_lightning.explaining.writer import ExplanationWriter
from cfe_lightning.files.text import VERSION
from cfe_lightning.files.trust import public_path
from cfe_lightning.images import find_images
from cfe_lightning.images.medical import check_window, is_slice

#: Warnings of libraries about their own internals, on which a user of this command cannot act.
_UNHELPFUL_WARNINGS = (
    ".*(does not have many workers|available but not used|does not have a deterministic implementation|"
    "Couldn't infer the batch indices|LeafSpec).*"
)


class ExplainRun:
    """Explains the images of a folder that its output folder does not hold yet.

    Args:
        options: Checked options of the command.
        explainer: The method that explains.

    Attributes:
        output: The output folder, as this run or shard sees it.
        names: The images of this run or shard, known to the first process.
        is_first: True in the process that plans and finishes.

    Raises:
        ValueError: If the target is not a class, or the processes started do not fit the options.
    """

    def __init__(self, options: ExplainOptions, explainer: ExplainerModule) -> None:
        self.options, self.explainer = options, explainer
        self._started = time.perf_counter()
        self._target = _class_number(options.target, explainer.classifier.class_names)
        self.shard = None if options.shard is None else Shard(*options.shard)
        self.output = OutputFolder(options.output, self.shard)
        self.names: list[str] = []
        self._batches: list[list[str]] = []

        # Processes with a shard each do not know one another, no matter how they were started.
        launched = launched_processes()
        alone = self.shard is not None and (launched > 1 or options.devices == 1)
        self._machines = 1 if alone else _machines(options.devices, launched)
        own = alone and options.devices == 1
        self._devices = _own_device(options.accelerator) if own else options.devices
        self.is_first = alone or is_first_process()

    def plan(self) -> None:
        """Prepares the output folder and finds the batches to be explained; only the first process does.

        Raises:
            ValueError: If the input holds nothing, or the output folder cannot be continued.
        """
        if not self.is_first:
            return  # ImageStream hands the list of the first process to the others
        options, single = self.options, self.explainer.num_slices == 1
        found = find_images(options.input, is_slice) if single else find_patients(options.input)
        self.names = list(islice(found, options.limit))
        if not self.names:
            kind = "image" if single else "folder of slices"
            raise ValueError(f"There is no {kind} below {options.input}: give a folder that holds some.")
        self.output.prepare(_identity(options, self.explainer), options.overwrite)
        if self.shard is not None:
            own = self.shard.own(_in_batches(self.names, options.batch_size))
            self.names = [name for batch in own for name in batch]
        self._batches = self._missing()

    def _missing(self) -> list[list[str]]:
        """Batches images without a row or changed since, then images that failed before.

        An interrupted run leaves whole batches behind, so the same images meet again and give the same numbers.
        """
        recorded = {row.name: (row.status, row.source) for row in self.output.rows()}
        new, failed = list[str](), list[str]()
        for name in self.names:
            status, source = recorded.get(name, ("missing", None))
            if source != source_of(self.options.input / name):
                new.append(name)
            elif status == "failed":
                failed.append(name)
        return [batch for group in (new, failed) for batch in _in_batches(group, self.options.batch_size)]

    def explain(self) -> None:
        """Explains the planned batches; every process writes its own rows.

        Raises:
            ValueError: If Lightning refuses the options, or not even one image fits into memory.
        """
        # Images.
        options, explainer = self.options, self.explainer
        stream = ImageStream(
            folder=options.input,
            batches=self._batches,
            image_size=explainer.image_size,
            channels=explainer.channels,
            target=self._target,
            num_slices=explainer.num_slices,
            window=check_window(options.window),
            num_workers=options.num_workers,
        )

        # Warnings.
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=_UNHELPFUL_WARNINGS)

        # Explanations.
        try:
            self._trainer().predict(explainer, datamodule=stream, return_predictions=False)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except RuntimeError as error:
            if not is_out_of_memory(error) or 1 not in (options.batch_size, explainer.back_off.at_once):
                raise
            raise ValueError(
                "The device ran out of memory with a single image: the same command with --precision bf16-mixed, "
                "--accelerator cpu or on a larger device does the rest."
            ) from error

    def _trainer(self) -> pl.Trainer:
        single = isinstance(self._devices, list) or self._devices * self._machines == 1
        return pl.Trainer(
            accelerator=self.options.accelerator,
            devices=self._devices,
            num_nodes=self._machines,
            # A process that has finished waits for the slowest, however long that takes.
            strategy="auto" if single else DDPStrategy(timeout=timedelta(days=7)),
            precision=self.options.precision,  # type: ignore[arg-type]
            inference_mode=False,
            deterministic="warn",
            callbacks=self._callbacks(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def _callbacks(self) -> list[pl.Callback]:
        options, callbacks = self.options, list[pl.Callback]()
        if options.checkpoint is not None:
            # One shard draws the atlas for all.
            draws = self.shard is None or self.shard.number == 1
            callbacks.append(SurveyFile(options.checkpoint, self.output.path if draws else None))
        mine = sum(map(len, self._batches[:: options.devices * self._machines]))
        callbacks.append(ExplanationWriter(self.output, num_images=mine, animation=options.animation))
        callbacks += [ChannelsLast()] if options.channels_last else []
        callbacks += [CompileBlocks()] if options.compile else []
        return callbacks

    def finish(self) -> dict[str, Any]:
        """Merges all rows, writes table, overview and summary, and returns the summary."""
        options, explainer, output = self.options, self.explainer, self.output
        output.merge()
        output.write_table()
        write_overview(output, num_slices=explainer.num_slices)
        # Facts of the run.
        return output.write_summary(
            n_planned=len(self.names),
            **{"checkpoint" if options.checkpoint else "classifier": str(options.checkpoint or options.classifier)},
            classifier_fingerprint=explainer.classifier.fingerprint(),
            caution=explainer.caution,
            image_size=explainer.image_size,
            versions={name: importlib.metadata.version(name) for name in ("torch", "torchvision", "lightning")},
            batch_size=options.batch_size,
            device=str(explainer.device),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - self._started, 1),
        )

    def counts(self) -> tuple[int, int]:
        """Returns how many images of this run or shard were explained, and how many failed."""
        mine = set(self.names)
        status = {row.name: row.status for row in self.output.rows() if row.name in mine}
        failed = sum(one == "failed" for one in status.values())
        return len(status) - failed, failed


def _class_number(name: str | None, class_names: Sequence[str]) -> int | None:
    if name is not None and name not in class_names:
        raise ValueError(f"--target {name!r} is not a class of this classifier: choose from {', '.join(class_names)}.")
    return None if name is None else class_names.index(name)


def _in_batches(names: list[str], size: int) -> list[list[str]]:
    return [names[first : first + size] for first in range(0, len(names), size)]


def _identity(options: ExplainOptions, explainer: ExplainerModule) -> dict[str, Any]:
    """Names everything that two runs must share to fill one folder; batch size and devices may differ."""
    # The explainer's weights.
    if options.checkpoint is not None:
        made_from = {"checkpoint_sha256": sha256_of(options.checkpoint)}
    else:
        made_from = {"classifier_sha256": explainer.classifier.fingerprint(), "untrained": str(options.method)}
    return {
        **made_from,
        "method": public_path(type(explainer)),
        "version": VERSION,
        "classes": list(explainer.classifier.class_names),
        **({"num_slices": explainer.num_slices} if explainer.num_slices > 1 else {}),
        "input": str(options.input.resolve()),
        "target": options.target,
        "window": options.window,
        "set": dict(options.changes) or None,
        "precision": options.precision,
        "animation": options.animation,
    }


def _machines(devices: int, launched: int) -> int:
    """Returns the number of machines of the processes that torchrun or srun has started, ``devices`` on each."""
    if launched > 1 and launched % devices:
        raise ValueError(
            f"torchrun or srun has started {launched} processes, but --devices is {devices}: give as --devices the "
            "processes of one machine."
        )
    if launched == 1 and (machine := os.environ.get("NODE_RANK", "0")) != "0":
        raise ValueError(
            f"NODE_RANK is {machine}, but machines that torchrun or srun has not started cannot share the images: give "
            "each a --shard of its own, or unset NODE_RANK."
        )
    return max(launched // devices, 1)


def _own_device(accelerator: str) -> int | list[int]:
    """Returns the trainer's ``devices`` for one shard: shards started on the same machine take a GPU each."""
    place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    num_gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu") else 0
    return 1 if place is None or num_gpus < 2 else [int(place) % num_gpus]
