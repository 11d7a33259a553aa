"""The frozen classifier: a network that carries its own world (normalisation, class names, size, layer names)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cfe_lightning import images
from cfe_lightning.classifier import counting as classifier_calls
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import (
    Level,
    as_feature_map,
    probe_image,
    trace_levels,
    why_no_feature_map,
)
from cfe_lightning.compute.precision import to_float32
from cfe_lightning.files.tensors import save_plain

_GRADIENT_METHODS = "DXAI, StylEx and Steerable Lens"
_LOGITS_METHODS = "DiffExplainer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """What a classifier sees in a batch of images.

    Attributes:
        feature_map: Activations before pooling, [B, D, h, w].
        levels: Outputs of the layers asked for, each [B, C_i, H_i, W_i].
        logits: Logits of K exclusive classes, [B, K].
    """

    feature_map: Tensor
    levels: list[Tensor]
    logits: Tensor


class FrozenClassifier(nn.Module):
    """A network that never changes a bit and gets no gradient on a weight, but lets gradients reach the image.

    It always presents K exclusive classes: a one-logit sigmoid output z is shown as logits (0, z), whose softmax is the
    sigmoid, and a multi-label network as one label against its absence.

    Args:
        network: Maps normalised images [B, C, S, S] to logits [B, K], [B, 1] or [B]. A network that ``torch.compile``
            returned is taken back to the original, whose layers can be watched and whose weights keep their names.
        spec: What the network expects and what its outputs mean.

    Raises:
        ValueError: If the spec names a layer that the network does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ClassifierSpec) -> None:
        super().__init__()
        self.network: nn.Module = getattr(network, "_orig_mod", network)
        self.spec = spec
        shape = (1, spec.channels, 1, 1)
        self.register_buffer("mean", torch.tensor(spec.mean, dtype=torch.float32).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std, dtype=torch.float32).view(shape), persistent=False)
        for field, name in (("head", spec.head), ("feature_map", spec.feature_map)):
            if name is not None:
                self._layer(field, name)
        self.eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The K presented classes in the order of the presented logits."""
        if self.spec.label is not None:
            return (f"not {self.spec.label}", self.spec.label)
        return self.spec.class_names

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Stays frozen and in eval mode whatever is asked: Lightning calls this at every start of training."""
        del mode
        self.requires_grad_(False)
        return super().train(False)

    def prepare(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to what the network takes: its channels, its size, its normalisation."""
        prepared = prepare(image, self.spec, self.mean, self.std)
        classifier_calls.count(prepared)
        return prepared

    def forward(self, image: Tensor) -> Tensor:
        """Logits of K exclusive classes, [B, C, H, W] in [-1, 1] -> [B, K]."""
        return self._exclusive(self.network(self.prepare(image)))

    @property
    def label_names(self) -> tuple[str, ...]:
        """The L labels of a multi-label network, in the order of ``label_probabilities``.

        Raises:
            ValueError: If its classes exclude each other.
        """
        if self.spec.label is None:
            raise ValueError(
                f"The classes {list(self.spec.class_names[:5])} of this classifier exclude each other, but a "
                "multi-label network is needed: if it is one, name one of its outputs as label when you wrap it."
            )
        return self.spec.class_names

    def label_probabilities(self, image: Tensor) -> Tensor:
        """The sigmoid of every logit of a multi-label network, [B, C, H, W] in [-1, 1] -> [B, L] in [0, 1].

        Raises:
            ValueError: If its classes exclude each other.
        """
        num_labels = len(self.label_names)
        return self.network(self.prepare(image)).sigmoid().view(len(image), num_labels)

    def along(self, path: Tensor, at_once: int | None = None) -> Tensor:
        """Logits of every picture of paths, [B, T, C, H, W] -> [B, T, K]; so many at a time, to bound the memory."""
        at_once = at_once or images.pictures_at_once(path.shape[-2] * path.shape[-1], path.device)
        return torch.cat([self(part) for part in path.flatten(0, 1).split(at_once)]).unflatten(0, path.shape[:2])

    def features(self, image: Tensor) -> Tensor:
        """The head's input, [B, C, H, W] -> [B, D].

        Raises:
            ValueError: If the network has no linear layer to stop before.
        """
        ((inputs, _),), _ = self._watch([self._layer("head", self.spec.head)], image)
        inputs = to_float32(inputs)
        return inputs if inputs.ndim == 2 else inputs.mean(dim=(2, 3))

    def head(self, features: Tensor) -> Tensor:
        """Features [B, D] to logits of K exclusive classes, [B, K]."""
        return self._exclusive(self._layer("head", self.spec.head)(self._as_input(features)))

    def exact_head(self) -> Callable[[Tensor], Tensor]:
        """A copy of the head in float64, features [B, D] to logits of K exclusive classes [B, K]."""
        layer = copy.deepcopy(self._layer("head", self.spec.head)).double()
        return lambda features: self._exclusive(layer(self._as_input(features)))

    def linear_head(self) -> tuple[Tensor, Tensor] | None:
        """Weight [K, D] and bias [K] of the head in float64, or None if the head is not linear.

        They are read off its answers, so a parametrised or otherwise wrapped layer is no special case.
        """
        head, num_features = self.exact_head(), self.num_features
        points = torch.cat([torch.zeros(1, num_features), torch.eye(num_features)]).to(self.mean.device).double()
        with torch.no_grad():
            bias, *_ = answers = head(points)
            weight = (answers[1:] - bias).T
            probe = torch.randn(8, num_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            probe = probe.to(bias.device)
            expected = head(probe)
        if not torch.allclose(probe @ weight.T + bias, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())):
            return None
        return weight.contiguous(), bias

    def feature_map(self, image: Tensor) -> Tensor:
        """Activations before pooling, [B, C, H, W] -> [B, D, h, w].

        Raises:
            ValueError: If the spec names no feature map.
        """
        return self.activations(image).feature_map

    def activations(self, image: Tensor, levels: Mapping[str, Level] | None = None) -> Activations:
        """Everything a decoder needs of images [B, C, H, W], in one pass.

        Args:
            image: The images.
            levels: Layers whose outputs are wanted too, as ``find_levels`` returns them.

        Raises:
            ValueError: If the spec names no feature map, or the network has no such layer.
        """
        levels = levels or {}
        layers = [self._layer("feature_map", self.spec.feature_map), *(self._layer("levels", name) for name in levels)]
        seen, logits = self._watch(layers, image)
        (_, output), *others = seen
        return Activations(
            feature_map=as_feature_map(output, self.spec.feature_map_transform),
            levels=[
                as_feature_map(value, "channels_last" if level.channels_last else "none")
                for (_, value), level in zip(others, levels.values(), strict=True)
            ],
            logits=self._exclusive(logits),
        )

    @torch.no_grad()
    def find_levels(self, names: Sequence[str] | None = None) -> dict[str, Level]:
        """The network's maps at higher resolution than the feature map, nearest first; see ``trace_levels``.

        Args:
            names: Takes these layers instead of looking for up to three.

        Raises:
            ValueError: If there is no feature map, or a name is no layer that returns a map.
        """
        side = self.spec.image_size
        feature_map = self.feature_map(torch.zeros(2, self.spec.channels, side, side, device=self.mean.device))
        return trace_levels(self.network, self.spec.channels, side, feature_map, names=names)

    def maps(self, image: Tensor, names: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """Outputs of the named layers and logits [B, K] of images [B, C, H, W], in one pass."""
        seen, logits = self._watch([self._layer("levels", name) for name in names], image)
        return [output for _, output in seen], self._exclusive(logits)

    @torch.no_grad()
    def shallow_maps(self, count: int = 2) -> list[str]:
        """The layers with the largest maps below the image's own resolution, which see edges and textures."""
        coarsest = torch.zeros(1, 1, 1, 1)
        side = self.spec.image_size
        levels = trace_levels(self.network, self.spec.channels, side, coarsest, count=side)
        return list(levels)[-count:]

    @property
    def num_features(self) -> int:
        """D, the length of the head's input."""
        side = self.spec.image_size
        with torch.no_grad():
            return self.features(torch.zeros(2, self.spec.channels, side, side, device=self.mean.device)).shape[1]

    def require_gradient(self) -> None:
        """Raises a ValueError if no gradient reaches the image, as with a program exported without one."""
        shape = (1, self.spec.channels, self.spec.image_size, self.spec.image_size)
        with torch.inference_mode(False), torch.enable_grad():
            image = torch.zeros(shape, device=self.mean.device, requires_grad=True)
            reached = self(image).requires_grad
        if not reached:
            raise ValueError(
                f"No gradient reaches the image through this classifier ({type(self.network).__name__}), and this "
                f"method needs one: export the network so that it can be differentiated, or choose {_LOGITS_METHODS}, "
                "which needs only logits."
            )

    @torch.no_grad()
    def pooled_feature_map(self) -> Tensor:
        """A feature map, [2, D, h, w], whose average over all places is known to be what the head reads.

        Raises:
            ValueError: If there is no such map; the sentence names the closest layer.
        """
        spec = self.spec
        if spec.head is None or spec.feature_map is None:
            reason = why_no_feature_map(self.network, spec.channels, spec.image_size)
        else:
            image = probe_image(self, spec.channels, spec.image_size)
            feature_map, features = self.feature_map(image), self.features(image)
            average = feature_map.mean(dim=(2, 3))
            # Only names given by hand can be wrong here.
            if average.shape == features.shape and torch.allclose(average, features, rtol=1e-3, atol=1e-4):
                return feature_map
            reason = f"the average of {spec.feature_map} is not what {spec.head} reads"
        raise ValueError(
            f"This method needs a classifier that averages its feature map over all places: {reason}. Name head and "
            "feature_map if there are such layers, or choose a ResNet, DenseNet, EfficientNet, RegNet, MobileNet, Swin "
            "or ConvNeXt."
        )

    def save(self, path: str | Path) -> None:
        """Writes spec and weights into one file that ``load_classifier`` reads."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, {"classifier": self.spec.to_dict(), "state_dict": self.network.state_dict()})

    def fingerprint(self) -> str:
        """A SHA-256 over spec and weights: equal exactly when the decisions are."""
        digest = hashlib.sha256(repr(sorted(self.spec.to_dict().items())).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def with_label(self, label: str) -> FrozenClassifier:
        """The same multi-label network, explained for another of its labels."""
        return FrozenClassifier(self.network, replace(self.spec, label=label))

    def _exclusive(self, logits: Tensor) -> Tensor:
        logits = to_float32(logits)
        if logits.ndim == 1:
            logits = logits[:, None]
        if self.spec.label is not None:
            index = self.spec.class_names.index(self.spec.label)
            logits = logits[:, index : index + 1]
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits

    def _layer(self, field: str, name: str | None) -> nn.Module:
        kind = type(self.network).__name__
        if name is None:
            raise ValueError(
                f"This classifier ({kind}) has no {field.replace('_', ' ')} that this method could read, because none "
                f"was found by tracing: name the layer with {field}=..., or choose a method that needs only logits "
                f"({_GRADIENT_METHODS}, {_LOGITS_METHODS})."
            )
        try:
            return self.network.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{field} names {name!r}, but {kind} has no such layer.") from error

    def _as_input(self, features: Tensor) -> Tensor:
        return features[:, :, None, None] if self.spec.head_on_cells else features

    @torch.compiler.disable
    def _watch(self, layers: Sequence[nn.Module], image: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Inputs and outputs of layers and the network's output in one pass; no hook stays even after an exception."""
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        with ExitStack() as hooks:
            for calls, layer in zip(seen, layers, strict=True):
                # A copy, because a network may go on to change its activations in place.
                handle = layer.register_forward_hook(
                    lambda _module, inputs, output, calls=calls: calls.append((inputs[0], output.clone()))
                )
                hooks.callback(handle.remove)
            # Code that was compiled before the hook was there would not call it.
            with torch.compiler.set_stance("force_eager"):
                logits = self.network(self.prepare(image))
        return [calls[-1] for calls in seen], logits


def prepare(image: Tensor, spec: ClassifierSpec, mean: Tensor, std: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] to the channels, the size and the normalisation that a spec asks for.

    Args:
        image: Grey or RGB images of any size.
        spec: What the network expects.
        mean: ``spec.mean`` as [1, C, 1, 1] on the image's device.
        std: ``spec.std``, as ``mean``.
    """
    if image.shape[1] != spec.channels:
        image = _match_channels(image, spec.channels)
    image = images.resize(image, spec.image_size)
    image = (images.to_unit(image) - mean) / std
    return image.flip(1) if spec.bgr else image


def _match_channels(image: Tensor, channels: int) -> Tensor:
    """Grey to RGB by repeating; RGB to grey by the luminance weights of ITU-R 601, as Pillow does."""
    if image.shape[1] not in (1, 3):
        raise ValueError(f"Images must be grey (1 channel) or RGB (3 channels), got {image.shape[1]} channels.")
    if image.shape[1] == 1:
        return image.expand(-1, channels, -1, -1)
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (image * weights).sum(dim=1, keepdim=True)
