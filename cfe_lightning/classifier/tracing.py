"""Finds a network's head and feature map by watching forward passes, so that no layer name has to be known.

The head is the last linear layer that returns the logits. The feature map is the last output of a layer whose average
over all cells is the head's input. Letters: D features, L tokens, h, w cells of the feature map.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cfe_lightning.classifier.outputs import logits_of

#: Conversion of a layer's output into the map [B, D, h, w] whose spatial mean is the head's input.
FeatureMapTransform = Literal["none", "relu", "channels_last", "tokens", "tokens_without_first"]

#: Largest relative error of equal tensors.
_TOLERANCE = 1e-5
#: Largest image side in pixels at which a network is watched.
_LARGEST_PROBE = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedLayers:
    """The layers that an explainer reads, as far as tracing finds them.

    Attributes:
        head: Dotted name of the layer that turns features [B, D] into logits: the last linear layer, or the block
            around it (norm, hidden layers) where only the block starts from pooled features; None if not found.
        head_on_cells: The head takes features as maps of one cell, [B, D, 1, 1].
        feature_map: Dotted name of the layer whose transformed output averages to the head's input; None if not found.
        feature_map_transform: Conversion of that layer's output into the map.
    """

    head: str | None
    feature_map: str | None
    feature_map_transform: FeatureMapTransform = "none"
    head_on_cells: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One of a network's maps at higher resolution than its feature map.

    Attributes:
        size: Channels, height and width of the map.
        channels_last: The layer returns [B, h, w, D].
        non_negative: The map has no negative value, as after a ReLU.
    """

    size: tuple[int, int, int]
    channels_last: bool
    non_negative: bool


