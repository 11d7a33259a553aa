"""The promises of every method, whatever it does: one test per promise, run for every row of ``cases.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import CASES, IMAGE_SIZE, NUM_CLASSES, Case
from lightning.pytorch.strategies import SingleDeviceStrategy
from toy import ToyData, save_checkpoint, toy_images, toy_trainer

from cfe_lightning.classifier import load_classifier
from cfe_lightning.explainer import ExplainerModule, check_arguments, load_explainer
from cfe_lightning.explanation import Explanation
from cfe_lightning.training import EMA, LastCheckpoint
from cfe_lightning.training.checkpoints import AtomicCheckpointIO, RandomState

TRUSTED = ["toy"]

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


def data() -> ToyData:
    return ToyData(num_classes=NUM_CLASSES, image_size=IMAGE_SIZE, batch_size=4, num_images=16)


def train(explainer: ExplainerModule, folder: Path, callbacks: list[pl.Callback], **arguments: Any) -> pl.Trainer:
    trainer = toy_trainer(folder, callbacks, **arguments)
    trainer.fit(explainer, data())
    return trainer


class Terms(pl.Callback):
    """Collects every logged loss term."""

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("train/"):
                self.values.setdefault(name, []).append(value.clone())


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def trained(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExplainerModule, dict[str, Any]]:
    """Trains an explainer briefly; returns it in eval mode, and observations from before and during the training."""
    pl.seed_everything(0, verbose=False)
    explainer = case.build()
    seen: dict[str, Any] = {
        "fingerprint": explainer.classifier.fingerprint(),
        "before": {name: value.clone() for name, value in explainer.named_parameters()},
        "trainable": [name for name, value in explainer.named_parameters() if value.requires_grad],
        "terms": {},
    }
    if case.num_epochs:
        terms = Terms()
        train(explainer, tmp_path_factory.mktemp("trained"), [EMA(0.5), terms], max_epochs=case.num_epochs)
        seen["terms"] = terms.values
    return explainer.eval(), seen


def explain(explainer: ExplainerModule, target: torch.Tensor | None = None) -> Explanation:
    return explainer.explain(toy_images(6, NUM_CLASSES, IMAGE_SIZE), target)


def assert_same(one: Explanation, other: Explanation) -> None:
    for name in ("image", "logits", "target", "attribution", "counterfactual", "counterfactual_logits", "steps"):
        expected, actual = getattr(one, name), getattr(other, name)
        assert (expected is None) == (actual is None), name
        assert expected is None or torch.equal(expected, actual), name
    for field in ("parts", "scores", "step_scores", "caveats"):
        assert getattr(one, field).keys() == getattr(other, field).keys()
        for name, value in getattr(one, field).items():
            assert torch.equal(value, getattr(other, field)[name]), (field, name)


def test_an_explanation_is_complete_and_in_range(trained: tuple[ExplainerModule, dict[str, Any]]) -> None:
    explainer, _ = trained
    image = toy_images(6, NUM_CLASSES, IMAGE_SIZE)
    explanation = explain(explainer)  # its shapes are checked by Explanation itself
    assert torch.equal(explanation.image, image)
    assert torch.equal(explanation.logits, explainer.classifier(image))
    assert torch.equal(explanation.target, explainer.default_target(explanation.logits))
    assert (explanation.target != explanation.predicted).all()
    assert explanation.attribution.min() >= 0

    # Pictures and numbers.
    tensors = [explanation.attribution, *explanation.parts.values(), *explanation.scores.values()]
    if explanation.counterfactual is not None:
        assert explanation.counterfactual.abs().max() <= 1
        measured = explainer.classifier(explanation.counterfactual)
        torch.testing.assert_close(explanation.counterfactual_logits, measured, rtol=1e-4, atol=1e-5)
        tensors.append(explanation.counterfactual)
    if explanation.steps is not None:
        tensors.append(explanation.steps)
    assert all(tensor.isfinite().all() for tensor in tensors)

    # Decomposition.
    if {"agnostic", "distinct", "residual"} <= explanation.parts.keys():
        total = sum(explanation.parts[name] for name in ("agnostic", "distinct", "residual"))
        torch.testing.assert_close(total, image, rtol=0, atol=1e-5)


def test_the_target_is_respected(trained: tuple[ExplainerModule, dict[str, Any]]) -> None:
    explainer, _ = trained
    targets = [torch.full((6,), target) for target in range(NUM_CLASSES)]
    explanations = [explain(explainer, target) for target in targets]
    for target, explanation in zip(targets, explanations, strict=True):
        assert torch.equal(explanation.target, target)
    if explanations[0].counterfactual is not None:
        for one, other in ((0, 1), (1, 2), (0, 2)):
            assert not torch.equal(explanations[one].counterfactual, explanations[other].counterfactual)


def test_explaining_depends_on_nothing_but_the_image(trained: tuple[ExplainerModule, dict[str, Any]]) -> None:
    explainer, _ = trained
    torch.manual_seed(1)
    first = explain(explainer)
    state = torch.get_rng_state()
    second = explain(explainer)
    assert_same(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_explaining_does_not_depend_on_how_many_pictures_are_made_at_a_time(
    trained: tuple[ExplainerModule, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a time: fewer pictures than the batch has images, and a number of which nothing is a multiple."""
    explainer, _ = trained
    whole = explain(explainer)
    monkeypatch.setattr("cfe_lightning.compute.memory._PIXELS_ON_CPU", 5 * IMAGE_SIZE**2)
    parts = explain(explainer)
    for name in ("counterfactual", "counterfactual_logits", "steps", "attribution"):
        expected, actual = getattr(whole, name), getattr(parts, name)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_classifier_is_bit_identical_after_training(trained: tuple[ExplainerModule, dict[str, Any]]) -> None:
    explainer, seen = trained
    assert explainer.classifier.fingerprint() == seen["fingerprint"]
    assert not any(module.training for module in explainer.train().classifier.modules())
    explainer.eval()


