"""What an explainer is compared with: Captum's heat maps as decompositions.

A heat map a becomes a decomposition by w = a / max|a| and distinct = w * image, agnostic = (1 - w) * image (DXAI,
section 5.3). It answers the ``Decomposer`` protocol, so evaluation never learns what it is. Everything runs on a copy
of the classifier: Captum's hooks and changed weights never touch the one that is explained.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

Method = Literal[
    "integrated_gradients",
    "gradient_shap",
    "internal_influence",
    "guided_grad_cam",
    "grad_cam",
    "lrp",
    "occlusion",
    "saliency",
    "random",
]
Sign = Literal["keep", "relu", "abs"]

#: Names that ``build_baseline`` understands.
BASELINES: tuple[str, ...] = (*get_args(Method), "neutral_descent")
#: Layer methods take the last convolution with a map of at least this side: a 1 x 1 map has no place to point at.
MIN_MAP_SIZE = 4


def build_baseline(name: str, classifier: FrozenClassifier, seed: int = 0) -> Explainer:
    """A baseline by its name in ``BASELINES``.

    Raises:
        ValueError: If there is no such baseline, or it cannot explain this classifier.
    """
    if name == "neutral_descent":
        return NeutralDescent(classifier)
    if name not in get_args(Method):
        raise ValueError(f"There is no baseline {name!r}: choose from {', '.join(BASELINES)}.")
    return CaptumExplainer(classifier, method=cast(Method, name), seed=seed)


class Baseline(ExplainerModule):
    """A baseline in the place of a method: what explains a folder of images.

    Args:
        classifier: The classifier to be explained.
        name: One of ``BASELINES``.
        seed: Of the random ones.

    Raises:
        ValueError: As ``build_baseline``.
    """

    needs_training: ClassVar[bool] = False

    def __init__(self, classifier: FrozenClassifier, *, name: str = "integrated_gradients", seed: int = 0) -> None:
        super().__init__(classifier)
        self._explainer = build_baseline(name, classifier, seed)
        # It works on a copy of the classifier, which would keep the weights from before.
        self.register_load_state_dict_post_hook(
            lambda module, _keys: setattr(module, "_explainer", build_baseline(name, classifier, seed))
        )

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """As the baseline does; there is no counterfactual."""
        return self._explainer.explain(image, target)


class CaptumExplainer:
    """A heat-map method behind the ``Decomposer`` protocol, with the settings of DXAI, section 5.3.

    Args:
        classifier: The classifier to be explained.
        method: Captum's method. Settings: integrated gradients 50 steps from mid-grey; GradientSHAP 25 samples from
            mid-grey; internal influence, Grad-CAM, LRP and their kin keep positive relevance only; occlusion slides a
            mid-grey square of an eighth of the image; random draws U[0, 1) per pixel.
        sign: ``keep`` the sign of the heat map (the paper's tables), or its positive part, or its magnitude.
        layer: Dotted name of the layer for Grad-CAM, guided Grad-CAM and internal influence, as in the classifier's
            spec; None takes the last convolution whose map has a side of at least ``MIN_MAP_SIZE``.
        chunk: Images in one forward pass of methods that need many passes per image.
        seed: Of the random methods. Their draw depends on the image and the seed, never on the batch.

    Raises:
        ValueError: If the method cannot explain this classifier; the sentence says why.
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
        self._attribute = _ATTRIBUTIONS[method]
        self._probe()

    def attribute(self, image: Tensor, weights: Tensor) -> Tensor:
        """Relevance of each pixel for a weighted sum of logits.

        Args:
            image: [B, C, H, W] in [-1, 1].
            weights: Of the logits, [B, K]: one class, or predicted minus target.

        Returns:
            [B, C or 1, H, W], with sign.
        """
        self._score.to(image.device)
        # Captum needs gradients, also when called from prediction or validation loops.
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="captum")
            warnings.filterwarnings("ignore", message=".*Setting (forward, )?backward hooks.*")
            attribution = self._attribute(self, image.detach().clone(), weights.detach().clone())
        return attribution.detach().float()

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """The part w * image of images [B, C, H, W] for class ``source`` [B]; w is the heat map scaled to [-1, 1]."""
        return self._weights(self.attribute(image, self._one_class(source))) * image

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains predicted against target: the heat map is of the difference of the two logits."""
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
        # Logits (0, z) of a sigmoid: class 0 is -z, since its own logit never moves.
        return (weights * 2 - 1) * weights.new_tensor([0.0, 1.0]) if self._single_logit else weights

    def _probe(self) -> None:
        """Runs the method once on noise, so that a classifier it cannot explain is refused before the long run."""
        spec = self.classifier.spec
        device = next((p.device for p in self.classifier.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand((2, spec.channels, spec.image_size, spec.image_size), generator=generator) * 2 - 1
        noise = noise.to(device)
        with torch.no_grad():
            logits = self.classifier(noise)
        self._single_logit = logits.shape[1] == 2 and bool((logits[:, 0] == 0).all())
        try:
            result = self.attribute(noise, self._one_class(torch.zeros(2, dtype=torch.int64, device=device)))
        except ValueError:
            raise
        # Captum, hooks and scripted networks fail in many ways; all mean that this pair does not work.
        except Exception as error:
            kind = type(self.classifier.network).__name__
            reason = one_line(error)
            raise ValueError(f"{self.method} cannot explain this classifier ({kind}): {reason}") from error
        if not result.isfinite().all():
            kind = type(self.classifier.network).__name__
            raise ValueError(f"{self.method} gives no finite heat map for this classifier ({kind}).")

    def layer(self) -> nn.Module:
        """The layer that Grad-CAM and its kin look at, in the copy of the classifier.

        Raises:
            ValueError: If a name was given and there is no such layer, or the network has no convolution to hook.
        """
        network = self._score.classifier.network
        if self._layer is None:
            return _last_map(self._score.classifier)
        try:
            return network.get_submodule(self._layer)
        except AttributeError as error:
            raise ValueError(f"{type(network).__name__} has no layer {self._layer!r} for {self.method}.") from error


class _Score(nn.Module):
    """A weighted sum of the classifier's logits, [B, C, H, W] and [B, K] -> [B]: what Captum differentiates."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor, weights: Tensor) -> Tensor:
        return (self.classifier(image) * weights).sum(dim=1)


