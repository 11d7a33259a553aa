"""Tests of ``cfe_lightning.methods.diff_explainer.method`` and its autoencoder beyond the contract."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import AUTOENCODER, DIFF_EXPLAINER, NUM_CLASSES, pooled_classifier, with_noise
from torch import Tensor
from toy import ToyData, save_checkpoint, toy_images, toy_trainer

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explainer import load_explainer
from cfe_lightning.methods.diff_explainer import DiffExplainer, DiffusionAutoencoder
from cfe_lightning.methods.diff_explainer import method as diff_explainer
from cfe_lightning.methods.diff_explainer.agent import METRICS
from cfe_lightning.methods.diff_explainer.autoencoder import load_autoencoder
from cfe_lightning.methods.diff_explainer.calibration import preferred_metric
from cfe_lightning.methods.diff_explainer.method import Located
from cfe_lightning.training import SampleGrid

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


def tiny(classifier: FrozenClassifier | None = None, **changes: Any) -> DiffExplainer:
    torch.manual_seed(0)
    model = DiffExplainer(classifier or pooled_classifier(), **{**DIFF_EXPLAINER, **changes})
    with_noise(model.autoencoder)
    return model.eval()


def data(**changes: Any) -> ToyData:
    return ToyData(**{"num_classes": NUM_CLASSES, "batch_size": 4, "num_images": 16, **changes})


def fit(model: DiffExplainer, folder: Path, **changes: Any) -> pl.Trainer:
    trainer = toy_trainer(folder, limit_train_batches=1, num_sanity_val_steps=0)
    trainer.fit(model, data(**changes))
    model.eval()
    return trainer


def trained_autoencoder(folder: Path) -> Path:
    """Writes a checkpoint like those of ``train.py``."""
    torch.manual_seed(0)
    trainer = toy_trainer(folder)
    trainer.fit(DiffusionAutoencoder(**AUTOENCODER), data())
    trainer.save_checkpoint(folder / "autoencoder.ckpt")
    return folder / "autoencoder.ckpt"


def test_a_step_of_zero_is_the_reconstruction_bit_for_bit() -> None:
    model, image = tiny(), toy_images(3, NUM_CLASSES)
    located = model.locate(image)
    change = torch.randn(3, 4, 6).double()
    change[:, 2] = 0
    pictures = model.render(located, change)
    # At the same position in the batch: on some processors a kernel's last bits depend on the row.
    still = model.render(located, torch.zeros_like(change))
    assert torch.equal(pictures[:, 2], still[:, 2])
    torch.testing.assert_close(pictures[:, 2], still[:, 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pictures[:, 1], still[:, 1], atol=1e-3)
    direct = model.autoencoder.decode(located.noise_map[:, 0], located.code[:, 0], 2)
    torch.testing.assert_close(pictures[:, 2], direct, atol=1e-4, rtol=1e-4)


def test_the_edit_decodes_the_images_own_noise_with_a_moved_code() -> None:
    """Checks that the noise is not inverted anew with the moved code, which would give the image back."""
    model, image = tiny(diffusion_steps=50, refinements=3), 0.5 * toy_images(2, NUM_CLASSES)
    # A noise predictor as gentle as a trained one.
    model.autoencoder.unet.unet.conv_out.weight.data.mul_(0.02)
    located = model.locate(image)
    moved = located.code[:, 0] + 3
    other, _ = model.autoencoder.invert(image, moved, 50, 3)
    back = model.autoencoder.decode(other, moved, 50)
    torch.testing.assert_close(back, image, atol=1e-3, rtol=0)
    edited = model.render(located, torch.full((2, 1, 6), 3.0).double())[:, 0]
    assert (edited - image).abs().mean() > 10 * (back - image).abs().mean()


def test_the_agent_is_one_affine_map_of_raw_codes(tmp_path: Path) -> None:
    model = tiny()
    fit(model, tmp_path)
    code = model.locate(toy_images(4, NUM_CLASSES)).code[:, 0]
    standardised = (code.double() - model.code_mean) / model.code_spread
    features = standardised @ model.agent.weight.double().T + model.agent.bias.double()
    expected = features @ model.head_weight.T + model.head_bias + model.offset
    assert model.offset.abs().max() > 0
    torch.testing.assert_close(model.agent_logits(code), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_direction_is_the_closed_form_of_the_agents_gradient(num_classes: int) -> None:
    model = tiny(pooled_classifier(num_classes))
    model.step_matrix.copy_(torch.eye(6))
    code = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    source, target = torch.tensor([0, 1]), torch.tensor([1, num_classes - 1 if num_classes > 2 else 0])
    rows = torch.arange(2)
    # Gradients of margin and probability.
    logits = model.agent_logits(code)
    margin = logits[rows, target] - logits[rows, source]
    probability = logits.softmax(dim=1)[rows, target]
    of_margin, of_probability = (
        torch.autograd.grad(value.sum(), [code], retain_graph=True)[0] for value in (margin, probability)
    )
    step = model.direction(source, target)
    torch.testing.assert_close(step, of_margin / of_margin.square().sum(dim=1, keepdim=True), atol=1e-9, rtol=1e-6)
    if num_classes == 2:  # the published gradient: the same line, another length
        p = probability[:, None]
        torch.testing.assert_close(of_probability, p * (1 - p) * of_margin, atol=1e-9, rtol=1e-6)


def test_the_classifiers_head_is_copied_and_stays(tmp_path: Path) -> None:
    model = tiny()
    head = model.classifier.linear_head()
    assert head is not None
    before = [model.head_weight.clone(), model.head_bias.clone()]
    trainer = fit(model, tmp_path)
    assert torch.equal(model.head_weight, before[0])
    assert torch.equal(model.head_bias, before[1])
    torch.testing.assert_close(model.head_weight, head[0])
    (optimizer,) = trainer.optimizers
    learnt = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert learnt == {id(parameter) for parameter in model.agent.parameters()}


def test_the_agent_learns_what_the_codes_know(tmp_path: Path) -> None:
    """Checks that features that are linear in the codes are learnt exactly."""
    model = tiny(alignment="mse", ridge_penalty=1e-9)
    planted = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    model.classifier.features = lambda image: model.autoencoder.encode(image) @ planted.T + 1  # type: ignore[method-assign]
    fit(model, tmp_path)
    code = model.autoencoder.encode(toy_images(4, NUM_CLASSES))
    said = model.agent(((code.double() - model.code_mean) / model.code_spread).float())
    torch.testing.assert_close(said, code @ planted.T + 1, atol=1e-3, rtol=1e-3)


def test_a_classifier_without_a_head_is_imitated_in_its_logits() -> None:
    classifier = pooled_classifier()
    without = tiny(FrozenClassifier(classifier.network, replace(classifier.spec, head=None, feature_map=None)))
    assert not without.reads_features
    assert torch.equal(without.head_weight, torch.eye(NUM_CLASSES).double())
    assert without.agent.out_features == NUM_CLASSES


def planted(model: DiffExplainer, agree: bool = True) -> None:
    """Pictures whose brightness is a margin of class 0 over class 1, and a classifier that reads it.

    The margin is 3 for every reconstruction, and changes as the agent's.
    """

    def render(located: Located, change: Tensor) -> Tensor:
        logits = model.agent_logits(located.code.double() + change) - model.agent_logits(located.code)
        margin = 3 + (logits[..., 0] - logits[..., 1]).float()
        return (0.02 * margin)[:, :, None, None, None].expand(-1, -1, 3, 16, 16).clamp(-1, 1)

    def forward(image: Tensor) -> Tensor:
        margin = image.mean(dim=(1, 2, 3)) / 0.02 * (1 if agree else -1)
        return torch.stack([margin, torch.zeros_like(margin), torch.full_like(margin, -50.0)], dim=1)

    model.render = render  # type: ignore[method-assign]
    model.classifier.forward = forward  # type: ignore[method-assign]


def test_the_search_ends_where_the_classifier_flips() -> None:
    model = tiny(search_points=8, search_rounds=4, largest_step=1e2)
    planted(model)
    explanation = model.explain(torch.full((2, 3, 16, 16), 0.06))  # margin 3 for class 0
    # From 3 to just beyond zero, where the target leads by 0.02.
    wanted = torch.full((2,), 3 + math.log(0.51 / 0.49))
    torch.testing.assert_close(explanation.scores["step"], wanted, atol=0.03, rtol=0)
    assert explanation.scores["reached"].tolist() == [1, 1]
    assert explanation.strengths is not None
    assert explanation.strengths[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(explanation.strengths[:, -1], explanation.scores["step"])


@pytest.mark.parametrize(
    ("follows", "flips", "visible", "chosen"),
    [
        ((0.95, 0.95, 0.95), (0.5, 0.5, 0.5), (0.3, 0.1, 0.2), "diagonal"),
        ((0.95, 0.89, 0.95), (0.5, 0.5, 0.5), (0.3, 0.1, 0.2), "covariance"),
        # A metric that changes nothing is not preferred.
        ((0.95, 0.91, 1.00), (0.0, 0.03, 1.0), (0.001, 0.004, 0.04), "covariance"),
        ((0.95, 0.95, 0.95), (0.96, 0.94, 1.0), (0.1, 0.05, 0.2), "identity"),
        ((0.8, 0.8, 0.8), (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), None),
    ],
)
def test_the_least_visible_of_the_metrics_that_work_is_preferred(
    follows: tuple[float, ...], flips: tuple[float, ...], visible: tuple[float, ...], chosen: str | None
) -> None:
    table: dict[str, float] = {}
    for kind, *values in zip(METRICS, follows, flips, visible, strict=True):
        table |= {
            f"{kind}_{name}": v for name, v in zip(("sign_agreement", "flip_rate", "change"), values, strict=True)
        }
    assert preferred_metric(table) == chosen


def test_the_preferred_metric_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(metric="calibrate")
    fitted = tiny()
    fit(fitted, tmp_path)
    model.load_state_dict(fitted.state_dict())
    planted(model)
    table = model._calibrate(toy_images(6, 2))
    assert all(float(table[f"{kind}_sign_agreement"]) == 1 for kind in METRICS)
    monkeypatch.setattr(diff_explainer, "preferred_metric", lambda table: "diagonal")
    model._calibrate(toy_images(6, 2))
    torch.testing.assert_close(model.step_matrix, (model.code_spread**2).diag())


def test_no_sign_is_flipped_silently(tmp_path: Path) -> None:
    model = tiny(metric="calibrate")
    fitted = tiny()
    fit(fitted, tmp_path)
    model.load_state_dict(fitted.state_dict())
    planted(model, agree=False)
    with pytest.raises(ValueError, match=r"does not follow the agent in any metric .*identity 0\.00.*--model\.metric"):
        model._calibrate(toy_images(6, 2))


def test_a_reconstruction_that_is_another_image_to_the_classifier_is_told() -> None:
    model = tiny()
    image = toy_images(4, NUM_CLASSES)
    original = model.classifier.forward

    def forward(pictures: Tensor) -> Tensor:
        logits = original(pictures)
        return logits if len(pictures) == 4 and torch.equal(pictures, image) else logits.roll(1, dims=1)

    model.classifier.forward = forward  # type: ignore[method-assign]
    explanation = model.explain(image)
    unkept = explanation.scores["reconstruction_kept"] == 0
    assert unkept.any()
    assert (explanation.scores["faithful"][unkept] == 0).all()


def test_a_confidence_can_be_asked_for() -> None:
    model = tiny(confidence=0.9, search_points=8, search_rounds=4, largest_step=1e2)
    planted(model)
    explanation = model.explain(torch.full((2, 3, 16, 16), 0.06))
    assert explanation.counterfactual_logits is not None
    p = explanation.counterfactual_logits.softmax(dim=1).gather(1, explanation.target[:, None])
    assert ((p >= 0.9) & (p < 0.91)).all()


def test_the_checkpoint_needs_no_autoencoder_file(tmp_path: Path) -> None:
    path = trained_autoencoder(tmp_path)
    model = DiffExplainer(pooled_classifier(), **{**DIFF_EXPLAINER, "autoencoder": str(path)})
    fit(model, tmp_path / "fit")
    image = toy_images(2, NUM_CLASSES)
    expected = model.explain(image)
    file = save_checkpoint(model, tmp_path / "best.ckpt")
    path.unlink()
    loaded = load_explainer(file)
    assert isinstance(loaded.hparams["autoencoder"], dict)
    found = loaded.explain(image)
    assert expected.steps is not None
    assert found.steps is not None
    assert torch.equal(expected.steps, found.steps)


def test_slices_are_encoded_one_by_one_and_moved_alike() -> None:
    # A montage, and its slices alone.
    small = {**AUTOENCODER, "image_size": 8, "attention_sizes": [4]}
    model, single = tiny(autoencoder=small, num_slices=4), tiny(autoencoder=small)
    single.load_state_dict(model.state_dict())
    image = toy_images(2, NUM_CLASSES)
    slices = images.cut_montage(image, 4)
    located = model.locate(image)
    assert model.image_size == 16
    for index in range(4):
        alone = single.locate(slices[:, index])
        torch.testing.assert_close(located.code[:, index], alone.code[:, 0], atol=1e-5, rtol=1e-4)
        change = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).double()
        together = images.cut_montage(model.render(located, change).flatten(0, 1), 4)[:, index]
        torch.testing.assert_close(together, single.render(alone, change).flatten(0, 1), atol=1e-3, rtol=1e-3)

    # What the agent and the explanation make of them.
    torch.testing.assert_close(model._taught(image)[0], located.code.mean(dim=1))
    explanation = model.explain(image)
    assert explanation.steps is not None
    assert explanation.steps.shape == (2, 3, 3, 16, 16)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"are 32 pixels wide, but the autoencoder was trained for 16 \(1 slices of 16\)"
    ):
        tiny().encode(torch.zeros(1, 3, 32, 32))


def test_the_autoencoder_stays_in_eval_mode_and_frozen() -> None:
    model = tiny().train()
    assert not any(module.training for module in model.autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in model.autoencoder.parameters())


def test_the_autoencoder_trains_and_reports_reconstructions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiffusionAutoencoder(**AUTOENCODER, learning_rate=3e-3, validation_steps=4)
    trainer = toy_trainer(tmp_path, max_epochs=8, num_sanity_val_steps=0)
    trainer.validate(model, data(), verbose=False)
    before = float(trainer.callback_metrics["val/loss"])
    trainer.fit(model, data())
    metrics = trainer.callback_metrics
    assert float(metrics["val/loss"]) < 0.8 * before
    assert {"val/psnr", "val/psnr_code", "val/inversion_residual", "val/code_spread"} <= metrics.keys()


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_a_perfect_network_has_no_loss_and_decodes_the_image(prediction: str) -> None:
    """Checks that a network that knows image and noise is right at every step, for both predictions."""
    model = DiffusionAutoencoder(**AUTOENCODER, prediction=prediction)
    image = toy_images(3, NUM_CLASSES)
    process = model.process

    def knows(state: Tensor, step: Tensor, code: Tensor) -> Tensor:
        level = process.alpha_bar[step + 1][:, None, None, None].float()
        noise = (state - level.sqrt() * image) / (1 - level).sqrt()
        return noise if prediction == "noise" else process.velocity(image, noise, step)

    model.unet.forward = knows  # type: ignore[method-assign]
    loss = model._noise_error(image, torch.randn_like(image), torch.tensor([0, 500, 999]))
    assert loss < 1e-6
    decoded = model.decode(torch.randn_like(image), torch.zeros(3, 6), 20)
    torch.testing.assert_close(decoded, image.clamp(-1, 1), atol=1e-4, rtol=0)


def test_the_autoencoder_draws_reconstructions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    grids = SampleGrid(every_n_batches=2, num_images=3)
    trainer = toy_trainer(tmp_path, limit_train_batches=2, num_sanity_val_steps=0, callbacks=[grids])
    trainer.fit(DiffusionAutoencoder(**AUTOENCODER, validation_steps=2), data())
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["00000000.png", "00000002.png"]
    assert images.read_image(pictures[1], 3).shape[1] == 3 * (96 + 4) + 18


def test_the_autoencoders_file_is_checked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_autoencoder(tmp_path / "missing.ckpt")
    other = save_checkpoint(tiny(), tmp_path / "explainer.ckpt")
    with pytest.raises(ValueError, match=r"is no diffusion autoencoder: give the best\.ckpt or last\.ckpt"):
        load_autoencoder(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"diffusion_steps": 30}, "steps must divide 1000, got 30"),
        ({"sampler": "euler"}, "sampler must be one of ddim, dpm, got 'euler'"),
        ({"confidence": 1.5}, "confidence is a probability between 0 and 1, got 1.5"),
        ({"autoencoder": {**AUTOENCODER, "channels": 1}}, "images of 1 channels, but the classifier takes 3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
