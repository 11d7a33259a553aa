"""The frozen classifier: a network with its normalisation, its class names, its image size and its layer names."""

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
from cfe_lightning.classifier import counting
from cfe_lightning.classifier.outputs import logits_of, logits_of_probabilities
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import Level, as_feature_map, probe_image, trace_levels, why_no_feature_map
from cfe_lightning.compute.precision import to_float32
from cfe_lightning.files.tensors import save_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """A classifier's activations and logits for one batch of images.

    Attributes:
        feature_map: Activations before pooling, [B, D, h, w].
        levels: Outputs of the requested layers, each [B, C_i, H_i, W_i].
        logits: Logits of K exclusive classes, [B, K].
    """

    feature_map: Tensor
    levels: list[Tensor]
    logits: Tensor


class FrozenClassifier(nn.Module):
    """A network whose weights never change and get no gradient, while gradients do reach the image.

    It always presents K exclusive classes. A one-logit sigmoid output z becomes the logits (0, z), whose softmax is
    the sigmoid. A multi-label network becomes one label against its absence.

    Args:
        network: Network from normalised images [B, C, S, S] to an answer that ``logits_of`` reads. After
            ``torch.compile`` the original network is taken, because its layers can be watched and its weights keep
            their names.
        spec: The network's input format, layer names and class names.

    Raises:
        ValueError: If the spec names a layer that the network does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ClassifierSpec) -> None:
        super().__init__()
        self.network: nn.Module = getattr(network, "_orig_mod", network)
        self.spec = spec
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        # Refuses unknown layers now and not in the middle of a training.
        for field, layer in (("head", spec.head), ("feature_map", spec.feature_map)):
            if layer is not None:
                self._layer(field, layer)
        self.eval()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the K presented classes in the order of the presented logits."""
        if self.spec.label is not None:
            return (f"not {self.spec.label}", self.spec.label)
        return self.spec.class_names

    @property
    def num_classes(self) -> int:
        """Returns the number K of presented classes."""
        return len(self.class_names)

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Stays frozen and in eval mode whatever ``mode`` says: Lightning calls this at every start of training."""
        del mode
        self.requires_grad_(False)
        return super().train(False)

    def prepare(self, image: Tensor) -> Tensor:
        """Turns images [B, C, H, W] in [-1, 1] into the network's input [B, C, S, S], and counts them."""
        prepared = prepare(image, self.spec, self.mean, self.std)
        counting.count(prepared)
        return prepared

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits of K exclusive classes, [B, C, H, W] in [-1, 1] -> [B, K]."""
        return self._exclusive(self._outputs(self.prepare(image)))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Returns the L labels of a multi-label network, in the order of ``label_probabilities``.

        Raises:
            ValueError: If the network's classes exclude each other.
        """
        if self.spec.label is None:
            raise ValueError(
                f"The classes {list(self.spec.class_names[:5])} of this classifier exclude each other, but a "
                "multi-label network is needed: if it is one, name one of its outputs as label when you wrap it."
            )
        return self.spec.class_names

    def label_probabilities(self, image: Tensor) -> Tensor:
        """Returns the sigmoid of every logit of a multi-label network, [B, C, H, W] in [-1, 1] -> [B, L] in [0, 1].

        Raises:
            ValueError: If the network's classes exclude each other.
        """
        num_labels = len(self.label_names)
        return self._outputs(self.prepare(image)).sigmoid().view(len(image), num_labels)

    def along(self, path: Tensor, at_once: int | None = None) -> Tensor:
        """Returns the logits of B paths of images, [B, T, C, H, W] -> [B, T, K], ``at_once`` images per pass."""
        # Small passes bound the memory.
        at_once = at_once or images.pictures_at_once(path.shape[-2] * path.shape[-1], path.device)
        return torch.cat([self(part) for part in path.flatten(0, 1).split(at_once)]).unflatten(0, path.shape[:2])

    def features(self, image: Tensor) -> Tensor:
        """Returns the head's input, [B, C, H, W] -> [B, D].

        Raises:
            ValueError: If the spec names no head.
        """
        ((inputs, _),), _ = self._watch([self._layer("head", self.spec.head)], image)
        inputs = to_float32(inputs)
        # A block with a norm reads cells [B, D, 1, 1], or pools the map itself.
        return inputs if inputs.ndim == 2 else inputs.mean(dim=(2, 3))

    @property
    def num_features(self) -> int:
        """Returns the length D of the head's input."""
        with torch.no_grad():
            return self.features(self._blank(2)).shape[1]

    def head(self, features: Tensor) -> Tensor:
        """Turns features [B, D] into logits of K exclusive classes, [B, K]."""
        return self._exclusive(self._layer("head", self.spec.head)(self._as_input(features)))

    def exact_head(self) -> Callable[[Tensor], Tensor]:
        """Returns a copy of the head in float64, from features [B, D] to logits of K exclusive classes [B, K]."""
        layer = copy.deepcopy(self._layer("head", self.spec.head)).double()
        return lambda features: self._exclusive(layer(self._as_input(features)))

    def linear_head(self) -> tuple[Tensor, Tensor] | None:
        """Returns the head's weight [K, D] and bias [K] in float64, or None if the head is not linear.

        Both are computed from the head's outputs, so a parametrised or otherwise wrapped layer is no special case.
        """
        # The outputs for zero and for the unit vectors are the bias, and the bias plus a column of the weight.
        head, num_features = self.exact_head(), self.num_features
        points = torch.cat([torch.zeros(1, num_features), torch.eye(num_features)]).to(self.mean.device).double()
        with torch.no_grad():
            bias, *_ = answers = head(points)
            weight = (answers[1:] - bias).T
            # Test of linearity at random points.
            probe = torch.randn(8, num_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            probe = probe.to(bias.device)
            expected = head(probe)
        if not torch.allclose(probe @ weight.T + bias, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())):
            return None
        return weight.contiguous(), bias

    def feature_map(self, image: Tensor) -> Tensor:
        """Returns the activations before pooling, [B, C, H, W] -> [B, D, h, w].

        Raises:
            ValueError: If the spec names no feature map.
        """
        return self.activations(image).feature_map

    def activations(self, image: Tensor, levels: Mapping[str, Level] | None = None) -> Activations:
        """Returns all activations that a decoder needs, in one pass.

        Args:
            image: Images in [-1, 1], [B, C, H, W].
            levels: Further layers to return the outputs of, in the form of ``find_levels``.

        Raises:
            ValueError: If the spec names no feature map, or the network lacks one of the layers.
        """
        levels = levels or {}
        names = [("feature_map", self.spec.feature_map), *(("levels", name) for name in levels)]
        ((_, feature_map), *others), logits = self._watch([self._layer(*name) for name in names], image)
        return Activations(
            feature_map=as_feature_map(feature_map, self.spec.feature_map_transform),
            levels=[
                as_feature_map(output, "channels_last" if level.channels_last else "none")
                for (_, output), level in zip(others, levels.values(), strict=True)
            ],
            logits=self._exclusive(logits),
        )

    @torch.no_grad()
    def find_levels(self, names: Sequence[str] | None = None) -> dict[str, Level]:
        """Finds maps of higher resolution than the feature map, nearest in resolution first (``trace_levels``).

        Args:
            names: Layers to take instead of looking for up to three.

        Raises:
            ValueError: If there is no feature map, or a named layer returns no map.
        """
        feature_map = self.feature_map(self._blank(2))
        return trace_levels(self.network, self.spec.channels, self.spec.image_size, feature_map, names=names)

    def maps(self, image: Tensor, names: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """Returns the outputs of the named layers and the logits [B, K] of images [B, C, H, W], in one pass."""
        seen, logits = self._watch([self._layer("levels", name) for name in names], image)
        return [output for _, output in seen], self._exclusive(logits)

    @torch.no_grad()
    def shallow_maps(self, count: int = 2) -> list[str]:
        """Returns the layers with the largest maps below the image's own resolution, which see edges and textures."""
        coarsest, side = torch.zeros(1, 1, 1, 1), self.spec.image_size
        return list(trace_levels(self.network, self.spec.channels, side, coarsest, count=side))[-count:]

    def require_gradient(self) -> None:
        """Checks that a gradient reaches the image.

        Raises:
            ValueError: If none does, as through a program that was exported without gradients.
        """
        with torch.inference_mode(False), torch.enable_grad():
            reached = self(self._blank(1).requires_grad_()).requires_grad
        if not reached:
            raise ValueError(
                f"No gradient reaches the image through this classifier ({type(self.network).__name__}), and this "
                "method needs one: export the network so that it can be differentiated, or choose DiffExplainer, "
                "which needs only logits."
            )

    @torch.no_grad()
    def pooled_feature_map(self) -> Tensor:
        """Returns a feature map [2, D, h, w] after checking that its spatial average is the head's input.

        Raises:
            ValueError: If there is no such map; the message names the closest layer.
        """
        spec = self.spec
        if spec.head is None or spec.feature_map is None:
            reason = why_no_feature_map(self.network, spec.channels, spec.image_size, len(spec.class_names))
        else:
            image = probe_image(self, spec.channels, spec.image_size)
            feature_map, features = self.feature_map(image), self.features(image)
            average = feature_map.mean(dim=(2, 3))
            # Only names given by hand can be wrong here.
            if average.shape == features.shape and torch.allclose(average, features, rtol=1e-3, atol=1e-4):
                return feature_map
            reason = f"the average of {spec.feature_map} is not the input of {spec.head}"
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
        """Returns a SHA-256 over spec and weights: equal exactly when the decisions are."""
        digest = hashlib.sha256(repr(sorted(self.spec.to_dict().items())).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            # Bytes, because a rounded number would hide small changes.
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def with_label(self, label: str) -> FrozenClassifier:
        """Returns a classifier that presents another label of the same multi-label network."""
        return FrozenClassifier(self.network, replace(self.spec, label=label))

    def _blank(self, batch_size: int) -> Tensor:
        """Returns grey images of the network's own size, [B, C, S, S]."""
        spec = self.spec
        return torch.zeros(batch_size, spec.channels, spec.image_size, spec.image_size, device=self.mean.device)

    def _outputs(self, prepared: Tensor) -> Tensor:
        """Returns the logits of all outputs for prepared images, [B, C, S, S] -> [B, N] float32."""
        spec = self.spec
        outputs = logits_of(self.network(prepared), len(prepared), len(spec.class_names))
        if spec.outputs == "logits":
            return outputs
        return logits_of_probabilities(outputs, exclusive=outputs.shape[1] > 1 and spec.label is None)

    def _exclusive(self, logits: Tensor) -> Tensor:
        """Turns the logits of all outputs, [B, N], into float32 logits of K exclusive classes, [B, K]."""
        logits = logits_of(logits, len(logits))
        if self.spec.label is not None:
            index = self.spec.class_names.index(self.spec.label)
            logits = logits[:, index : index + 1]
        # softmax(0, z) is the sigmoid of z.
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits

    def _layer(self, field: str, name: str | None) -> nn.Module:
        """Returns the layer that a field of the spec names; refuses None and unknown names with a ValueError."""
        kind = type(self.network).__name__
        if name is None:
            raise ValueError(
                f"This classifier ({kind}) has no {field.replace('_', ' ')} that this method could read, because none "
                f"was found by tracing: name the layer with {field}=..., or choose a method that needs only logits "
                "(DXAI, StylEx, Steerable Lens or DiffExplainer)."
            )
        try:
            return self.network.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{field} names {name!r}, but {kind} has no such layer.") from error

    def _as_input(self, features: Tensor) -> Tensor:
        return features[:, :, None, None] if self.spec.head_on_cells else features

    @torch.compiler.disable
    def _watch(self, layers: Sequence[nn.Module], image: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Returns inputs and outputs of layers and the network's output; removes its hooks even after an exception."""
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        with ExitStack() as hooks:
            for calls, layer in zip(seen, layers, strict=True):
                # A copy, because a later layer may change the activations in place.
                handle = layer.register_forward_hook(
                    lambda _module, inputs, output, calls=calls: calls.append((inputs[0], output.clone()))
                )
                hooks.callback(handle.remove)
            # Code that was compiled before the hook was registered would not call it.
            with torch.compiler.set_stance("force_eager"):
                logits = self._outputs(self.prepare(image))
        return [calls[-1] for calls in seen], logits


def prepare(image: Tensor, spec: ClassifierSpec, mean: Tensor, std: Tensor) -> Tensor:
    """Turns images [B, C, H, W] in [-1, 1] into the input that a spec describes.

    Args:
        image: Grey or RGB images of any size.
        spec: Channels, size, normalisation and colour order of the network's input.
        mean: The spec's mean as [1, C, 1, 1] on the image's device.
        std: The spec's standard deviation as [1, C, 1, 1] on the image's device.

    Raises:
        ValueError: If the images have neither one nor three channels.
    """
    channels = image.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"Images must be grey (1 channel) or RGB (3 channels), got {channels} channels.")
    if channels < spec.channels:
        image = image.expand(-1, spec.channels, -1, -1)
    elif channels > spec.channels:
        # Luminance weights of ITU-R 601, as in Pillow.
        image = (image * image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    image = images.resize(image, spec.image_size)
    image = (images.to_unit(image) - mean) / std
    return image.flip(1) if spec.bgr else image
