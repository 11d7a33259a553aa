"""Checks a checkpoint before a training is resumed from it."""

import logging
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from cfe_lightning.explainer import ExplainerModule, has_names, load_checkpoint
from cfe_lightning.files.trust import present_path, public_path

log = logging.getLogger(__name__)

#: Keys under which ModelCheckpoint stores the files that it has written and removes later.
_KEPT_FILES = frozenset({"best_k_models", "kth_best_model_path", "last_model_path"})
#: Parts of a checkpoint that a resumed training needs.
_PARTS = {"state_dict": dict, "epoch": int, "global_step": int, "loops": dict, "callbacks": dict}
_PARTS |= {"optimizer_states": list, "lr_schedulers": list}


class Begun(pl.Callback):
    """Becomes true at the first batch; failures before it come from the checkpoint."""

    def __init__(self) -> None:
        self._begun = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Notes that everything has been restored."""
        self._begun = True

    def __bool__(self) -> bool:
        return self._begun


def load_training(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that a training can be resumed from.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or lacks parts that a training needs.
    """
    checkpoint = load_checkpoint(path)
    wrong = [name for name, kind in _PARTS.items() if not isinstance(checkpoint.get(name), kind)]
    wrong = wrong or [name for name, right in _contents(checkpoint).items() if not right]
    if wrong:
        raise ValueError(
            f"{path} holds no training to resume (missing or malformed: {', '.join(wrong)}): give the "
            "last.ckpt that train.py wrote."
        )
    return checkpoint


def _contents(checkpoint: dict[str, Any]) -> dict[str, bool]:
    """Tells for each part of a checkpoint whether its content is as expected."""
    # The parts.
    explainer = checkpoint.get("explainer", {"class_path": ""})
    weights = [checkpoint["state_dict"], checkpoint.get("current_model_state") or {}]
    fit_loop = checkpoint["loops"].get("fit_loop")
    states = checkpoint["optimizer_states"]
    begun = checkpoint["global_step"] > 0

    # Their content.
    return {
        "explainer": isinstance(explainer, dict) and isinstance(explainer.get("class_path"), str),
        "state_dict": all(has_names(state) and _are_tensors(state) for state in weights),
        "hyper_parameters": has_names(checkpoint.get("hyper_parameters", {})),
        "epoch": checkpoint["epoch"] >= 0,
        "global_step": checkpoint["global_step"] >= 0,
        "loops": not begun or (isinstance(fit_loop, dict) and "epoch_progress" in fit_loop),
        "callbacks": all(
            isinstance(state, dict) and (_KEPT_FILES.isdisjoint(state) or _names_own_files(state))
            for state in checkpoint["callbacks"].values()
        ),
        "optimizer_states": bool(states or not begun)
        and all(isinstance(state, dict) and {"state", "param_groups"} <= state.keys() for state in states),
    }


def _names_own_files(state: dict[str, Any]) -> bool:
    """Tells whether all files that ModelCheckpoint may remove lie in its own folder.

    In a moved run they lie in the earlier folder, and Lightning forgets all but ``best_model_path``, which may
    therefore lie anywhere; ``AtomicCheckpointIO`` removes nothing there.
    """
    folder, scores = state.get("dirpath"), state.get("best_k_models", {})
    if not (isinstance(folder, str) and isinstance(state.get("best_model_path"), str) and has_names(scores)):
        return False
    paths = [*scores, state.get("kth_best_model_path", ""), state.get("last_model_path", "")]
    own = (isinstance(path, str) and (path == "" or _is_below(path, folder)) for path in paths)
    return _are_tensors(scores) and all(own)


def _are_tensors(state: dict[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in state.values())


def _is_below(path: str, folder: str) -> bool:
    below = "://" not in path and PurePath(path).is_relative_to(folder)
    return below and ".." not in PurePath(path).relative_to(folder).parts


def not_resumable(path: Path, error: Exception) -> str:
    """Returns the sentence about a checkpoint at which Lightning fails before the first batch."""
    return (
        f"{path} cannot be resumed, a part of it is not what train.py wrote ({type(error).__name__}: {error}): give "
        "the run's own last.ckpt, or start a new run without --resume."
    )


def check_checkpoint(explainer: ExplainerModule, checkpoint: dict[str, Any], path: str) -> None:
    """Refuses to resume another method or architecture, and warns about other changed settings.

    Args:
        explainer: Explainer to be trained.
        checkpoint: Explainer checkpoint, as ``load_training`` returns it.
        path: Path of the checkpoint, for messages.

    Raises:
        ValueError: If the checkpoint is of another method, or its weights do not fit.
    """
    # Method.
    made_by, trained = present_path(checkpoint["explainer"]["class_path"]), public_path(type(explainer))
    if made_by != trained:
        raise ValueError(
            f"{path} is a checkpoint of {made_by:.200}, but this config trains {trained}: "
            "use the run's own config.yaml, or start a new run without --resume."
        )

    # Weights.
    weights = (checkpoint.get("current_model_state") or checkpoint["state_dict"], explainer.state_dict())
    theirs, ours = ({(name, value.shape) for name, value in state.items()} for state in weights)
    if differing := {name for name, _ in theirs ^ ours}:
        raise ValueError(
            f"{path} cannot be resumed with this config: {len(differing)} weights differ in name or shape, for example "
            f"{min(differing)}; use the run's own config.yaml, or start a new run without --resume."
        )

    # Settings.
    before, now = checkpoint.get("hyper_parameters", {}), dict(explainer.hparams)
    changes = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if _differ(before.get(name), now[name])]
    if changes:
        log.warning("Resuming with other settings than the checkpoint's: %s.", ", ".join(changes))


def _differ(before: Any, now: Any) -> bool:
    """Tells whether a value of a file differs from ours; it may be of any kind, also one that cannot be compared."""
    try:
        return bool(before != now)
    except (TypeError, ValueError, RuntimeError):
        return True
