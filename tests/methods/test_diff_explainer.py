"""Tests of ``cfe_lightning.methods.diff_explainer`` and its autoencoder beyond the contract."""

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
from cfe_lightning.methods.diff_explainer import STATUS, DiffExplainer, Located
from cfe_lightning.methods.diffusion_autoencoder import DiffusionAutoencoder, load_autoencoder

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
    """A checkpoint as ``train.py`` leaves it."""
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
    change[:, 1] = 0
    again = model.render(located, change)
    assert torch.equal(pictures[:, 2], again[:, 1])
    assert not torch.equal(pictures[:, 1], again[:, 1])
    direct = model.autoencoder.decode(located.noise_map[:, 0], located.code[:, 0], 2)
    torch.testing.assert_close(pictures[:, 2], direct, atol=1e-4, rtol=1e-4)


def test_the_edit_decodes_the_images_own_noise_with_a_moved_code() -> None:
    """Inverted anew with the moved code, the noise would give the image back and no edit."""
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
    expected = features @ model.head_weight.T + model.head_bias
    torch.testing.assert_close(model.agent_logits(code), expected, atol=1e-9, rtol=1e-9)


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
    """Features that are linear in the codes are read off exactly."""
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
    assert explanation.scores["status"].tolist() == [STATUS.index("reached")] * 2
    assert explanation.strengths is not None
    assert explanation.strengths[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(explanation.strengths[:, -1], explanation.scores["step"])


def test_the_metric_that_the_classifier_follows_is_taken(tmp_path: Path) -> None:
    model = tiny(metric="calibrate")
    fit_agent = tiny()
    fit(fit_agent, tmp_path)
    model.load_state_dict(fit_agent.state_dict())
    planted(model)
    model._mean_of_all = lambda value: value.mean()  # type: ignore[method-assign]
    table = model._calibrate(toy_images(6, 2))
    following = {kind: float(table[f"{kind}_change"]) for kind in ("identity", "diagonal", "covariance")}
    assert all(float(table[f"{kind}_sign_agreement"]) == 1 for kind in following)
    statistics = (model.code_spread**2).diag()
    if min(following, key=lambda kind: following[kind]) == "diagonal":
        torch.testing.assert_close(model.step_matrix, statistics)
    else:
        assert not torch.allclose(model.step_matrix, statistics)


def test_no_sign_is_flipped_silently(tmp_path: Path) -> None:
    model = tiny(metric="calibrate")
    fitted = tiny()
    fit(fitted, tmp_path)
    model.load_state_dict(fitted.state_dict())
    planted(model, agree=False)
    model._mean_of_all = lambda value: value.mean()  # type: ignore[method-assign]
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
    assert (explanation.scores["status"][unkept] == STATUS.index("unfaithful reconstruction")).all()


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
    torch.testing.assert_close(model._taught(image)[0], located.code.mean(dim=1))
    explanation = model.explain(image)
    assert explanation.steps is not None
    assert explanation.steps.shape == (2, 3, 3, 16, 16)


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
        ({"confidence": 1.5}, "confidence is a probability between 0 and 1, got 1.5"),
        ({"autoencoder": {**AUTOENCODER, "channels": 1}}, "images of 1 channels, but the classifier takes 3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
