"""What an explainer has found out about its classifier, kept beside the checkpoint: made once, read ever after."""

from __future__ import annotations

import hashlib
import json
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
from cfe_lightning.files.tensors import load_plain, save_plain
from cfe_lightning.files.text import VERSION

_log = logging.getLogger(__name__)


def survey_path(checkpoint: Path) -> Path:
    """Where the survey of a checkpoint is kept."""
    return checkpoint.with_name(f"{checkpoint.stem}.survey.pt")


def provide_survey(explainer: ExplainerModule, checkpoint: Path) -> None:
    """Gives an explainer its survey: from the file beside its checkpoint, or made now and kept there.

    A survey counts only for the very checkpoint, arguments and version that it was made with.

    Args:
        explainer: On the device where it is to be made, in eval mode.
        checkpoint: The file that it came from.
    """
    if type(explainer).survey is ExplainerModule.survey:
        return
    version = VERSION
    told = json.dumps([sha256_of(checkpoint), version, dict(explainer.hparams)], sort_keys=True)
    made_from = hashlib.sha256(told.encode()).hexdigest()
    path = survey_path(checkpoint)
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
        output: Where ``atlas.json`` goes, if the explainer has an atlas; None draws none.
    """

    def __init__(self, checkpoint: Path, output: Path | None) -> None:
        self.checkpoint = checkpoint
        self.output = output

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On the explainer's device, before any image."""
        assert isinstance(pl_module, ExplainerModule), "explain.py loads nothing else"
        if trainer.is_global_zero:
            provide_survey(pl_module, self.checkpoint)
            if self.output is not None:
                _draw_atlas(pl_module, self.output)
        trainer.strategy.barrier("survey made")
        if not trainer.is_global_zero:
            provide_survey(pl_module, self.checkpoint)


def _draw_atlas(explainer: ExplainerModule, output: Path) -> None:
    if not (output / "atlas.json").is_file() and (atlas := explainer.atlas()) is not None:
        write_atlas(atlas, output)


def _adopt(explainer: ExplainerModule, path: Path, made_from: str) -> bool:
    """Takes over the survey in a file; False if there is none, it is of something else, or not what was written."""
    kept = _read(path)
    if kept.get("made_from") != made_from:
        return False
    try:
        explainer.adopt(kept["survey"])
    except (LookupError, TypeError, ValueError, AttributeError):
        return False
    return True


def _write(path: Path, content: dict[str, Any], adopted: Callable[[], bool]) -> None:
    """Keeps a survey, unless that of another process, which ``adopted`` takes over, was there first.

    Shards of one folder may make a survey at the same time, and should explain with the same one.
    """
    own = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        save_plain(own, content)
        try:
            os.link(own, path)
        except OSError:  # there is a file, which counts if it is a survey of the same, or there are no links
            if not adopted():
                own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("The survey could not be kept beside the checkpoint (%s): the next run makes it again.", error)


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, as plain data; nothing if there is none or it is no survey."""
    try:
        content = load_plain(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