def _hookable_copy(classifier: FrozenClassifier) -> FrozenClassifier:
    """A copy that computes the same without in-place activations, which backward hooks cannot see through."""
    with torch.inference_mode(False):
        duplicate = copy.deepcopy(classifier)
    for module in list(duplicate.network.modules()):
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        for name, child in module.named_children():
            # Captum's LRP has no rule for Identity; Dropout in eval mode is the same function and has one.
            if type(child) is nn.Identity:
                setattr(module, name, nn.Dropout(0.0).eval())
    return duplicate


def _last_map(classifier: FrozenClassifier) -> nn.Module:
    """The last convolution whose output is a map of at least ``MIN_MAP_SIZE``, else the last with any map."""
    seen: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            seen.append((module, min(output.shape[-2:])))

    handles = [m.register_forward_hook(note) for m in classifier.network.modules() if isinstance(m, nn.Conv2d)]
    try:
        size = classifier.spec.image_size
        parameter = next(classifier.parameters(), torch.zeros(()))
        with torch.no_grad():
            classifier(torch.zeros((1, classifier.spec.channels, size, size), device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(
            f"This classifier ({type(classifier.network).__name__}) has no convolution that can be hooked: name a "
            "layer, or choose a baseline that needs none (integrated_gradients, gradient_shap, occlusion, saliency)."
        )
    large = [module for module, side in seen if side >= MIN_MAP_SIZE]
    return large[-1] if large else seen[-1][0]


# --- one function per method: image [B, C, H, W] and logit weights [B, K] to relevance [B, C or 1, H, W] ---


def _integrated_gradients(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import IntegratedGradients

    return IntegratedGradients(explainer._score).attribute(
        image, additional_forward_args=(weights,), n_steps=50, internal_batch_size=max(explainer.chunk, len(image))
    )


def _gradient_shap(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import GradientShap

    method = GradientShap(explainer._score)
    collected = []
    # One image at a time: its draw must not depend on its neighbours, and Captum has no internal batch size here.
    for single, weight in zip(image.split(1), weights.split(1), strict=True):
        with _seeded(_seed_of(single, explainer.seed)):
            collected.append(
                method.attribute(
                    single, baselines=torch.zeros_like(single), n_samples=25, additional_forward_args=(weight,)
                )
            )
    return torch.cat(collected)


def _internal_influence(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import InternalInfluence

    influence = InternalInfluence(explainer._score, explainer.layer()).attribute(
        image, additional_forward_args=(weights,), n_steps=50, internal_batch_size=max(explainer.chunk, len(image))
    )
    return _upsampled(influence.relu().mean(dim=1, keepdim=True), image)


def _guided_grad_cam(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import GuidedGradCam

    if not any(isinstance(module, nn.ReLU) for module in explainer._score.modules()):
        raise ValueError(
            f"guided_grad_cam needs nn.ReLU layers to guide, and this classifier "
            f"({type(explainer.classifier.network).__name__}) has none: use grad_cam."
        )
    return GuidedGradCam(explainer._score, explainer.layer()).attribute(
        image, additional_forward_args=(weights,), interpolate_mode="bilinear"
    )


def _grad_cam(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import LayerGradCam

    heat = LayerGradCam(explainer._score, explainer.layer()).attribute(
        image, additional_forward_args=(weights,), relu_attributions=True
    )
    return _upsampled(heat, image)


def _lrp(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import LRP

    return LRP(explainer._score).attribute(image, additional_forward_args=(weights,)).relu()


def _occlusion(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import Occlusion

    window = max(1, image.shape[-1] // 8)
    stride = max(1, window // 2)
    return Occlusion(explainer._score).attribute(
        image,
        sliding_window_shapes=(image.shape[1], window, window),
        strides=(image.shape[1], stride, stride),
        baselines=0,
        additional_forward_args=(weights,),
        perturbations_per_eval=max(1, explainer.chunk // len(image)),
    )


def _saliency(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    from captum.attr import Saliency

    return Saliency(explainer._score).attribute(image, additional_forward_args=(weights,))


def _random(explainer: CaptumExplainer, image: Tensor, weights: Tensor) -> Tensor:
    del weights
    drawn = [
        torch.rand(
            (1, 1, *single.shape[-2:]), generator=torch.Generator().manual_seed(_seed_of(single, explainer.seed))
        )
        for single in image.split(1)
    ]
    return torch.cat(drawn).to(image)


_ATTRIBUTIONS: dict[Method, Callable[[CaptumExplainer, Tensor, Tensor], Tensor]] = {
    "integrated_gradients": _integrated_gradients,
    "gradient_shap": _gradient_shap,
    "internal_influence": _internal_influence,
    "guided_grad_cam": _guided_grad_cam,
    "grad_cam": _grad_cam,
    "lrp": _lrp,
    "occlusion": _occlusion,
    "saliency": _saliency,
    "random": _random,
}


def _upsampled(heat: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(heat, size=image.shape[-2:], mode="bilinear", align_corners=True)


def _seed_of(image: Tensor, seed: int) -> int:
    """A seed that belongs to the image's content, so the order and size of batches play no role."""
    digest = hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes() + str(seed).encode())
    return int.from_bytes(digest.digest()[:4], "big")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Fixes the two global generators that Captum draws from, and gives them back as they were."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
