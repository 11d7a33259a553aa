"""Sample grids: what they show, and that a run is the same with and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitted import History, fit
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from toy import FixedToyExplainer, ToyExplainer, toy_classifier, toy_images

from cfe_lightning.explanation import Explanation
from cfe_lightning.training import (
    EMA,
    SampleGrid,
    samples,
)
from cfe_lightning.training.samples import draw_samples

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


class Restless(ToyExplainer):
    """Draws random numbers and looks at its mode whenever it explains."""

    def explain(self, image: torch.Tensor, target: torch.Tensor | None = None) -> Explanation:
        torch.rand(3)
        self.modes = {*getattr(self, "modes", ()), self.training}
        return super().explain(image, target)


def test_a_run_with_sample_grids_is_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    def run(*added: pl.Callback) -> tuple[Restless, History]:
        history = History()
        explainer = fit(tmp_path, *added, history, build=lambda: Restless(toy_classifier()), max_epochs=2)
        assert isinstance(explainer, Restless)
        return explainer, history

    _, plain = run(EMA(0.9))
    explainer, drawn = run(EMA(0.9), SampleGrid(every_n_batches=3, num_images=2))
    for one, other in zip(plain.weights, drawn.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert explainer.modes == {True, False}
    # Before the first batch and after every third of 8.
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "00000000.png",
        "00000003.png",
        "00000006.png",
    ]


def test_layers_keep_their_own_mode(tmp_path: Path) -> None:
    explainer = ToyExplainer(toy_classifier())
    frozen_part = torch.nn.Dropout().eval()
    explainer.extra = frozen_part

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            assert pl_module.training
            assert not frozen_part.training
            assert not pl_module.classifier.training

    fit(tmp_path, SampleGrid(every_n_batches=1, num_images=1), Look(), build=lambda: explainer)


def test_sample_grids_explain_with_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(explanation: Explanation, class_names: Any) -> Image.Image:
        seen.append(explanation.parts["distinct"])
        return draw_samples(explanation, class_names)

    monkeypatch.setattr(samples, "draw_samples", spy)
    explainer = fit(tmp_path, EMA(0.9), SampleGrid(every_n_batches=4, num_images=2))
    # The trained module ends as the average, so it must explain as the last grid did.
    image = torch.stack([toy_images(16)[index] for index in (0, 8)])
    assert len(seen) == 2
    assert torch.equal(seen[-1], explainer.explain(image).parts["distinct"])


def test_the_grid_shows_every_column_and_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Logged(DummyLogger):
        calls: list[dict[str, Any]] = []  # noqa: RUF012

        def log_image(self, **arguments: Any) -> None:
            self.calls.append(arguments)

    monkeypatch.setattr(samples, "WandbLogger", Logged)
    fit(tmp_path, SampleGrid(every_n_batches=4, num_images=2), logger=Logged())
    picture = Image.open(tmp_path / "samples" / "00000004.png")
    # image, four parts, counterfactual, three steps, attribution; 16 pixels are enlarged to 96, two rows.
    assert picture.size == (150 + 10 * (96 + 4), 18 + 2 * (96 + 4))
    assert [call["step"] for call in Logged.calls] == [0, 4]
    assert Logged.calls[1]["caption"] == ["after 4 batches"]


def test_attribution_alone_can_be_drawn() -> None:
    explanation = FixedToyExplainer(toy_classifier()).explain(toy_images(3))
    bare = Explanation(
        image=explanation.image,
        logits=explanation.logits,
        target=explanation.target,
        attribution=explanation.attribution,
    )
    assert draw_samples(bare, ("a", "b"), tile=16).size == (150 + 2 * (16 + 4), 18 + 3 * (16 + 4))


@pytest.mark.parametrize(("every_n_batches", "num_images"), [(0, 8), (10, 0)])
def test_sample_grid_refuses_nothing(every_n_batches: int, num_images: int) -> None:
    with pytest.raises(ValueError, match="every_n_batches and num_images must be positive"):
        SampleGrid(every_n_batches, num_images)
