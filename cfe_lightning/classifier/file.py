"""A classifier's file: building the network it names, filling it, and checking what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfe_lightning.classifier.frozen import FrozenClassifier
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import (
    probe_image,
)
from cfe_lightning.files.tensors import LargerThanFileError, allocation_limit, load_plain
from cfe_lightning.files.trust import resolve_class_path

#: Arguments at which torchvision's builders download.
_DOWNLOADS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


def build_network(spec: ClassifierSpec, trusted: Sequence[str] = ()) -> nn.Module:
    """Builds the spec's network without weights.

    Raises:
        ValueError: If the class path is refused (see ``resolve_class_path``), does not take the spec's arguments, or
            these ask for weights from the internet.
    """
    kind = resolve_class_path(spec.class_path, trusted)
    downloads = [name for name in _DOWNLOADS if not any(spec.init_args.get(name) is none for none in (None, False))]
    if spec.class_path.startswith("torchvision.") and downloads:
        raise ValueError(
            f"{spec.class_path} is to be built with {downloads[0]} {spec.init_args[downloads[0]]!r:.80}, which would "
            "download, but a file's network is built without weights: leave that argument out, or make a classifier "
            "of torchvision's own weights with cfe_lightning.classifier.torchvision_classifier."
        )
    try:
        network = kind(**spec.init_args)
    except LargerThanFileError:
        raise
    # Every network refuses in its own words what it was not made for.
    except Exception as error:
        raise ValueError(
            f"{spec.class_path} cannot be built with init_args {spec.init_args!s:.300}: "
            f"{str(error) or type(error).__name__}."
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{spec.class_path} is no network but a {type(network).__name__}.")
    return network


def load_classifier(path: str, trusted: list[str] | None = None) -> FrozenClassifier:
    """Reads a classifier file written by ``FrozenClassifier.save`` or by ``train.py --config classifier_<data>.yaml``.

    Args:
        path: The file.
        trusted: Packages besides cfe_lightning and torchvision whose classes the file may name; the word
            ``exported_program`` lets it hold a TorchScript or torch.export program.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no classifier file, or names what is not trusted.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no classifier file {file}: train one with `python train.py --config classifier_<data>.yaml`, "
            "or take your own network with cfe_lightning.classifier.wrap_classifier."
        )
    try:
        spec, weights = _read(file)
    except ValueError as error:
        raise ValueError(
            f"{file} is not a classifier file of cfe_lightning ({str(error).rstrip('.')}): for a plain state dict use "
            "cfe_lightning.classifier.wrap_classifier or torchvision_classifier."
        ) from error
    with allocation_limit(file):
        network = build_network(spec, trusted or ())
    fill(network, weights, str(file), spec.class_path)
    classifier = FrozenClassifier(network, spec)
    check_outputs(classifier, str(file))
    return classifier


def is_classifier_file(path: Path) -> bool:
    """Whether a file holds what ``load_classifier`` reads; nothing is built."""
    try:
        return path.is_file() and bool(_read(path))
    except (OSError, ValueError):
        return False


def check_outputs(classifier: FrozenClassifier, file: str) -> None:
    """Refuses a file whose network does not take the images or give the classes that its description says.

    Args:
        classifier: With the file's weights.
        file: Its name, for the message.

    Raises:
        ValueError: If one image is not answered by one number for each class; one sentence.
    """
    spec, network = classifier.spec, classifier.network
    image = probe_image(network, spec.channels, spec.image_size, batch_size=1)
    try:
        with torch.no_grad():
            output = network(image)
    # Every network refuses in its own words what it was not made for.
    except Exception as error:
        raise ValueError(
            f"The network in {file} cannot take the images {list(image.shape)} that its description asks for: "
            f"{' '.join(str(error).split())[:300]}."
        ) from error
    names = len(spec.class_names)
    outputs = output.numel() if isinstance(output, Tensor) else 0
    if outputs != names and not (outputs == 1 and names == 2):
        raise ValueError(
            f"The network in {file} has {outputs} outputs, but its description names {names} classes: use a file that "
            "train.py or save() wrote."
        )


def fill(network: nn.Module, weights: dict[str, Any], file: str, kind: str) -> None:
    """Loads a file's weights into the network that was built for them.

    Args:
        network: What was built from the same file.
        weights: Tensors by name.
        file: Where they are from, for the message.
        kind: What the network is, likewise.

    Raises:
        ValueError: If names or shapes are others; one sentence.
    """
    odd = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(f"The weights in {file} do not fit {kind}: {odd!r:.80} is a {type(weights[odd]).__name__}.")
    try:
        network.load_state_dict(weights)
    # Networks may read their weights in their own way.
    except Exception as error:
        raise ValueError(f"The weights in {file} do not fit {kind}: {' '.join(str(error).split())[:300]}") from error


def _read(file: Path) -> tuple[ClassifierSpec, dict[str, Any]]:
    """Description and weights of a classifier file."""
    content = load_plain(file)
    return ClassifierSpec.from_dict(_part(content, "classifier")), _part(content, "state_dict")


def _part(content: Any, key: str) -> dict[str, Any]:
    """A dictionary of a file, by text."""
    if isinstance(content, dict) and {"explainer", "classifier"} <= content.keys():
        raise ValueError("it is the checkpoint of an explainer")
    part = content.get(key) if isinstance(content, dict) else None
    if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
        raise ValueError(f"it holds no {key.replace('_', ' ')}")
    return part
