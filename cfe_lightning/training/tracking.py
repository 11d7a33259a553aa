"""Weights & Biases: one run over all resumptions, offline where there is no key or no network."""

import logging
import os
import urllib.error
import urllib.request
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

from cfe_lightning.files.text import one_line

log = logging.getLogger(__name__)
_WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


class WandbRun(pl.Callback):
    """Keeps the id of the W&B run in the checkpoint, so that a resumed training continues the same curves."""

    def __init__(self) -> None:
        self._id: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the id of the run that the logger has started."""
        self._id = next((logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)

    def state_dict(self) -> dict[str, Any]:
        """Stores the id; None without W&B."""
        return {"id": self._id}

    @staticmethod
    def run_id(checkpoint: dict[str, Any]) -> str | None:
        """Reads the id from a checkpoint."""
        return checkpoint.get("callbacks", {}).get("WandbRun", {}).get("id")


def wandb_is_installed() -> bool:
    """Tells whether W&B can be imported; warns in one line if a run has to go on without it."""
    try:
        # The name is imported, too: without the package, Python would import a folder wandb/ left by runs.
        from wandb import init  # noqa: F401
    except ImportError as error:
        log.warning("W&B cannot be used (%s): everything is logged to metrics.csv and samples/.", error)
        return False
    return True


def wandb_must_be_offline() -> bool:
    """Tells whether W&B lacks a key or a network, and warns in one line if so.

    The user's ``WANDB_MODE`` is respected, except ``online``: it is W&B's default and helps no run without a key.

    Raises:
        ValueError: If W&B refuses a setting in the environment.
    """
    # The user's mode.
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in _WANDB_MODES:
        raise ValueError(f"WANDB_MODE={mode!r} is no mode of W&B: choose from {', '.join(_WANDB_MODES)}, or unset it.")
    if mode != "online":
        return False

    # W&B's own settings.
    import wandb

    try:
        host = str(wandb.setup().settings.base_url)
    except ValueError as error:
        # Pydantic reports a headline, then setting, reason and technical remarks.
        why = " ".join(str(error).partition("\n")[2].partition("[type=")[0].split()) or str(error)
        raise ValueError(
            f"W&B refuses one of its environment variables WANDB_... ({why}): correct or unset it, or train with "
            "--trainer.logger false."
        ) from error

    # Key and network.
    try:
        if not wandb.login(prompt=False, verify=False):
            reason = "no API key is configured (WANDB_API_KEY or `wandb login`)"
        elif not _reachable(host):
            reason = f"{host} cannot be reached"
        else:
            wandb.login(prompt=False, verify=True)
            return False
    except wandb.Error as error:
        reason = one_line(error)

    # Offline.
    log.warning("W&B logs offline: %s; upload later with `wandb sync`.", reason)
    # W&B would repeat the warning at length; it reads the environment when it is set up anew.
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb.teardown()
    wandb.setup()
    return True


def _reachable(host: str, seconds: float = 5.0) -> bool:
    try:
        with urllib.request.urlopen(host, timeout=seconds):
            return True
    except OSError as error:
        # A server that answers with an error is reachable.
        return isinstance(error, urllib.error.HTTPError)
