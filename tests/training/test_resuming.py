"""What a checkpoint may hold that a training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import FixedToyExplainer, toy_checkpoint, toy_classifier

from cfe_lightning.training.resuming import check_checkpoint, load_training

KEY = "ModelCheckpoint{'monitor': 'val/loss'}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, Any]:
    """Of a training that has not made a step."""
    toy_checkpoint(tmp_path / "toy.ckpt")
    content = torch.load(tmp_path / "toy.ckpt", weights_only=True)
    parts = {"epoch": 0, "global_step": 0, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    return parts | content


def kept(folder: str, name: str, **more: Any) -> dict[str, Any]:
    """A state of ModelCheckpoint."""
    scores = {name: torch.tensor(1.0)}
    state = {"dirpath": folder, "best_model_path": name, "best_model_score": torch.tensor(1.0)}
    return state | {"best_k_models": scores, "kth_best_model_path": name, "last_model_path": ""} | more


@pytest.mark.parametrize(
    "state",
    [
        kept("checkpoints/run", "checkpoints/run/best.ckpt"),
        kept("../runs/run", "../runs/run/best.ckpt"),
        kept("/where/it/was/before", "/where/it/was/before/best.ckpt"),
        # As Lightning leaves it in a folder that was moved, until something is better.
        kept("/now", "/before/best.ckpt", best_k_models={}, kth_best_model_path=""),
    ],
)
def test_checkpoints_of_the_run_itself_may_be_removed(
    state: dict[str, Any], checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(checkpoint | {"callbacks": {KEY: state}}, tmp_path / "last.ckpt")
    assert load_training(tmp_path / "last.ckpt")["callbacks"][KEY] == state


@pytest.mark.parametrize(
    "state",
    [
        kept("checkpoints/run", "elsewhere/best.ckpt"),
        kept("checkpoints/run", "checkpoints/run/../../thesis.ckpt"),
        kept("local:", "local:///home/me"),
        kept("checkpoints/run", "checkpoints/run/best.ckpt", kth_best_model_path="/home/me"),
        kept("checkpoints/run", "checkpoints/run/best.ckpt", last_model_path="/home/me"),
        kept("checkpoints/run", "checkpoints/run/best.ckpt", best_model_path=5),
        kept("checkpoints/run", "checkpoints/run/best.ckpt", best_k_models={"checkpoints/run/best.ckpt": "good"}),
        {key: value for key, value in kept("x", "x/best.ckpt").items() if key != "dirpath"},
    ],
)
def test_checkpoints_elsewhere_may_not(state: dict[str, Any], checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(checkpoint | {"callbacks": {KEY: state}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"no training to resume \(missing or malformed: callbacks\): give"):
        load_training(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("hyper_parameters", [1]),
        ("hyper_parameters", {1: 2}),
        ("state_dict", {1: torch.zeros(1)}),
        ("current_model_state", {"a": 1}),
        ("current_model_state", [torch.zeros(1)]),
    ],
)
def test_parts_of_another_form_are_named(part: str, value: Any, checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(checkpoint | {part: value}, tmp_path / "last.ckpt")
    named = "state_dict" if part == "current_model_state" else part
    with pytest.raises(ValueError, match=rf"malformed: {named}\): give the last.ckpt"):
        load_training(tmp_path / "last.ckpt")


def test_arguments_that_cannot_be_compared_are_other_ones(
    checkpoint: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    explainer = FixedToyExplainer(toy_classifier())
    content = checkpoint | {"hyper_parameters": dict(explainer.hparams) | {"amplitude": torch.zeros(3)}}
    check_checkpoint(explainer, content, "last.ckpt")
    assert "Resuming with other settings than the checkpoint's: amplitude tensor([0., 0., 0.]) ->" in caplog.text
