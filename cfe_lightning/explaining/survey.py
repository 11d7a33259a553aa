"""Keeps the survey of an explainer, its findings about the classifier as a whole, in a file beside the checkpoint."""

import logging
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cfe_lightning.explainer import ExplainerModule, sha256_of
from cfe_lightning.explaining.atlas import write_atlas
from cfe_lightning.explaining.names import ATLAS
from cfe_lightning.files.tensors import load_plain, save_plain
from cfe_lightning.files.text import VERSION, digest

_log = logging.getLogger(__name__)


def survey_path(checkpoint: Path) -> Path:
    """Returns the file that keeps the survey of a checkpoint."""
    return checkpoint.with_name(f"{checkpoint.stem}.survey.pt")


def provide_survey(explainer: ExplainerModule, checkpoint: Path) -> None:
    """Gives an explainer its survey: from the file beside its checkpoint, or made now and kept there.

    A survey counts only for the very checkpoint, arguments and version that it was made with.

    Args:
        explainer: The explainer in eval mode, on the device that makes the survey.
        checkpoint: The file that the explainer came from.
    """
    if type(explainer).survey is ExplainerModule.survey:
        return
    made_from, path = digest([sha256_of(checkpoint), VERSION, dict(explainer.hparams)]), survey_path(checkpoint)
    if _adopt(explainer, path, made_from):
        return
    sys.stderr.write(
        f"{type(explainer).__name__} searches what moves the classifier as a whole, once for this checkpoint and these "
        f"settings (kept as {path.name})\n"
    )
    _write(path, {"made_from": made_from, "survey": explainer.survey()}, lambda: _adopt(explainer, path, made_from))


class SurveyFile(pl.Callback):
    """Provides the survey before the first image and draws the atlas; the first process does it, the others read.

    Args:
        checkpoint: The file that the explainer came from.
        output: Folder for ``atlas.json``, if the explainer has an atlas; None draws none.
    """

    def __init__(self, checkpoint: Path, output: Path | None) -> None:
        self.checkpoint, self.output = checkpoint, output

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Provides the survey on the explainer's device."""
        assert isinstance(pl_module, ExplainerModule), "explain.py loads nothing else"
        if trainer.is_global_zero:
            provide_survey(pl_module, self.checkpoint)
            if self.output is not None and not (self.output / ATLAS.file).is_file() and (atlas := pl_module.atlas()):
                write_atlas(atlas, self.output)
        trainer.strategy.barrier("survey made")
        if not trainer.is_global_zero:
            provide_survey(pl_module, self.checkpoint)


def _adopt(explainer: ExplainerModule, path: Path, made_from: str) -> bool:
    """Takes over the survey in a file; returns False if there is none, it is another's, or its content is malformed."""
    try:
        kept = load_plain(path)
        if kept["made_from"] != made_from:
            return False
        explainer.adopt(kept["survey"])
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        return False
    return True


def _write(path: Path, content: dict[str, Any], adopted: Callable[[], bool]) -> None:
    """Keeps a survey, unless another process was first: then ``adopted`` takes over that process's survey.

    Shards of one folder may make a survey at the same time, and should explain with the same one.
    """
    own = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        save_plain(own, content)
        try:
            os.link(own, path)
        except OSError:
            # Either there is a file, which counts if it can be adopted, or the disk has no links.
            if not adopted():
                own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("The survey could not be kept beside the checkpoint (%s): the next run makes it again.", error)
