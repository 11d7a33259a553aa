"""What an explainer has found out about its classifier, kept beside the checkpoint: made once, read ever after."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from cfe_lightning.atlas import write_atlas
from cfe_lightning.explainer import ExplainerModule

_log = logging.getLogger(__name__)


def survey_path(checkpoint: Path) -> Path:
    """Where the survey of a checkpoint is kept."""
    return checkpoint.with_name(f"{checkpoint.stem}.survey.pt")


class SurveyFile(pl.Callback):
    """Gives an explainer its survey before the first image, from the file or by making it, and draws the atlas.

    The first process does it; the others read what it wrote. A survey counts only for the very checkpoint, arguments
    and version that it was made with.

    Args:
        checkpoint: The file that the explainer came from.
        sha256: Of that file.
        output: Where ``atlas.json`` goes, if the explainer has an atlas.
    """

    def __init__(self, checkpoint: Path, sha256: str, output: Path) -> None:
        self.path = survey_path(checkpoint)
        self.sha256 = sha256
        self.output = output

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On the explainer's device, before any image."""
        assert isinstance(pl_module, ExplainerModule), "explain.py loads nothing else"
        if trainer.is_global_zero:
            self._provide(pl_module)
            if not (self.output / "atlas.json").is_file() and (atlas := pl_module.atlas()) is not None:
                write_atlas(atlas, self.output)
        trainer.strategy.barrier("survey made")
        if not trainer.is_global_zero:
            self._provide(pl_module)

    def _provide(self, explainer: ExplainerModule) -> None:
        made_from = self._made_from(explainer)
        kept = _read(self.path)
        if kept.get("made_from") == made_from:
            explainer.adopt(kept["survey"])
            return
        survey = explainer.survey()
        if survey is not None:
            self._write({"made_from": made_from, "survey": survey})

    def _made_from(self, explainer: ExplainerModule) -> str:
        version = importlib.metadata.version("cfe-lightning")
        told = json.dumps([self.sha256, version, dict(explainer.hparams)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            torch.save(content, temporary)
            temporary.replace(self.path)
        except OSError as error:
            _log.warning("The survey could not be kept beside the checkpoint (%s): the next run makes it again.", error)


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, as plain data; nothing if there is none or it is no survey."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return {}
    return content if isinstance(content, dict) else {}
