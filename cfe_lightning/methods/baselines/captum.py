"""The baselines of the evaluation: Captum's heat maps as decompositions.

A heat map a becomes a decomposition by w = a / max|a|, distinct = w * image and agnostic = (1 - w) * image, as in the
comparison of DXAI (arXiv 2401.00320, table 1). It follows the ``Decomposer`` protocol, so the evaluation treats it like
any other. Captum runs on a copy of the classifier: its hooks and changed weights never touch the explained one.
"""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.files.text import one_line
from cfe_lightning.methods.baselines.neutral_descent import NeutralDescent, decomposed

# fmt: off
Method = Literal[
    "integrated_gradients", "gradient_shap", "internal_influence", "guided_grad_cam", "grad_cam", "lrp", "occlusion",
    "saliency", "random",
]
# fmt: on
Sign = Literal["keep", "relu", "abs"]

#: Names of all baselines.
BASELINES: tuple[str, ...] = (*get_args(Method), "neutral_descent")
#: Smallest side of the map that layer methods use: a 1 x 1 map has no position to point at.
MIN_MAP_SIZE = 4


def build_baseline(name: str, classifier: FrozenClassifier, seed: int = 0) -> Explainer:
    """Builds a baseline by its name in ``BASELINES``; ``seed`` serves those with random numbers.

    Raises:
        ValueError: If there is no such baseline, or it cannot explain this classifier.
    """
    if name == "neutral_descent":
        return NeutralDescent(classifier)
    if name not in get_args(Method):
        raise ValueError(f"There is no baseline {name!r}: choose from {', '.join(BASELINES)}.")
    return CaptumExplainer(classifier, method=cast(Method, name), seed=seed)


