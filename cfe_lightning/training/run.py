"""A training run built from YAML: LightningCLI used narrowly, with the defaults of every run."""

import logging
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from cfe_lightning.classifier.check import check_classifier
from cfe_lightning.compute.processes import is_first_process, launched_processes
from cfe_lightning.data.base import ImageData
from cfe_lightning.explainer import ExplainerModule, check_precision
from cfe_lightning.files.atomic import atomic_write
from cfe_lightning.files.configs import classes_of, in_our_words, load_config
from cfe_lightning.training.checkpoints import AtomicCheckpointIO, RandomState
from cfe_lightning.training.csv_log import CsvLog
from cfe_lightning.training.last_checkpoint import LastCheckpoint
from cfe_lightning.training.resuming import Begun, check_checkpoint, load_training, not_resumable
from cfe_lightning.training.tracking import WandbRun, wandb_is_installed, wandb_must_be_offline
from cfe_lightning.training.watching import FreshMetrics, NonFiniteGuard, Throughput

log = logging.getLogger(__name__)

_WANDB = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "cfe-lightning"}}


class ConfiguredRun(LightningCLI):
    """LightningCLI without subcommands, argument links, automatic optimisers and its own checkpoint rebuilding.

    Args:
        configs: YAML files; later ones override earlier ones.
        overrides: Command-line arguments that override all files.
        folder: Folder of the run.
        checkpoint_path: Checkpoint to resume; None starts a new run.
        trusted: Further packages whose classes config and overrides may name.

    Raises:
        ValueError: If config or overrides are wrong, or the checkpoint does not fit.
    """

    def __init__(
        self,
        configs: Sequence[Path],
        overrides: Sequence[str],
        folder: Path,
        checkpoint_path: Path | None,
        trusted: Sequence[str] = (),
    ) -> None:
        # Files.
        _quiet()
        for path in configs:
            load_config(path)
        self.folder, self.checkpoint_path = folder, checkpoint_path
        self.checkpoint: dict[str, Any] = load_training(checkpoint_path) if checkpoint_path else {}
        self.continues = checkpoint_path is not None and checkpoint_path.resolve().parent == folder.resolve()

        # Classifier, method, data and trainer.
        try:
            with classes_of(trusted):
                super().__init__(
                    pl.LightningModule,
                    ImageData,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    save_config_callback=None,
                    seed_everything_default=0,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    parser_kwargs={"prog": "train.py", "exit_on_error": False, "allow_abbrev": False},
                    args=[*(argument for path in configs for argument in ("--config", str(path))), *overrides],
                    run=False,
                )
        except ArgumentError as error:
            raise ValueError(f"{in_our_words(str(error))} (--print_config shows every option)") from error
        except (ValueError, MisconfigurationException) as error:
            raise ValueError(in_our_words(str(error))) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sets the defaults of every run."""
        # Explainers may need gradients in validations; several devices enlarge the batch, so they are opt-in.
        parser.set_defaults({"trainer.inference_mode": False, "trainer.devices": 1, "trainer.logger": _WANDB})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses without Lightning's warning about arguments given as a list."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Keeps the config as the user gave it, then tells W&B the folder of the run."""
        self.config_text = self.parser.dump(self.config, skip_none=False)
        loggers = self.config.trainer.logger
        kept = []
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger"):
                if not wandb_is_installed():
                    continue
                self._prepare_wandb(logger.init_args)
            kept.append(logger)
        # Lightning takes a list of loggers, or False for none.
        self.config.trainer.logger = kept if isinstance(loggers, list) else next(iter(kept), False)

    def _prepare_wandb(self, arguments: Namespace) -> None:
        if is_first_process() and not arguments.offline and wandb_must_be_offline():
            arguments.mode = "offline"
        arguments.save_dir = str(self.folder)
        arguments.name = arguments.name or self.folder.name
        if self.continues and not arguments.id:
            arguments.id = WandbRun.run_id(self.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Adds the defaults of every run behind the config's callbacks; a listed callback replaces the default."""
        # The config's callbacks.
        given = self.config_init.trainer
        callbacks: list[Callback] = [*(given.callbacks or [])]
        if is_overridden("validation_step", self.model) and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks.append(ModelCheckpoint(monitor="val/loss", filename="best", enable_version_counter=False))
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint):
                if callback.save_last:
                    raise ValueError("ModelCheckpoint's save_last would write beside our last.ckpt: remove save_last.")
                if callback.filename and Path(callback.filename).name != callback.filename:
                    raise ValueError(
                        f"ModelCheckpoint's filename {callback.filename!r} is a path, but a name is needed: choose the "
                        "folder with dirpath."
                    )
                callback.dirpath = callback.dirpath or str(self.folder)

        # Those of every run.
        for kind in (RandomState, WandbRun, FreshMetrics, Throughput, NonFiniteGuard, LastCheckpoint):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())
        # LastCheckpoint stores the state of the others, so it comes after them.
        callbacks.sort(key=lambda callback: isinstance(callback, LastCheckpoint))

        # Loggers and checkpoint files.
        loggers = given.logger if isinstance(given.logger, list) else [given.logger]
        plugins = given.plugins if isinstance(given.plugins, list) else [given.plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        loggers = [logger for logger in loggers if logger and not isinstance(logger, bool)]
        ours: dict[str, Any] = {
            "logger": [*loggers, CsvLog(self.folder / "metrics.csv", resume=self.continues)],
            "plugins": [plugin for plugin in plugins if plugin is not None],
            "default_root_dir": str(self.folder),
        }
        trainer = super().instantiate_trainer(callbacks=[*callbacks], **ours)

        # Several processes.
        if given.strategy == "auto" and trainer.world_size > 1:
            # Without this option DDP stops at a weight that a loss leaves out; modules say if they leave none out.
            ours["strategy"] = DDPStrategy(**{"find_unused_parameters": True, **getattr(self.model, "ddp_options", {})})
            trainer = super().instantiate_trainer(callbacks=[*callbacks], **ours)
        if (launched := launched_processes()) not in (1, trainer.world_size):
            raise ValueError(
                f"torchrun or srun has started {launched} processes, but the run is configured for "
                f"{trainer.world_size}: give the processes of one machine as --trainer.devices and the machines as "
                "--trainer.num_nodes."
            )
        return trainer

    def after_instantiate_classes(self) -> None:
        """Refuses an unfit classifier or checkpoint before anything is written."""
        check_accumulation(self.model, self.trainer.accumulate_grad_batches)
        check_precision(self.model, str(self.trainer.precision))
        if self.checkpoint and ("explainer" in self.checkpoint) != isinstance(self.model, ExplainerModule):
            held = "an explainer" if "explainer" in self.checkpoint else "no explainer"
            raise ValueError(
                f"{self.checkpoint_path} is the checkpoint of {held}, but this config trains a "
                f"{type(self.model).__name__}: use the run's own config.yaml, or start a new run without --resume."
            )
        if isinstance(self.model, ExplainerModule):
            if self.model.needs_gradient:
                self.model.classifier.require_gradient()
            if self.checkpoint:
                check_checkpoint(self.model, self.checkpoint, str(self.checkpoint_path))
        self.checkpoint = {}  # as large as the trained networks, and fitting reads the file again

    def check_classifier(self) -> None:
        """Measures the classifier on validation images before hours are spent on explaining it.

        Raises:
            ValueError: If its accuracy is near chance, or its classes are not those of the data.
        """
        if not isinstance(self.model, ExplainerModule) or self.continues or not is_first_process():
            return
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        check_classifier(self.model.classifier, self.datamodule.val_dataloader(), self.datamodule.class_names)

    def fit(self) -> None:
        """Writes the config and trains; an explainer without training is saved at once.

        Raises:
            ValueError: If Lightning refuses the configuration.
        """
        # Folder.
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in [*self.folder.glob(".*.part"), *self.folder.glob("samples/.*.part")]:
                stale.unlink()  # unfinished files of a killed run
            with atomic_write(self.folder / "config.yaml") as file:
                file.write(self.config_text)

        # Checkpoints.
        if isinstance(self.model, ExplainerModule) and not self.model.needs_training:
            self.trainer.strategy.connect(self.model)
            self.trainer.save_checkpoint(self.folder / "best.ckpt")
        else:
            self.train()

    def train(self) -> None:
        """Trains from the beginning or from the checkpoint.

        Raises:
            ValueError: If Lightning refuses the configuration.
        """
        begun = Begun()
        self.trainer.callbacks.insert(0, begun)  # type: ignore[attr-defined]
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint_path, weights_only=True)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except (LookupError, TypeError, AttributeError) as error:
            if begun or self.checkpoint_path is None:
                raise
            raise ValueError(not_resumable(self.checkpoint_path, error)) from error


def check_accumulation(model: pl.LightningModule, count: int) -> None:
    """Refuses gradient accumulation by Lightning for a method that steps its optimisers by hand.

    Raises:
        ValueError: If ``count`` is above 1 for such a method.
    """
    if model.automatic_optimization or count == 1:
        return
    instead = "leave it out"
    if "micro_batches" in model.hparams:
        larger = f"a --data.batch_size {count} times as large"
        instead = f"set --model.micro_batches {count} and {larger} instead, which is the same"
    raise ValueError(
        f"accumulate_grad_batches {count} adds up gradients for one optimiser, but {type(model).__name__} steps its "
        f"own: {instead}."
    )


def _quiet() -> None:
    """Hides messages of Lightning's start-up that do not concern this run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_news)
    # A frozen classifier stays in eval mode, and the run folder holds config.yaml: both are intended.
    intended = ".*(in eval mode at the start|exists and is not empty|LeafSpec|many workers).*"
    warnings.filterwarnings("ignore", message=intended)


def _is_news(record: logging.LogRecord) -> bool:
    talk = ("\N{ELECTRIC LIGHT BULB}", "`weights_only`", "TPU", "Found current_model")
    return not record.getMessage().startswith(talk)
