"""Heat maps as decompositions: exact sums, known answers on linear classifiers, and a classifier left as it was."""

import ast
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import toy_classifier, toy_images

import cfe_lightning
from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.networks import ResNet18, SimpleCnn
from cfe_lightning.decisions import kl_from_uniform
from cfe_lightning.explanation import Decomposer
from cfe_lightning.methods.baselines import BASELINES
from cfe_lightning.methods.baselines.captum import CaptumExplainer, Method, build_baseline
from cfe_lightning.methods.baselines.neutral_descent import NeutralDescent


def frozen(network: nn.Module, num_classes: int = 2, size: int = 16) -> FrozenClassifier:
    names = tuple(f"class {k}" for k in range(num_classes))
    scale: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.3, 0.3)}
    spec = ClassifierSpec(class_path="", init_args={}, head=None, class_names=names, image_size=size, **scale)
    return FrozenClassifier(network.eval(), spec)


@pytest.fixture(scope="module")
def classifier() -> FrozenClassifier:
    torch.manual_seed(0)
    return frozen(SimpleCnn(3, image_size=16), num_classes=3)


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Linear(nn.Module):
    """A linear network: the logit of class 1 is the dot product with a fixed image, that of class 0 its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)))

    def forward(self, image: Tensor) -> Tensor:
        z = (image * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([-z, z], dim=1)


class LinearThree(nn.Module):
    """A linear network of three classes: each logit is the dot product with an image of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4)))

    def forward(self, image: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", image, self.weight)


class Sigmoid(SimpleCnn):
    """A network with a single logit."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, :1]


def linear(network: nn.Module, num_classes: int = 2) -> FrozenClassifier:
    classifier = frozen(network, num_classes)
    # The normalisation is undone, so that the network's weight is the gradient in [-1, 1] units.
    classifier.mean.fill_(0.5)
    classifier.std.fill_(0.5)
    return classifier


@pytest.mark.parametrize("name", BASELINES)
def test_contract(classifier: FrozenClassifier, name: str) -> None:
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    image, source = pictures(), torch.tensor([2, 0, 1])
    explainer = build_baseline(name, classifier)
    assert callable(explainer.distinct)  # type: ignore[attr-defined]
    decomposer: Decomposer = explainer  # type: ignore[assignment]
    with torch.no_grad():
        distinct = decomposer.distinct(image, source)
        explanation = explainer.explain(image)
    assert distinct.shape == image.shape
    assert float(distinct.abs().max()) > 0
    assert not distinct.requires_grad
    assert torch.equal(explanation.target, classifier(image).topk(2).indices[:, 1])
    parts = explanation.parts
    torch.testing.assert_close(parts["agnostic"] + parts["distinct"], image, atol=1e-6, rtol=0)
    assert not parts["residual"].any()
    assert explanation.steps is not None
    torch.testing.assert_close(explanation.steps[:, 0], image)
    torch.testing.assert_close(explanation.steps[:, 4], image - 0.4 * parts["distinct"])
    torch.testing.assert_close(explanation.steps[:, -1], parts["agnostic"])
    assert float(explanation.attribution.min()) >= 0
    assert explanation.counterfactual is None
    # Nothing is left on the classifier that was explained.
    for module in classifier.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not hasattr(module, "rule")
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize("name", BASELINES)
def test_answers_depend_on_neither_batch_nor_repetition_nor_global_seed(
    classifier: FrozenClassifier, name: str
) -> None:
    image, source = pictures(), torch.tensor([2, 0, 1])
    explainer: Decomposer = build_baseline(name, classifier)  # type: ignore[assignment]
    torch.manual_seed(1)
    together = explainer.distinct(image, source)
    torch.manual_seed(2)
    alone = torch.cat([explainer.distinct(image[i : i + 1], source[i : i + 1]) for i in (2, 1, 0)]).flip(0)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["random", "gradient_shap"])
def test_random_methods_follow_their_seed_and_leave_global_generators_alone(
    classifier: FrozenClassifier, name: str
) -> None:
    image, source = pictures(), torch.tensor([2, 0, 1])
    explainer: Decomposer = build_baseline(name, classifier)  # type: ignore[assignment]
    other: Decomposer = build_baseline(name, classifier, seed=1)  # type: ignore[assignment]
    torch.manual_seed(0)
    np.random.seed(0)
    expected, expected_by_numpy = torch.rand(3), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.allclose(explainer.distinct(image, source), other.distinct(image, source))
    assert torch.equal(torch.rand(3), expected)
    assert np.random.rand() == expected_by_numpy


@pytest.mark.parametrize("name", ["integrated_gradients", "gradient_shap"])
def test_gradient_methods_are_exact_on_a_linear_classifier(name: str) -> None:
    classifier = linear(Linear())
    weight = classifier.network.weight.detach()
    image = pictures()
    explainer: Decomposer = build_baseline(name, classifier)  # type: ignore[assignment]
    relevance = weight * image
    scaled = relevance / relevance.abs().amax(dim=(1, 2, 3), keepdim=True)
    # From mid-grey, which is zero, the relevance of a pixel is weight times value.
    torch.testing.assert_close(explainer.distinct(image, torch.ones(3).long()), scaled * image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(explainer.distinct(image, torch.zeros(3).long()), -scaled * image, atol=1e-5, rtol=1e-4)


def test_explain_looks_at_the_difference_of_predicted_and_target() -> None:
    classifier = linear(LinearThree(), num_classes=3)
    weight = classifier.network.weight.detach()
    image = pictures()
    target = (classifier(image).argmax(dim=1) + 2) % 3
    explanation = build_baseline("integrated_gradients", classifier).explain(image, target)
    assert torch.equal(explanation.target, target)
    relevance = (weight[explanation.predicted] - weight[target]) * image
    scaled = relevance / relevance.abs().amax(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(explanation.parts["distinct"], scaled * image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(explanation.attribution, scaled.abs().mean(1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("sign", "low", "high"), [("keep", -1, 1), ("relu", 0, 1), ("abs", 0, 1)])
def test_sign_of_the_heat_map(classifier: FrozenClassifier, sign: str, low: float, high: float) -> None:
    # Where the image is 1 everywhere, the distinct part is the weight itself.
    image = torch.ones(2, 3, 16, 16)
    explainer = CaptumExplainer(classifier, method="integrated_gradients", sign=sign)  # type: ignore[arg-type]
    weights = explainer.distinct(image, torch.tensor([0, 1]))
    assert float(weights.max()) <= high
    assert (float(weights.min()) < 0) == (low < 0)
    torch.testing.assert_close(weights.abs().amax(dim=(1, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)


def test_occlusion_finds_the_only_square_that_counts() -> None:
    class Corner(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            z = image[:, :, :4, :4].mean(dim=(1, 2, 3))
            return torch.stack([-z, z], dim=1)

    classifier = frozen(Corner())
    distinct = CaptumExplainer(classifier, method="occlusion").distinct(torch.ones(1, 3, 16, 16), torch.tensor([1]))
    assert float(distinct[:, :, :4, :4].abs().min()) > 0
    # The square of two pixels moves by one, so it reaches one pixel too far.
    assert not distinct[:, :, 5:].any()
    assert not distinct[:, :, :, 5:].any()


@pytest.mark.parametrize("name", ["grad_cam", "saliency", "integrated_gradients", "lrp"])
def test_single_logit_classifier_has_two_opposite_classes(name: str) -> None:
    torch.manual_seed(0)
    classifier = frozen(Sigmoid(2, image_size=16))
    image = pictures()
    explainer: Decomposer = build_baseline(name, classifier)  # type: ignore[assignment]
    for source in (torch.zeros(3).long(), torch.ones(3).long()):
        assert float(explainer.distinct(image, source).abs().flatten(1).sum(1).max()) > 0
    if name == "integrated_gradients":
        torch.testing.assert_close(
            explainer.distinct(image, torch.zeros(3).long()), -explainer.distinct(image, torch.ones(3).long())
        )


@pytest.mark.parametrize("name", ["grad_cam", "guided_grad_cam", "internal_influence", "lrp"])
def test_hooking_methods_cope_with_residual_networks(name: str) -> None:
    torch.manual_seed(0)
    # In-place and reused activations, an Identity in the stem, and maps that shrink to 1 x 1.
    classifier = frozen(ResNet18(2, small_image=True), size=16)
    image = pictures(2)
    logits = classifier(image)
    explainer = build_baseline(name, classifier)
    assert explainer.explain(image).parts["distinct"].isfinite().all()
    assert torch.equal(classifier(image), logits)
    assert any(getattr(module, "inplace", False) for module in classifier.modules())


def test_layer_is_the_last_map_with_a_place_to_point_at() -> None:
    classifier = frozen(ResNet18(2, small_image=True), size=32)
    chosen = CaptumExplainer(classifier, method="grad_cam")
    names = {module: name for name, module in chosen._score.classifier.network.named_modules()}
    assert names[chosen.layer()] == "layer4.1.conv2"
    coarse = CaptumExplainer(frozen(ResNet18(2), size=64), method="grad_cam")
    names = {module: name for name, module in coarse._score.classifier.network.named_modules()}
    assert names[coarse.layer()] == "layer3.1.conv2"
    named = CaptumExplainer(classifier, method="grad_cam", layer="layer2")
    assert named.layer() is named._score.classifier.network.get_submodule("layer2")
    with pytest.raises(ValueError, match="ResNet18 has no layer 'layer9' for grad_cam"):
        CaptumExplainer(classifier, method="grad_cam", layer="layer9")


def test_what_cannot_be_explained_is_refused_in_one_sentence() -> None:
    leaky = SimpleCnn(2, image_size=16)
    leaky.convolutions[2] = nn.LeakyReLU(0.2)
    leaky.activation = nn.LeakyReLU(0.2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"lrp cannot explain this classifier \(SimpleCnn\): .*LeakyReLU"):
        build_baseline("lrp", frozen(leaky))
    with pytest.raises(ValueError, match=r"guided_grad_cam needs nn.ReLU layers.*\(SimpleCnn\) has none: use grad_cam"):
        build_baseline("guided_grad_cam", frozen(leaky))
    with pytest.raises(ValueError, match=r"\(Linear\) has no convolution that can be hooked"):
        build_baseline("grad_cam", linear(Linear()))


def test_unknown_names_are_refused(classifier: FrozenClassifier) -> None:
    with pytest.raises(ValueError, match="no baseline 'gradcam': choose from integrated_gradients"):
        build_baseline("gradcam", classifier)
    with pytest.raises(ValueError, match="no attribution method 'lime'"):
        CaptumExplainer(classifier, method="lime")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sign must be one of keep, relu, abs"):
        CaptumExplainer(classifier, sign="plus")  # type: ignore[arg-type]
    assert set(get_args(Method)) < set(BASELINES)


def test_neutral_descent_ends_undecided_and_moves_little() -> None:
    classifier = toy_classifier()
    image = toy_images(4)
    before = kl_from_uniform(classifier(image))
    # Its gradient is spread over all pixels, so it takes long steps.
    distinct = NeutralDescent(classifier, step_size=20.0).distinct(image, torch.zeros(4).long())
    after = kl_from_uniform(classifier(image - distinct))
    assert float(before.min()) > 0.1
    assert float(after.max()) <= 1e-4
    assert float(distinct.abs().mean()) < 0.5
    # One step of the documented size.
    moved = NeutralDescent(classifier, num_steps=1, step_size=0.1).distinct(image, torch.zeros(4).long())
    probe = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(kl_from_uniform(classifier(probe)).sum(), probe)
    torch.testing.assert_close(moved, 0.1 * gradient, atol=1e-6, rtol=0)


def test_neutral_images_stay_while_others_move() -> None:
    classifier = linear(Linear())
    image = pictures(2)
    weight = classifier.network.weight.detach()
    # The first image is left with logits of -0.3 and 0.3: a divergence of 0.044.
    image[:1] -= weight * ((weight * image[:1]).sum() - 0.3) / weight.square().sum()
    assert float(kl_from_uniform(classifier(image))[0]) == pytest.approx(0.044, abs=1e-3)
    distinct = NeutralDescent(classifier, num_steps=1, tolerance=0.1).distinct(image, torch.zeros(2).long())
    assert not distinct[0].any()
    assert distinct[1].any()


def test_works_inside_inference_mode(classifier: FrozenClassifier) -> None:
    with torch.inference_mode():
        image = pictures() + 0
        explanation = build_baseline("saliency", classifier).explain(image)
        moved = NeutralDescent(classifier, num_steps=2).distinct(image, torch.zeros(3).long())
    assert float(explanation.attribution.max()) > 0
    assert float(moved.abs().max()) > 0


def test_importing_the_package_does_not_import_captum() -> None:
    package = Path(cfe_lightning.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "captum" for name in names), path