class Baseline(ExplainerModule):
    """A baseline in the place of a method, so that it explains folders of images.

    Args:
        classifier: The classifier to be explained.
        name: Name of the baseline, one of ``BASELINES``.
        seed: Random seed of the baselines with random numbers.

    Raises:
        ValueError: If there is no such baseline, or it cannot explain this classifier.
    """

    needs_training: ClassVar[bool] = False

    def __init__(self, classifier: FrozenClassifier, *, name: str = "integrated_gradients", seed: int = 0) -> None:
        super().__init__(classifier)
        self._explainer = build_baseline(name, classifier, seed)
        # The baseline has its own copy of the classifier, which must get loaded weights, too.
        self.register_load_state_dict_post_hook(
            lambda module, _keys: setattr(module, "_explainer", build_baseline(name, classifier, seed))
        )

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains images [B, C, H, W] as the baseline does; there is no counterfactual."""
        return self._explainer.explain(image, target)


class CaptumExplainer:
    """A heat-map method behind the ``Decomposer`` protocol, with the settings of DXAI's code.

    Args:
        classifier: The classifier to be explained.
        method: Captum's method. Settings: integrated gradients 50 steps from mid-grey; GradientSHAP 25 samples from
            mid-grey; internal influence, Grad-CAM and LRP keep positive relevance only; occlusion slides a mid-grey
            square of an eighth of the image; random draws U[0, 1) per pixel.
        sign: Form of the heat map: "keep" signed (as in the paper's tables), "relu" positive part, "abs" magnitude.
        layer: Dotted name of the layer for Grad-CAM, guided Grad-CAM and internal influence, as in the classifier's
            spec; None takes the last convolution whose map has a side of at least ``MIN_MAP_SIZE``.
        chunk: Images in one forward pass of methods that need many passes per image.
        seed: Seed of the random methods. Their numbers depend on the image and the seed, never on the batch.

    Raises:
        ValueError: If the method cannot explain this classifier; the message says why.
    """

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        method: Method = "integrated_gradients",
        sign: Sign = "keep",
        layer: str | None = None,
        chunk: int = 64,
        seed: int = 0,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"There is no attribution method {method!r}: choose from {', '.join(get_args(Method))}.")
        if sign not in get_args(Sign):
            raise ValueError(f"sign must be one of {', '.join(get_args(Sign))}, got {sign!r}.")
        self.classifier = classifier
        self.method = method
        self.sign = sign
        self.chunk = chunk
        self.seed = seed
        self._score = _Score(_hookable_copy(classifier))
        self._layer = layer
        self._probe()

    def attribute(self, image: Tensor, weights: Tensor) -> Tensor:
        """Returns the signed relevance of pixels, [B, C, H, W] -> [B, C or 1, H, W], for logits weighted by [B, K].

        The weights select one class, or predicted minus target.
        """
        self._score.to(image.device)
        # Captum needs gradients, even in prediction and validation loops.
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="captum")
            warnings.filterwarnings("ignore", message=".*Setting (forward, )?backward hooks.*")
            attribution = _ATTRIBUTIONS[self.method](self, image.detach().clone(), weights.detach().clone())
        return attribution.detach().float()

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """Returns w * image for images [B, C, H, W] and classes ``source`` [B]; w is the heat map on [-1, 1]."""
        return self._weights(self.attribute(image, self._one_class(source))) * image

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains predicted class against target: the heat map explains the difference of their logits."""
        with torch.no_grad():
            logits = self.classifier(image)
        target = runner_up(logits) if target is None else target
        contrast = F.one_hot(logits.argmax(dim=1), logits.shape[1]) - F.one_hot(target, logits.shape[1])
        weights = self._weights(self.attribute(image, contrast.to(image.dtype)))
        attribution = weights.abs().mean(dim=1, keepdim=True)
        return decomposed(image, logits, target, attribution, weights * image)

    def _weights(self, attribution: Tensor) -> Tensor:
        signed = {"keep": attribution, "relu": attribution.clamp_min(0), "abs": attribution.abs()}[self.sign]
        return signed / (signed.abs().amax(dim=(1, 2, 3), keepdim=True) + 1e-8)

    def _one_class(self, source: Tensor) -> Tensor:
        weights = F.one_hot(source, self.classifier.num_classes).float()
        # Logits (0, z) of a sigmoid: class 0 stands for -z, since its own logit never moves.
        return (weights * 2 - 1) * weights.new_tensor([0.0, 1.0]) if self._single_logit else weights

    def _probe(self) -> None:
        """Runs the method once on noise, so that a classifier it cannot explain is refused before a long run."""
        noise = _noise(self.classifier)
        with torch.no_grad():
            logits = self.classifier(noise)
        self._single_logit = logits.shape[1] == 2 and bool((logits[:, 0] == 0).all())
        # Heat map.
        kind = type(self.classifier.network).__name__
        try:
            result = self.attribute(noise, self._one_class(torch.zeros(2, dtype=torch.int64, device=noise.device)))
        except ValueError:
            raise
        # Captum, hooks and scripted networks fail in many ways; all mean that this pair does not work.
        except Exception as error:
            raise ValueError(f"{self.method} cannot explain this classifier ({kind}): {one_line(error)}") from error
        if not result.isfinite().all():
            raise ValueError(f"{self.method} gives no finite heat map for this classifier ({kind}).")

    def run(self, name: str, image: Tensor, weights: Tensor, layer: nn.Module | None = None, **options: Any) -> Tensor:
        """Runs Captum's class ``name`` on the weighted logits of images, at a layer if there is one."""
        # Captum takes seconds to import.
        from captum import attr

        method = getattr(attr, name)(self._score, *([] if layer is None else [layer]))
        return method.attribute(image, additional_forward_args=(weights,), **options)

    def layer(self) -> nn.Module:
        """Returns the layer of Grad-CAM, guided Grad-CAM and internal influence, in the copy of the classifier.

        Raises:
            ValueError: If the network has no layer of the given name, or no convolution to hook.
        """
        network = self._score.classifier.network
        if self._layer is None:
            return _last_map(self._score.classifier)
        try:
            return network.get_submodule(self._layer)
        except AttributeError as error:
            raise ValueError(f"{type(network).__name__} has no layer {self._layer!r} for {self.method}.") from error


class _Score(nn.Module):
    """A weighted sum of the classifier's logits, [B, C, H, W] and [B, K] -> [B], for Captum to differentiate."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor, weights: Tensor) -> Tensor:
        return (self.classifier(image) * weights).sum(dim=1)


def _hookable_copy(classifier: FrozenClassifier) -> FrozenClassifier:
    """Copies a classifier without in-place activations, which break backward hooks; its answers are the same."""
    with torch.inference_mode(False):
        duplicate = copy.deepcopy(classifier)
    for module in list(duplicate.network.modules()):
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        for name, child in module.named_children():
            # Captum's LRP has no rule for Identity; Dropout in eval mode is the same function and has a rule.
            if type(child) is nn.Identity:
                setattr(module, name, nn.Dropout(0.0).eval())
    return duplicate


def _last_map(classifier: FrozenClassifier) -> nn.Module:
    """Finds the last convolution with a map of at least ``MIN_MAP_SIZE``, or else the last with any map."""
    # One pass with hooks.
    seen: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            seen.append((module, min(output.shape[-2:])))

    with ExitStack() as hooks, torch.no_grad():
        for module in classifier.network.modules():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(note))
        classifier(_noise(classifier))
    # Choice.
    if not seen:
        raise ValueError(
            f"This classifier ({type(classifier.network).__name__}) has no convolution that can be hooked: name a "
            "layer, or choose a baseline that needs none (integrated_gradients, gradient_shap, occlusion, saliency)."
        )
    large = [module for module, side in seen if side >= MIN_MAP_SIZE]
    return large[-1] if large else seen[-1][0]


# One function per method: images [B, C, H, W] and weights of logits [B, K] to relevance [B, C or 1, H, W].


def _integrated_gradients(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    at_once = max(explainer.chunk, len(image))
    return explainer.run("IntegratedGradients", image, weights, n_steps=50, internal_batch_size=at_once)


def _gradient_shap(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    collected = []
    grey = torch.zeros_like(image[:1])
    # One image at a time: its draw must not depend on its neighbours, and Captum has no internal batch size here.
    for single, weight in zip(image.split(1), weights.split(1), strict=True):
        with _seeded(_seed_of(single, explainer.seed)):
            collected.append(explainer.run("GradientShap", single, weight, baselines=grey, n_samples=25))
    return torch.cat(collected)


def _internal_influence(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    options = {"n_steps": 50, "internal_batch_size": max(explainer.chunk, len(image))}
    influence = explainer.run("InternalInfluence", image, weights, layer=explainer.layer(), **options)
    return _upsampled(influence.relu().mean(dim=1, keepdim=True), image)


def _guided_grad_cam(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    if not any(isinstance(module, nn.ReLU) for module in explainer._score.modules()):
        raise ValueError(
            "guided_grad_cam needs nn.ReLU layers to guide, and this classifier "
            f"({type(explainer.classifier.network).__name__}) has none: use grad_cam."
        )
    return explainer.run("GuidedGradCam", image, weights, layer=explainer.layer(), interpolate_mode="bilinear")


def _grad_cam(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    heat = explainer.run("LayerGradCam", image, weights, layer=explainer.layer(), relu_attributions=True)
    return _upsampled(heat, image)


def _occlusion(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    channels, window = image.shape[1], max(1, image.shape[-1] // 8)
    stride, at_once = max(1, window // 2), max(1, explainer.chunk // len(image))
    shapes: Any = {"sliding_window_shapes": (channels, window, window), "strides": (channels, stride, stride)}
    return explainer.run("Occlusion", image, weights, baselines=0, perturbations_per_eval=at_once, **shapes)


def _random(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    generators = [torch.Generator().manual_seed(_seed_of(single, explainer.seed)) for single in image.split(1)]
    return torch.cat([torch.rand((1, 1, *image.shape[-2:]), generator=one) for one in generators]).to(image)


_ATTRIBUTIONS: dict[Method, Callable[[CaptumExplainer, Tensor, Tensor], Tensor]] = {
    "integrated_gradients": _integrated_gradients,
    "gradient_shap": _gradient_shap,
    "internal_influence": _internal_influence,
    "guided_grad_cam": _guided_grad_cam,
    "grad_cam": _grad_cam,
    "lrp": lambda explainer, image, weights: explainer.run("LRP", image, weights).relu(),
    "occlusion": _occlusion,
    "saliency": lambda explainer, image, weights: explainer.run("Saliency", image, weights),
    "random": _random,
}


def _noise(classifier: FrozenClassifier) -> Tensor:
    """Draws two images of noise in [-1, 1] on the classifier's device, the same in every call."""
    device = next((parameter.device for parameter in classifier.parameters()), torch.device("cpu"))
    size, generator = classifier.spec.image_size, torch.Generator().manual_seed(0)
    return (torch.rand((2, classifier.spec.channels, size, size), generator=generator) * 2 - 1).to(device)


def _upsampled(heat: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(heat, size=image.shape[-2:], mode="bilinear", align_corners=True)


def _seed_of(image: Tensor, seed: int) -> int:
    """Derives a seed from an image's content, so that the order and size of batches play no role."""
    digest = hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes() + str(seed).encode())
    return int.from_bytes(digest.digest()[:4], "big")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the two global generators that Captum draws from, and restores them afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
