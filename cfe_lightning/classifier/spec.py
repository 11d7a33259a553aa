"""The spec of a classifier: how to feed its network and how to read its outputs, as plain data beside the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any, get_args

from cfe_lightning.classifier.outputs import Outputs
from cfe_lightning.classifier.tracing import FeatureMapTransform, TracedLayers

#: The text fields of a file and their types.
_TEXTS: dict[str, Any] = {"class_path": str} | dict.fromkeys(("head", "feature_map", "label"), str | None)
#: Largest image side in pixels that a file may ask for.
_LARGEST_SIDE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierSpec:
    """Everything needed to feed a network and read its output, as plain data that travels with the weights.

    Attributes:
        class_path: Import path of an ``nn.Module`` class or a ``torchvision.models`` builder.
        init_args: Arguments of that class or builder.
        head: Dotted name of the layer that turns features into logits, for example ``fc``: the last linear layer, or
            the block around it where only the block starts from pooled features; None where there is none to hook.
        class_names: K names in logit order.
        image_size: Side of the network's square input images in pixels.
        mean: Mean per channel on the [0, 1] scale, subtracted from the image; one number for grey, three for RGB.
        std: Standard deviation per channel on the [0, 1] scale, by which the image is divided.
        feature_map: Dotted name of the layer whose output is the map [B, D, h, w]; None where there is none.
        feature_map_transform: Conversion of that layer's output into the map, for example ``relu`` for a DenseNet.
        head_on_cells: The head takes features as maps of one cell, [B, D, 1, 1].
        label: One attribute of a multi-label network, presented as two classes ("not label", "label").
        bgr: The network takes colours as blue, green, red; mean and std are given as red, green, blue all the same.
        outputs: Meaning of the network's outputs; probabilities are turned into logits.

    Raises:
        ValueError: If the fields contradict each other.
    """

    class_path: str
    init_args: dict[str, Any]
    head: str | None
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    feature_map: str | None = None
    feature_map_transform: FeatureMapTransform = "none"
    head_on_cells: bool = False
    label: str | None = None
    bgr: bool = False
    outputs: Outputs = "logits"

    def __post_init__(self) -> None:
        # Class names.
        names = list(self.class_names)
        if self.label is not None and self.label not in names:
            raise ValueError(f"label {self.label!r} is not one of the class names {names}.")
        if len(names) < 2 and self.label is None:
            raise ValueError(f"class_names needs one name per logit and at least two, got {names}.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"class_names must differ from each other, but repeat {', '.join(map(repr, twice[:5]))}: "
                "write each in its own way, as in 'crane (bird)' and 'crane (machine)'."
            )

        # Image format.
        if self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}.")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise ValueError(
                "mean and std need one number per channel (1 for grey, 3 for RGB) on the [0, 1] scale and a positive "
                f"std, got mean {list(self.mean)} and std {list(self.std)}."
            )
        if self.bgr and len(self.mean) != 3:
            raise ValueError("bgr is for networks that take three channels, but mean has one number.")
        if self.outputs not in get_args(Outputs):
            raise ValueError(f"outputs must be logits or probabilities, got {self.outputs!r:.80}.")

    @property
    def channels(self) -> int:
        """Returns the number of image channels: 1 for grey, 3 for RGB."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data for a checkpoint."""
        fields = asdict(self)
        # Left out where it says nothing new, so that files and fingerprints of earlier versions stay the same.
        if self.outputs == "logits":
            del fields["outputs"]
        return fields

    def with_layers(self, layers: TracedLayers) -> ClassifierSpec:
        """Returns the spec with the head and the feature map that tracing found."""
        return replace(self, **asdict(layers))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClassifierSpec:
        """Builds a spec from the data of ``to_dict``; lists become tuples.

        Raises:
            ValueError: If a field is missing, unknown or of another type, or if the fields contradict each other.
        """
        # Types of the fields, because a file may hold anything.
        if unknown := data.keys() - cls.__slots__:
            raise ValueError(f"the classifier has a field {min(unknown)!r} that this version does not know")
        for key, kind in _TEXTS.items():
            if not isinstance(data.get(key), kind):
                raise ValueError(f"{key} of the classifier is {data.get(key)!r:.80} instead of a text")
        for key, kind in (("class_names", str), ("mean", int | float), ("std", int | float)):
            if not isinstance(data.get(key), list | tuple) or not all(isinstance(one, kind) for one in data[key]):
                raise ValueError(f"{key} of the classifier is {data.get(key)!r:.80}")
        arguments = data.get("init_args")
        if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
            raise ValueError(f"init_args of the classifier is {arguments!r:.80}")

        # Ranges of the numbers.
        size = data.get("image_size")
        if not isinstance(size, int) or not 1 <= size <= _LARGEST_SIDE:
            raise ValueError(f"image_size of the classifier is {size!r:.80}, not between 1 and {_LARGEST_SIDE}")
        if not all(isfinite(number) for number in (*data["mean"], *data["std"])):
            raise ValueError("mean or std of the classifier is not finite")
        return cls(**(data | {key: tuple(data[key]) for key in ("class_names", "mean", "std")}))
