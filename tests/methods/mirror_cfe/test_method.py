"""Mirror-CFE beyond the contract: the claims of its explanations, and the classifiers that it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from cases import MIRROR, pooled_classifier
from torch import Tensor, nn
from torchvision import models
from toy import ToyData, toy_images, toy_trainer

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.networks import PooledCnn
from cfe_lightning.classifier.tracing import trace_layers
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.mirror_cfe.decoder import MirrorDecoder
from cfe_lightning.methods.mirror_cfe.geometry import STATUS, swapped


def tiny(num_classes: int = 3, classifier: FrozenClassifier | None = None, **changes: Any) -> MirrorCFE:
    torch.manual_seed(0)
    return MirrorCFE(classifier or pooled_classifier(num_classes), **{**MIRROR, **changes}).eval()


def frozen(network: nn.Module, num_classes: int, image_size: int) -> FrozenClassifier:
    """Freezes any network with the layers that tracing finds."""
    spec = ClassifierSpec(
        class_path="torch.nn.Module",
        init_args={},
        head=None,
        class_names=tuple(f"class {index}" for index in range(num_classes)),
        image_size=image_size,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return FrozenClassifier(network.eval(), spec.with_layers(trace_layers(network, 3, image_size)))


def convnext() -> FrozenClassifier:
    torch.manual_seed(0)
    network = models.ConvNeXt([models.convnext.CNBlockConfig(16, None, 2)], num_classes=3)
    nn.init.normal_(network.classifier[2].weight)
    return frozen(network, 3, 32)


def test_the_path_is_as_intended_in_feature_space():
    model, image = tiny(num_steps=5), toy_images(4, 3)
    explanation = model.explain(image)
    steps = explanation.strengths
    assert steps is not None
    assert explanation.intended is not None
    assert steps[0].tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    before = explanation.logits.softmax(dim=1)
    source, target = explanation.predicted, explanation.target
    intended = explanation.intended.softmax(dim=2)
    torch.testing.assert_close(intended[:, 0], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(intended[:, -1], swapped(before, source, target), atol=1e-5, rtol=0)
    rows = torch.arange(4)
    middle = explanation.intended[:, 2]
    torch.testing.assert_close(middle[rows, source], middle[rows, target], atol=1e-4, rtol=0)
    assert explanation.scores["status"].tolist() == [STATUS.index("exact")] * 4


def test_the_counterfactual_is_the_first_step_that_flips():
    model, image = tiny(num_steps=6), toy_images(4, 3)
    explanation = model.explain(image)
    target = explanation.target
    # A classifier that says the target from step 3 on for the first two images, and never for the others.
    said = torch.full((4, 7, 3), -1.0)
    said[torch.arange(4), :, explanation.predicted] = 0.0
    said[torch.arange(2)[:, None], torch.arange(3, 7)[None], target[:2, None]] = 1.0
    original = model.classifier.forward
    model.classifier.forward = lambda pictures: said.flatten(0, 1)  # type: ignore[method-assign]
    explanation = model.explain(image)
    model.classifier.forward = original  # type: ignore[method-assign]
    assert explanation.counterfactual is not None
    assert explanation.steps is not None
    assert explanation.flipped is not None
    assert explanation.scores["first_flip"].tolist() == pytest.approx([0.6, 0.6, 2, 2])
    assert explanation.flipped.tolist() == [True, True, False, False]
    torch.testing.assert_close(explanation.counterfactual[:2], explanation.steps[:2, 3])
    torch.testing.assert_close(explanation.counterfactual[2:], explanation.steps[2:, 5])
    redrawn = explanation.counterfactual - explanation.parts["reconstruction"]
    torch.testing.assert_close(explanation.parts["redrawn"], redrawn)


def test_the_boundary_is_half_way_whatever_the_number_of_steps():
    odd, even = tiny(num_steps=3).explain(toy_images(2, 3)), tiny(num_steps=4).explain(toy_images(2, 3))
    assert odd.steps is not None
    torch.testing.assert_close(odd.parts["boundary"], odd.steps[:, 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(odd.parts["boundary"], even.parts["boundary"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spread", ["uniform", "location", "waterfill"])
def test_maps_average_to_the_reflected_features(spread: str):
    model = tiny(spread=spread, bounds=[0.0])
    mirrored = model.reflect(toy_images(4, 3))
    moved = (mirrored.feature_map + mirrored.change).mean(dim=(2, 3))
    torch.testing.assert_close(moved, mirrored.reflection.features.float(), atol=1e-5, rtol=1e-4)


def test_without_an_edit_the_decoder_sees_the_image_s_own_levels():
    model = tiny()
    mirrored = model.reflect(toy_images(2, 3))
    summaries = model.decoder.summarise(mirrored.levels)
    mask = torch.zeros(2, 1, *mirrored.feature_map.shape[2:])
    original = model.decoder(mirrored.feature_map, mirrored.levels, summaries, mask)
    other = model.decoder(mirrored.feature_map, mirrored.levels, [torch.randn_like(s) for s in summaries], mask)
    torch.testing.assert_close(original, other)
    edited = model.decoder(mirrored.feature_map, mirrored.levels, summaries, mask + 1)
    assert not torch.allclose(original, edited)


@pytest.mark.parametrize("image_size", [28, 32, 128, 224])
def test_one_image_of_any_size(image_size: int):
    torch.manual_seed(0)
    model = tiny(classifier=frozen(PooledCnn(3, width=4), 3, image_size), num_steps=2)
    explanation = model.explain(toy_images(1, 3, image_size=image_size), torch.tensor([1]))
    assert explanation.steps is not None
    assert explanation.steps.shape == (1, 2, 3, image_size, image_size)
    assert torch.isfinite(explanation.steps).all()


def test_a_decoder_without_levels_works():
    model = tiny(levels=[])
    assert model.levels == {}
    explanation = model.explain(toy_images(2, 3))
    assert explanation.counterfactual is not None
    assert explanation.counterfactual.shape == (2, 3, 16, 16)


def test_a_target_that_is_predicted_already_leads_to_the_runner_up():
    model, image = tiny(), toy_images(4, 3)
    predicted = model.classifier(image).argmax(dim=1)
    mirrored = model.reflect(image, predicted)
    assert (mirrored.source == predicted).all()
    assert (mirrored.target != predicted).all()
    assert (model.explain(image, predicted).target == predicted).all()


def test_a_head_that_is_not_linear_is_reflected_too():
    classifier = convnext()
    assert classifier.linear_head() is None
    model = tiny(classifier=classifier, levels=[])
    image = toy_images(3, 3, image_size=32)
    explanation = model.explain(image)
    assert explanation.intended is not None
    wanted = swapped(explanation.logits.softmax(dim=1), explanation.predicted, explanation.target)
    torch.testing.assert_close(explanation.intended[:, -1].softmax(dim=1), wanted, atol=1e-4, rtol=0)
    # The logits are no straight line, so neither landmark is at a step known beforehand.
    mirrored = model.reflect(image)
    rows, scores = torch.arange(3), explanation.scores
    at_boundary = model.intended(mirrored, scores["boundary_step"][:, None].double())[:, 0]
    torch.testing.assert_close(
        at_boundary[rows, mirrored.source], at_boundary[rows, mirrored.target], atol=1e-5, rtol=0
    )
    assert (scores["boundary_step"] - 0.5).abs().max() > 1e-3
    flip = scores["intended_first_flip"][:, None].double()
    said = model.intended(mirrored, torch.cat([flip - 1e-3, flip + 1e-3], dim=1)).argmax(dim=2)
    assert (said == mirrored.target[:, None]).tolist() == [[False, True]] * 3


def test_an_average_of_tokens_is_a_feature_map_too():
    class MeanTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, stride=4)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.decide = nn.Linear(8, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.decide(self.block(self.patches(image).flatten(2).transpose(1, 2)).mean(dim=1))

    # Its tokens become the places of a map.
    torch.manual_seed(0)
    model = tiny(classifier=frozen(MeanTokens(), 3, 16))
    mirrored = model.reflect(toy_images(3, 3))
    assert mirrored.change.shape == (3, 8, 4, 4)
    said = model.intended(mirrored, torch.ones(3, 1))[:, 0].softmax(dim=1)
    wanted = swapped(mirrored.logits.softmax(dim=1), mirrored.source, mirrored.target)
    torch.testing.assert_close(said.float(), wanted, atol=1e-5, rtol=0)
    assert torch.isfinite(model.explain(toy_images(3, 3)).steps).all()  # type: ignore[arg-type]


def test_a_sigmoid_head_is_linear_with_a_row_of_zeros():
    network = pooled_classifier(2).network
    network.fc = nn.Linear(network.fc.in_features, 1)
    head = frozen(network, 2, 16).linear_head()
    assert head is not None
    weight, bias = head
    assert weight[0].abs().max() == 0
    assert bias[0] == 0
    torch.testing.assert_close(weight[1].float(), network.fc.weight[0], atol=1e-6, rtol=1e-6)


def test_classifiers_without_pooled_features_are_refused_with_the_reason():
    vgg = models.VGG(models.vgg.make_layers([8, "M"]), num_classes=3, init_weights=False)
    vgg.classifier = nn.Sequential(nn.Linear(8 * 49, 20), nn.ReLU(), nn.Linear(20, 3))
    sizes = {"patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    vit = models.VisionTransformer(image_size=32, **sizes, num_classes=3)
    nn.init.normal_(vit.heads.head.weight)
    squeezed = models.squeezenet1_1(weights=None, num_classes=3)

    # Reasons.
    for network, reason in (
        (vgg, r"in VGG the last linear layer is classifier.2 \(20 inputs\), but no layer returns a map with that n"),
        (vit, r"VisionTransformer .* heads.head \(16 inputs\), but .*\(closest: encoder\..*, relative error \d"),
        (squeezed, "SqueezeNet has no linear layer that could be watched"),
    ):
        sentence = f"^This method needs a classifier that averages .*{reason}.* choose a ResN"
        with pytest.raises(ValueError, match=sentence):
            tiny(classifier=frozen(network, 3, 32))


def test_a_named_map_that_the_head_does_not_read_is_refused():
    network = models.resnet18(weights=None, num_classes=3)
    spec = frozen(network, 3, 64).spec
    named = FrozenClassifier(network, replace(spec, feature_map="layer3"))
    with pytest.raises(ValueError, match="the average of layer3 is not the input of fc"):
        tiny(classifier=named)


#: Families of torchvision with a pooled feature map, and whether their head is linear.
_FAMILIES = {
    "resnet18": True,
    "wide_resnet50_2": True,
    "regnet_x_400mf": True,
    "shufflenet_v2_x0_5": True,
    "densenet121": True,
    "efficientnet_b0": True,
    "efficientnet_v2_s": True,
    "mobilenet_v2": True,
    "mnasnet0_5": True,
    "swin_t": True,
    "mobilenet_v3_small": False,
}


@pytest.mark.parametrize("name", _FAMILIES)
def test_every_family_of_torchvision_is_reflected_and_rendered(name: str):
    torch.manual_seed(0)
    classifier = frozen(models.get_model(name, weights=None, num_classes=4), 4, 64)
    assert (classifier.linear_head() is not None) == _FAMILIES[name]
    model = tiny(classifier=classifier)
    image = toy_images(2, 3, image_size=64)
    mirrored = model.reflect(image)
    moved = (mirrored.feature_map + mirrored.change).mean(dim=(2, 3))
    torch.testing.assert_close(moved, mirrored.reflection.features.float(), atol=1e-4, rtol=1e-3)
    wanted = swapped(mirrored.logits.softmax(dim=1), mirrored.source, mirrored.target)
    said = model.intended(mirrored, torch.ones(2, 1))[:, 0].softmax(dim=1)
    torch.testing.assert_close(said.float(), wanted, atol=1e-4, rtol=0)
    assert model.decode(mirrored, torch.ones(2, 1)).shape == (2, 1, 3, 64, 64)


def test_the_partner_is_asked_for_where_there_is_one():
    model = tiny(pairs=[["stripe 0", "stripe 2"]])
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    assert model.default_target(logits).tolist() == [2, 2, 0]
    assert tiny().default_target(logits).tolist() == [1, 2, 1]


def test_training_stays_inside_the_pairs():
    model = tiny(num_classes=4, pairs=[["stripe 0", "stripe 2"]])
    assert model.partner.tolist() == [2, -1, 0, -1]
    labels = torch.tensor([0, 1, 2, 3, 1, 3])
    model.classifier.forward = lambda image: nn.functional.one_hot(image[:, 0, 0, 0].long(), 4).float()  # type: ignore[method-assign]
    image = labels.view(-1, 1, 1, 1).float().expand(-1, 3, 16, 16)
    inside, source = model._inside_pairs(image)
    kept = inside[:, 0, 0, 0].long()
    assert kept.tolist() == [0, 2, 0, 2, 0, 2]
    assert model._draw_target(source).tolist() == [2, 0, 2, 0, 2, 0]


def test_a_step_shows_the_classifier_a_batch_once(tmp_path: Path):
    model, judged = tiny(), []
    model.head()  # which is read once
    network = model.classifier.network
    network.register_forward_pre_hook(lambda _, inputs: judged.append((len(inputs[0]), torch.is_grad_enabled())))
    trainer = toy_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, ToyData(num_classes=3, batch_size=4, num_images=8))
    # The images, and their renderings.
    assert judged == [(4, False), (8, True)]


def test_the_critic_s_spectral_norms_are_computed_in_single_precision():
    model, seen = MirrorCFE(pooled_classifier(), **MIRROR), []
    layers = [layer for layer in model.critic.body if hasattr(layer, "parametrizations")]
    assert len(layers) == 3
    for layer in layers:
        # On a CPU autocast leaves a norm alone, on a GPU it does not.
        norm = layer.parametrizations.weight[0]
        norm.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        judged = model.critic(toy_images(2, 3), torch.tensor([0, 1]))
    assert seen == [False] * 3
    assert judged.dtype == torch.bfloat16


def test_autocast_does_not_widen_what_is_enlarged(monkeypatch: pytest.MonkeyPatch):
    model, seen = tiny(), []
    interpolate = nn.functional.interpolate

    def watched(x: Tensor, **options: Any) -> Tensor:
        # On a GPU autocast would take single precision for it.
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return interpolate(x, **options)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mirrored = model.reflect(toy_images(2, 3))
        monkeypatch.setattr(nn.functional, "interpolate", watched)
        model.decode(mirrored, torch.ones(2, 2))
    maps = [enabled for dtype, enabled in seen if dtype == torch.bfloat16]
    assert maps
    assert not any(maps)


def test_images_decoded_together_are_those_decoded_alone():
    torch.manual_seed(0)
    decoder = MirrorDecoder(
        map_shape=(6, 2, 2),
        level_shapes=[(4, 4, 4), (3, 8, 8)],
        image_size=16,
        norm="group",
        non_negative=[True, False],
    )
    maps, mask = torch.randn(6, 6, 2, 2), torch.rand(6, 1, 2, 2)
    levels = [torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8, 8)]
    together = decoder(maps, levels, decoder.summarise(levels), mask)
    for index in range(6):
        own = [level[index // 3, None] for level in levels]
        alone = decoder(maps[index, None], own, decoder.summarise(own), mask[index, None])
        torch.testing.assert_close(together[index, None], alone)


def test_the_learning_rates_fall_in_the_last_part(tmp_path: Path):
    class Rates(pl.Callback):
        seen: ClassVar[list[list[float]]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    model = tiny(num_classes=2, decay_from=0.5, learning_rate=1e-3)
    toy_trainer(tmp_path, [Rates()], max_epochs=2).fit(model, ToyData(batch_size=4, num_images=16))
    rates = [1e-3] * 5 + [0.75e-3, 0.5e-3, 0.25e-3]
    torch.testing.assert_close(torch.tensor(Rates.seen), torch.tensor([[rate] * 2 for rate in rates]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": [["stripe 0", "cat"]]}, "pairs must be pairs of two different class names"),
        ({"pairs": [["stripe 0", "stripe 0"]]}, "pairs must be pairs of two different class names"),
        ({"pairs": [["stripe 0", "stripe 1"], ["stripe 1", "stripe 2"]]}, "in one pair only"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"spread": "waterfill"}, r"set bounds to \[0\]"),
        ({"decay_from": 2.0}, "decay_from is a share of the training"),
        ({"bounds": []}, "a lower and perhaps an upper bound"),
        ({"levels": ["fc"]}, "levels names 'fc', which is no layer that returns a map"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_no_gradient_goes_through_the_reflection_but_through_the_judgement():
    model = tiny()
    part = model._slice(toy_images(4, 3), torch.tensor([1, 2, 0, 1]), torch.full((4, 1), 0.7))
    assert not part.mirrored.change.requires_grad
    terms = model._decoder_loss(part, *model._render(part))
    (gradient,) = torch.autograd.grad(terms["class"], [model.decoder.head.weight])
    assert gradient.norm() > 0
    assert all(parameter.grad is None for parameter in model.classifier.parameters())
