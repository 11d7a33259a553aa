"""Finds a network's head and feature map by watching forward passes, so that no layer name has to be known.

Source: Mirror-CFE, section 9.1, rules 1 to 3. Letters: D features, L tokens, h, w cells of the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

#: How a layer's output becomes the map [B, D, h, w] whose spatial mean the head sees.
FeatureMapTransform = Literal["none", "relu", "channels_last", "tokens", "tokens_without_first"]

_TOLERANCE = 1e-5
_LARGEST_PROBE = 512
_VIEWS = ("Squeeze", "Unsqueeze", "View", "UnsafeView", "Reshape", "Select", "Slice", "Alias")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedLayers:
    """What watching reveals.

    Attributes:
        head: Dotted name of the layer that turns features [B, D] into logits; or None. The last linear layer, unless
            only a block around it (norm, hidden layers) starts from pooled features.
        head_on_cells: Whether that block takes maps, so that features have to come as [B, D, 1, 1].
        feature_map: Dotted name of the layer whose (transformed) output averages to the head's input; or None.
        feature_map_transform: What is to be done with that layer's output.
    """

    head: str | None
    feature_map: str | None
    feature_map_transform: FeatureMapTransform = "none"
    head_on_cells: bool = False


def probe_image(network: nn.Module, channels: int, image_size: int, batch_size: int = 2) -> Tensor:
    """Noise that is the same every time, on the network's device and in its precision, [B, C, S, S]."""
    noise = torch.randn(batch_size, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    floating = (parameter for parameter in network.parameters() if parameter.is_floating_point())
    return noise.to(next(floating, noise))


def trace_layers(
    network: nn.Module, channels: int, image_size: int, *, head: str | None = None, feature_map: str | None = None
) -> TracedLayers:
    """Watches forward passes in eval mode; neither hooks nor a changed mode stay behind, even after an exception.

    Args:
        network: Maps [B, C, S, S] to logits [B, K], [B, 1] or [B].
        channels: C.
        image_size: S. Where the map has a single cell (and so cannot be told from its average) the network is watched
            at larger sizes too.
        head: Takes this layer for the head instead of looking for one.
        feature_map: Takes this layer for the feature map and finds only what is to be done with its output.

    Raises:
        ValueError: If the ``head`` given does not produce the logits.
    """
    with _evaluating(network), torch.no_grad():
        image = probe_image(network, channels, image_size)
        found_head, features = _find_head(network, image, head)
        if features is None:
            return TracedLayers(head=found_head, feature_map=feature_map)
        name, transform, single_cell = _find_map(network, image, features, feature_map)
        size = 2 * image_size
        while name is None and single_cell and size <= _LARGEST_PROBE:
            image = probe_image(network, channels, size)
            try:
                _, features = _find_head(network, image, found_head)
                assert features is not None, "the head was found at the smaller size"
                name, transform, single_cell = _find_map(network, image, features, feature_map)
            # A network for one size only refuses others, each in its own words; then there is no map to be found.
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
                break
            size *= 2
        if name is None and head is None:
            block = _find_block(network, probe_image(network, channels, image_size), feature_map)
            if block is not None:
                return block
    return TracedLayers(head=found_head, feature_map=name or feature_map, feature_map_transform=transform)


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One of a network's maps at higher resolution than its feature map.

    Attributes:
        size: Channels, height and width.
        channels_last: Whether the layer returns [B, h, w, D].
        non_negative: Whether it comes from a ReLU.
    """

    size: tuple[int, int, int]
    channels_last: bool
    non_negative: bool


def trace_levels(
    network: nn.Module,
    channels: int,
    image_size: int,
    feature_map: Tensor,
    *,
    names: Sequence[str] | None = None,
    count: int = 3,
) -> dict[str, Level]:
    """The maps between a network's input and its feature map, nearest to the feature map first.

    For every resolution in between: the layer nested least deeply, and of those the last one called (Mirror-CFE,
    section 9.1, rule 4).

    Args:
        network: Maps [B, C, S, S] to logits.
        channels: C.
        image_size: S.
        feature_map: Any feature map of it, [B, D, h, w].
        names: Takes these layers in this order instead of looking for some.
        count: At most so many.

    Raises:
        ValueError: If a name given is no layer that returns a map, or the maps given shrink.
    """
    image = probe_image(network, channels, image_size)
    calls: dict[str, Level] = {}

    def look(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4:
            return
        last = output.shape[1] == output.shape[2] != output.shape[3]
        shape = output.permute(0, 3, 1, 2).shape if last else output.shape
        calls.pop(name, None)  # a layer called twice counts where it was called last
        calls[name] = Level(
            size=(shape[1], shape[2], shape[3]), channels_last=last, non_negative=bool((output >= 0).all())
        )

    with _evaluating(network), torch.no_grad():
        _watch(network, image, look)
    if names is not None:
        for name in names:
            if name not in calls:
                raise ValueError(f"levels names {name!r}, which is no layer that returns a map [B, D, h, w].")
        sides = [calls[name].size[1] for name in names]
        if sides != sorted(sides):
            raise ValueError(f"levels must begin nearest to the feature map and not shrink, but have sides {sides}.")
        return {name: calls[name] for name in names}
    best: dict[int, str] = {}
    for name, level in calls.items():
        side = level.size[1]
        if not feature_map.shape[2] < side < image_size or level.size[2] != side:
            continue
        if side not in best or name.count(".") <= best[side].count("."):
            best[side] = name
    return {best[side]: calls[best[side]] for side in sorted(best)[:count]}


def why_no_feature_map(network: nn.Module, channels: int, image_size: int) -> str:
    """Why no feature map of a network averages to what its head reads: one clause, with the closest layer.

    Args:
        network: Maps [B, C, S, S] to logits.
        channels: C.
        image_size: S.
    """
    kind = type(network).__name__
    linear: list[tuple[str, Tensor, Tensor]] = []
    outputs: list[tuple[str, Tensor]] = []

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((name, output.clone()))
            if isinstance(module, nn.Linear):
                linear.append((name, inputs[0].clone(), output.clone()))

    with _evaluating(network), torch.no_grad():
        logits = _watch(network, probe_image(network, channels, image_size), look)
    if not linear:
        return f"{kind} has no linear layer that could be watched"
    name, features, output = linear[-1]
    if not _returns(output, logits):
        return f"in {kind} the last linear layer, {name}, does not return the logits"
    head = f"in {kind} the last linear layer is {name} ({features.shape[-1]} inputs)"
    if features.ndim != 2:
        return f"{head}, but it reads {list(features.shape)} instead of one row per image"
    closest: tuple[float, str] | None = None
    for layer, value in outputs:
        for transform in get_args(FeatureMapTransform):
            if _fits(value, transform, features.shape[1]):
                candidate = as_feature_map(value, transform)
                if candidate.shape[2] * candidate.shape[3] == 1:
                    continue
                average = candidate.mean(dim=(2, 3))
                error = float((average - features).norm() / features.norm().clamp_min(1e-12))
                closest = min(closest or (error, layer), (error, layer))
    if closest is None:
        return f"{head}, but no layer returns a map of so many channels"
    return f"{head}, but no layer's output averages to them (closest: {closest[1]}, relative error {closest[0]:.2g})"


def as_feature_map(output: Tensor, transform: FeatureMapTransform) -> Tensor:
    """A layer's output [B, D, h, w], [B, h, w, D] or [B, L, D] (h = w = sqrt(L)) to the feature map [B, D, h, w]."""
    if transform == "relu":
        return output.relu()
    if transform == "channels_last":
        return output.permute(0, 3, 1, 2)
    if transform in ("tokens", "tokens_without_first"):
        tokens = output[:, 1:] if transform == "tokens_without_first" else output
        side = math.isqrt(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (side, side))
    return output


def returns_probabilities(network: nn.Module, image: Tensor) -> bool:
    """Whether the network ends in a softmax or sigmoid, so that its output is no logits.

    Args:
        network: The network.
        image: Any input of it; a one-output network is judged by its last operation, others also by their sums.
    """
    with _evaluating(network), torch.enable_grad():
        output = network(image.clone().requires_grad_())
    last = output.grad_fn
    while last is not None and last.name().startswith(_VIEWS):
        last = last.next_functions[0][0]
    if last is not None and last.name().startswith(("Softmax", "Sigmoid")):
        return True
    if output.ndim != 2 or output.shape[1] < 2:
        return False
    sums = output.detach().sum(dim=1)
    return bool((output >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4))


def _find_head(network: nn.Module, image: Tensor, only: str | None) -> tuple[str | None, Tensor | None]:
    """Rule 2: the last linear layer whose output is the logits, and its input [B, D]."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        wanted = name == only if only is not None else isinstance(module, nn.Linear)
        if wanted and inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((name, inputs[0].clone(), output.clone()))

    logits = _watch(network, image, look)
    for name, features, output in reversed(calls):
        if features.ndim == 2 and _returns(output, logits):
            return name, features
    if only is not None and only in dict(network.named_modules()):
        raise ValueError(
            f"head names {only!r}, but that layer does not turn features [B, D] into the logits of "
            f"{type(network).__name__}: name its last linear layer, or leave head out."
        )
    return only, None


def _find_block(network: nn.Module, image: Tensor, only: str | None) -> TracedLayers | None:
    """A head of several layers (ConvNeXt, MobileNetV3): the innermost block from pooled features to the logits."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((name, module, inputs[0].clone(), output.clone()))

    logits = _watch(network, image, look)
    for name, module, given, output in calls:
        if given.ndim not in (2, 4) or output.shape != logits.shape or not _equal(output, logits):
            continue
        features = given if given.ndim == 2 else given.mean(dim=(2, 3))
        # A block that pools for itself has to say the same of the pooled map.
        if given.ndim == 4 and not _equal(module(features[:, :, None, None]), logits):
            continue
        feature_map, transform, _ = _find_map(network, image, features, only)
        if feature_map is not None:
            return TracedLayers(
                head=name, head_on_cells=given.ndim == 4, feature_map=feature_map, feature_map_transform=transform
            )
    return None


def _find_map(
    network: nn.Module, image: Tensor, features: Tensor, only: str | None
) -> tuple[str | None, FeatureMapTransform, bool]:
    """Rule 3: the last output that averages to the features; and whether one with a single cell does."""
    found: list[tuple[str | None, FeatureMapTransform]] = [(None, "none")]
    single_cell: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or (only is not None and name != only):
            return
        for transform in get_args(FeatureMapTransform):
            if not _fits(output, transform, features.shape[1]):
                continue
            candidate = as_feature_map(output, transform)
            if _equal(candidate.mean(dim=(2, 3)), features):
                if candidate.shape[2] * candidate.shape[3] == 1:
                    single_cell.append(name)
                else:
                    found.append((name, transform))
                return

    _watch(network, image, look)
    name, transform = found[-1]
    return name, transform, bool(single_cell)


def _fits(output: Tensor, transform: FeatureMapTransform, num_features: int) -> bool:
    """Whether an output has the rank, the features and the cells that a transform needs."""
    if transform in ("none", "relu"):
        return output.ndim == 4 and output.shape[1] == num_features
    if transform == "channels_last":
        return output.ndim == 4 and output.shape[3] == num_features
    if output.ndim != 3 or output.shape[2] != num_features:
        return False
    cells = output.shape[1] - (transform == "tokens_without_first")
    return cells > 0 and math.isqrt(cells) ** 2 == cells


def _equal(value: Tensor, reference: Tensor) -> bool:
    """Relative error below 1e-5; all zeros equal nothing, or a dead network would match everywhere."""
    scale = reference.norm()
    return bool(scale > 0 and (value - reference).norm() <= _TOLERANCE * scale)


def _returns(output: Tensor, logits: Tensor) -> bool:
    """Whether a layer's output is the network's, whatever their shapes."""
    if output.numel() != logits.numel():
        return False
    output, logits = output.flatten(), logits.flatten()
    # A head that starts at zero (torchvision's ViT) has logits 0, which no relative error can compare.
    return torch.equal(output, logits) or _equal(output, logits)


def _watch(network: nn.Module, image: Tensor, look: Callable[[str, nn.Module, Any, Any], None]) -> Tensor:
    """Runs the network and shows every layer's input and output to ``look`` at the moment they exist."""
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if name:
                handle = module.register_forward_hook(
                    lambda module, inputs, output, name=name: look(name, module, inputs, output)
                )
                hooks.callback(handle.remove)
        # Code that was compiled before the hooks were there would not call them.
        with torch.compiler.set_stance("force_eager"):
            return network(image)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode for a moment."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