def probe_image(network: nn.Module, channels: int, image_size: int, batch_size: int = 2) -> Tensor:
    """Returns the same noise every time, on the network's device and in its precision, [B, C, S, S]."""
    noise = torch.randn(batch_size, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    floating = (parameter for parameter in network.parameters() if parameter.is_floating_point())
    return noise.to(next(floating, noise))


def trace_layers(
    network: nn.Module,
    channels: int,
    image_size: int,
    *,
    head: str | None = None,
    feature_map: str | None = None,
    num_classes: int | None = None,
) -> TracedLayers:
    """Finds head and feature map in eval mode; restores hooks and mode even after an exception.

    Args:
        network: Network from [B, C, S, S] to logits [B, K], [B, 1] or [B].
        channels: Number of image channels, C.
        image_size: Image side S in pixels. A map of a single cell equals its average, so larger sizes are tried too.
        head: Layer to take for the head; None looks for it.
        feature_map: Layer to take for the feature map, of which only the transform is found; None looks for it.
        num_classes: Number of class names, by which the logits are chosen where a network returns several tensors.

    Raises:
        ValueError: If the given ``head`` does not produce the logits.
    """
    with evaluating(network), torch.no_grad():
        image = probe_image(network, channels, image_size)
        found_head, features = _find_head(network, image, head, num_classes)
        if features is None:
            return TracedLayers(head=found_head, feature_map=feature_map)
        name, transform, single_cell = _find_map(network, image, features, feature_map)

        # Larger images, until the map has several cells.
        size = 2 * image_size
        while name is None and single_cell and size <= _LARGEST_PROBE:
            larger = probe_image(network, channels, size)
            try:
                _, features = _find_head(network, larger, found_head, num_classes)
                assert features is not None, "the head was found at the smaller size"
                name, transform, single_cell = _find_map(network, larger, features, feature_map)
            # A network for one size may raise any of these on others; then there is no map to be found.
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
                break
            size *= 2

        # A head of several layers.
        if name is None and head is None and (block := _find_block(network, image, feature_map, num_classes)):
            return block
    return TracedLayers(head=found_head, feature_map=name or feature_map, feature_map_transform=transform)


def trace_levels(
    network: nn.Module,
    channels: int,
    image_size: int,
    feature_map: Tensor,
    *,
    names: Sequence[str] | None = None,
    count: int = 3,
) -> dict[str, Level]:
    """Finds the maps between a network's input and its feature map, nearest to the feature map first.

    Of every resolution in between it takes the least deeply nested layer, and of several the last one called.

    Args:
        network: Network from [B, C, S, S] to logits.
        channels: Number of image channels, C.
        image_size: Image side S in pixels.
        feature_map: Any feature map of the network, [B, D, h, w].
        names: Layers to take, in this order; None looks for them.
        count: Largest number of maps to look for.

    Raises:
        ValueError: If a named layer returns no map, or the maps of the named layers shrink.
    """
    calls: dict[str, Level] = {}

    def look(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.ndim == 4:
            last = output.shape[1] == output.shape[2] != output.shape[3]
            shape = output.permute(0, 3, 1, 2).shape if last else output.shape
            calls.pop(name, None)  # a layer called twice counts where it was called last
            size = (shape[1], shape[2], shape[3])
            calls[name] = Level(size=size, channels_last=last, non_negative=bool((output >= 0).all()))

    with evaluating(network), torch.no_grad():
        _watch(network, probe_image(network, channels, image_size), look)

    # Named layers.
    if names is not None:
        for name in names:
            if name not in calls:
                raise ValueError(f"levels names {name!r}, which is no layer that returns a map [B, D, h, w].")
        sides = [calls[name].size[1] for name in names]
        if sides != sorted(sides):
            raise ValueError(f"levels must begin nearest to the feature map and not shrink, but have sides {sides}.")
        return {name: calls[name] for name in names}

    # One layer per resolution.
    best: dict[int, str] = {}
    for name, level in calls.items():
        _, height, width = level.size
        between = feature_map.shape[2] < height == width < image_size
        if between and (height not in best or name.count(".") <= best[height].count(".")):
            best[height] = name
    return {best[side]: calls[best[side]] for side in sorted(best)[:count]}


def why_no_feature_map(network: nn.Module, channels: int, image_size: int, num_classes: int | None = None) -> str:
    """Explains in one clause why no map averages to the head's input, and names the closest layer."""
    kind, image = type(network).__name__, probe_image(network, channels, image_size)
    with evaluating(network), torch.no_grad():
        # Head.
        linear, logits = _record(
            network, image, lambda _name, module, _inputs: isinstance(module, nn.Linear), num_classes
        )
        if not linear:
            return f"{kind} has no linear layer that could be watched"
        name, _, features, output = linear[-1]
        if not _returns(output, logits):
            return f"in {kind} the last linear layer, {name}, does not return the logits"
        head = f"in {kind} the last linear layer is {name} ({features.shape[-1]} inputs)"
        if features.ndim != 2:
            return f"{head}, but it reads {list(features.shape)} instead of one row per image"

        # Maps of as many channels.
        errors: list[tuple[float, str]] = []

        def look(layer: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            for _, candidate in _candidates(output, features.shape[1]):
                if candidate.shape[2:].numel() > 1:
                    difference = candidate.mean(dim=(2, 3)) - features
                    errors.append((float(difference.norm() / features.norm().clamp_min(1e-12)), layer))

        _watch(network, image, look)
    if not errors:
        return f"{head}, but no layer returns a map with that number of channels"
    error, layer = min(errors)
    return f"{head}, but no layer's output averages to them (closest: {layer}, relative error {error:.2g})"


def as_feature_map(output: Tensor, transform: FeatureMapTransform) -> Tensor:
    """Turns a layer's output [B, D, h, w], [B, h, w, D] or [B, L, D] (h = w = sqrt(L)) into the map [B, D, h, w]."""
    if transform == "relu":
        return output.relu()
    if transform == "channels_last":
        return output.permute(0, 3, 1, 2)
    if transform in ("tokens", "tokens_without_first"):
        # The first may be a class token; the others are in reading order.
        tokens = output[:, 1:] if transform == "tokens_without_first" else output
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (side, side))
    return output


def _find_head(
    network: nn.Module, image: Tensor, only: str | None, num_classes: int | None
) -> tuple[str | None, Tensor | None]:
    """Returns the last linear layer, or the layer ``only``, that returns the logits, and its input [B, D]."""
    calls, logits = _record(
        network,
        image,
        lambda name, module, _inputs: isinstance(module, nn.Linear) if only is None else name == only,
        num_classes,
    )
    for name, _, features, output in reversed(calls):
        if features.ndim == 2 and _returns(output, logits):
            return name, features
    if only is not None and only in dict(network.named_modules()):
        raise ValueError(
            f"head names {only!r}, but that layer does not turn features [B, D] into the logits of "
            f"{type(network).__name__}: name its last linear layer, or leave head out."
        )
    return only, None


def _find_block(network: nn.Module, image: Tensor, only: str | None, num_classes: int | None) -> TracedLayers | None:
    """Finds a head of several layers (ConvNeXt, MobileNetV3): the innermost block from pooled features to logits."""
    calls, logits = _record(network, image, lambda _name, _module, inputs: len(inputs) == 1, num_classes)
    for name, module, given, output in calls:
        if given.ndim not in (2, 4) or output.shape != logits.shape or not _equal(output, logits):
            continue
        # A block that pools by itself must return the same for the pooled map.
        features = given if given.ndim == 2 else given.mean(dim=(2, 3))
        if given.ndim == 4 and not _takes_cells(module, features, logits):
            continue
        feature_map, transform, _ = _find_map(network, image, features, only)
        if feature_map is not None:
            return TracedLayers(
                head=name, head_on_cells=given.ndim == 4, feature_map=feature_map, feature_map_transform=transform
            )
    return None


def _takes_cells(module: nn.Module, features: Tensor, logits: Tensor) -> bool:
    """Tells whether a module turns features as maps of one cell into the logits."""
    try:
        answer = module(features[:, :, None, None])
    # A module may raise anything on a map of one cell, such as a flattened one of another length: it is not the head.
    except Exception:
        return False
    return isinstance(answer, Tensor) and answer.shape == logits.shape and _equal(answer, logits)


def _find_map(
    network: nn.Module, image: Tensor, features: Tensor, only: str | None
) -> tuple[str | None, FeatureMapTransform, bool]:
    """Returns the last output that averages to the features, and whether an output of a single cell equals them."""
    found: list[tuple[str | None, FeatureMapTransform]] = [(None, "none")]
    single_cell: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        if only is not None and name != only:
            return
        # The first transform that fits.
        for transform, candidate in _candidates(output, features.shape[1]):
            if _equal(candidate.mean(dim=(2, 3)), features):
                if candidate.shape[2:].numel() == 1:
                    single_cell.append(name)
                else:
                    found.append((name, transform))
                return

    _watch(network, image, look)
    return *found[-1], bool(single_cell)


def _candidates(output: Tensor, num_features: int) -> Iterator[tuple[FeatureMapTransform, Tensor]]:
    """Yields the maps [B, D, h, w] of ``num_features`` features that the transforms make of a layer's output."""
    transforms: list[FeatureMapTransform] = []
    if output.ndim == 4 and output.shape[1] == num_features:
        transforms += ["none", "relu"]
    if output.ndim == 4 and output.shape[3] == num_features:
        transforms += ["channels_last"]
    if output.ndim == 3 and output.shape[2] == num_features:
        cells: dict[FeatureMapTransform, int] = {"tokens": output.shape[1], "tokens_without_first": output.shape[1] - 1}
        transforms += [name for name, number in cells.items() if number > 0 and math.isqrt(number) ** 2 == number]
    for transform in transforms:
        yield transform, as_feature_map(output, transform)


def _equal(value: Tensor, reference: Tensor) -> bool:
    """Tells whether the relative error is below 1e-5; a reference of zeros (a dead network) equals nothing."""
    scale = reference.norm()
    return bool(scale > 0 and (value - reference).norm() <= _TOLERANCE * scale)


def _returns(output: Tensor, logits: Tensor) -> bool:
    """Tells whether a layer's output holds the logits, whatever the two shapes are."""
    if output.numel() != logits.numel():
        return False
    output, logits = output.flatten(), logits.flatten()
    # A head that starts at zero (torchvision's ViT) has logits 0, for which there is no relative error.
    return torch.equal(output, logits) or _equal(output, logits)


def _record(
    network: nn.Module, image: Tensor, wanted: Callable[[str, nn.Module, Any], bool], num_classes: int | None
) -> tuple[list[tuple[str, nn.Module, Tensor, Tensor]], Tensor]:
    """Returns each call of a wanted layer (its name, the layer, its first input, its output), and the logits."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if inputs and isinstance(inputs[0], Tensor) and wanted(name, module, inputs):
            # Copies, because later layers may change both in place.
            calls.append((name, module, inputs[0].clone(), output.clone()))

    return calls, logits_of(_watch(network, image, look), len(image), num_classes)


def _watch(network: nn.Module, image: Tensor, look: Callable[[str, nn.Module, Any, Tensor], None]) -> Any:
    """Returns the network's answer, and shows every layer that returns a tensor to ``look`` when it has been called."""

    def show(module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            look(name, module, inputs, output)

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(partial(show, name=name)).remove)
        # Code that was compiled before the hooks were registered would not call them.
        with torch.compiler.set_stance("force_eager"):
            # A copy, because the network may change its input in place.
            return network(image.clone())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Puts the network into eval mode and afterwards every module back into its own mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