def test_gradients_reach_the_image_but_no_classifier_weight(trained: tuple[ExplainerModule, dict[str, Any]]) -> None:
    explainer, _ = trained
    image = toy_images(2, NUM_CLASSES, IMAGE_SIZE).requires_grad_()
    explainer.classifier(image)[:, 0].sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    for name, parameter in explainer.classifier.named_parameters():
        assert parameter.grad is None, name
        assert not parameter.requires_grad, name


def test_every_term_is_finite_and_every_parameter_moves(
    case: Case, trained: tuple[ExplainerModule, dict[str, Any]]
) -> None:
    explainer, seen = trained
    assert explainer.needs_training == bool(seen["trainable"]) == bool(case.num_epochs)
    if not case.num_epochs:
        return
    assert seen["terms"]
    for name, values in seen["terms"].items():
        assert torch.stack(values).isfinite().all(), name
    now = dict(explainer.named_parameters())
    still = [name for name in seen["trainable"] if torch.equal(now[name], seen["before"][name])]
    assert not still


def test_every_fit_begins_with_weights_that_can_learn(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes exchange the gradients only of the weights that require one when the strategy is set up."""
    explainer = case.build()
    seen: list[set[str]] = []

    def setup(strategy: SingleDeviceStrategy, trainer: pl.Trainer) -> None:
        seen.append({name for name, value in explainer.named_parameters() if value.requires_grad})
        set_up(strategy, trainer)

    set_up = SingleDeviceStrategy.setup
    monkeypatch.setattr(SingleDeviceStrategy, "setup", setup)
    for _ in range(2 if case.num_epochs else 0):
        trainer = train(explainer, tmp_path, [], limit_train_batches=1, limit_val_batches=0)
        stepped = {id(value) for one in trainer.optimizers for group in one.param_groups for value in group["params"]}
        assert {name for name, value in explainer.named_parameters() if id(value) in stepped} <= seen[-1]


def test_hyper_parameters_are_plain_data(case: Case, tmp_path: Path) -> None:
    path = save_checkpoint(case.build(), tmp_path / "explainer.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    plain = (str, int, float, bool, type(None), list, tuple, dict)
    for name, value in checkpoint["hyper_parameters"].items():
        assert isinstance(value, plain), name
    assert "classifier" not in checkpoint["hyper_parameters"]
    # The command line may give a method every argument that it was built with, defaults included.
    check_arguments(case.kind, checkpoint["hyper_parameters"])
    assert case.arguments.items() <= checkpoint["hyper_parameters"].items()


def test_a_checkpoint_alone_explains_the_same(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "classifier.pt"
    case.classifier().save(file)
    explainer = case.build(load_classifier(str(file), TRUSTED)).eval()
    with torch.no_grad():
        # Untrained weights would hide a weight that is not stored.
        for parameter in explainer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    path = save_checkpoint(explainer, tmp_path / "explainer.ckpt")
    expected = explain(explainer)
    file.unlink()
    assert_same(expected, explain(load_explainer(path, TRUSTED)))


@pytest.mark.parametrize("batch", [5, 8], ids=["mid-epoch", "epoch-boundary"])
def test_resuming_equals_a_straight_run(case: Case, batch: int, tmp_path: Path) -> None:
    if not case.num_epochs:
        return

    def run(folder: Path, *, stop: int | None = None, resume: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(0, verbose=False)
        if resume is not None:
            torch.manual_seed(1)  # other weights and another state, which the checkpoint must replace
        explainer = case.build()
        callbacks: list[pl.Callback] = [EMA(0.9), RandomState(), LastCheckpoint(1, str(folder)), Killed(stop)]
        trainer = toy_trainer(folder, callbacks, max_epochs=3, plugins=[AtomicCheckpointIO()])
        try:
            trainer.fit(explainer, data(), ckpt_path=resume, weights_only=True)
        except Killed.Now:
            assert stop is not None
        return torch.load(folder / "last.ckpt", weights_only=True)

    # A run straight on, and one that is killed and resumed.
    straight = run(tmp_path / "straight")
    run(tmp_path / "killed", stop=batch)
    resumed = run(tmp_path / "resumed", resume=tmp_path / "killed" / "last.ckpt")
    for weights in ("state_dict", "current_model_state"):
        for name, value in straight[weights].items():
            assert torch.equal(value, resumed[weights][name]), (weights, name)


class Types(Terms):
    """Records the types of weights and gradients, too."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.types = {tensor.dtype for tensor in [*pl_module.parameters(), *gradients]}


def test_a_step_in_bfloat16_has_nearly_the_losses_of_single_precision(case: Case, tmp_path: Path) -> None:
    if not case.num_epochs:
        return
    seen = {}
    for precision in ("32-true", "bf16-mixed"):
        pl.seed_everything(0, verbose=False)
        seen[precision] = Types()
        train(case.build(), tmp_path, [seen[precision]], limit_train_batches=1, precision=precision)
    exact, rounded = (seen[precision].values for precision in ("32-true", "bf16-mixed"))
    assert rounded.keys() == exact.keys()
    for name, (value,) in rounded.items():
        assert value.dtype == torch.float32, name
        # bfloat16 has 8 significant bits.
        torch.testing.assert_close(value, exact[name][0], rtol=0.03, atol=0.02, msg=name)
    assert seen["bf16-mixed"].types == {torch.float32}


def test_explaining_in_bfloat16_is_nearly_that_in_single_precision(
    trained: tuple[ExplainerModule, dict[str, Any]],
) -> None:
    explainer, _ = trained
    image = toy_images(24, NUM_CLASSES, IMAGE_SIZE)
    exact = explainer.explain(image)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        rounded = explainer.explain(image)

    def pictures(explanation: Explanation) -> dict[str, torch.Tensor]:
        fields = ("logits", "attribution", "counterfactual", "counterfactual_logits", "steps")
        named = {name: getattr(explanation, name) for name in fields} | explanation.parts
        return {name: value for name, value in named.items() if value is not None}

    assert pictures(rounded).keys() == pictures(exact).keys()
    for name, value in pictures(rounded).items():
        expected = pictures(exact)[name]
        assert value.dtype == torch.float32, name
        assert value.isfinite().all(), name
        # A hundredth of the range on average: at single places a mask or a step may fall on the other side.
        assert (value - expected).abs().mean() <= 0.02 * expected.abs().max().clamp_min(1), name
    for name, score in rounded.scores.items():
        assert score.dtype == torch.float32, name
        assert score.isfinite().all(), name
    assert (rounded.predicted == exact.predicted).float().mean() >= 0.9
    if exact.flipped is not None:
        assert (rounded.flipped == exact.flipped).float().mean() >= 0.9  # type: ignore[union-attr]


class Killed(pl.Callback):
    """Dies in the batch after ``stop``."""

    class Now(Exception):
        pass

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.stop:
            raise self.Now
