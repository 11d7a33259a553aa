"""Classifier files: builds the network that a file names, loads its weights and checks its outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfe_lightning.classifier.frozen import FrozenClassifier
from cfe_lightning.classifier.outputs import logits_of
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import probe_image
from cfe_lightning.files.formats import foreign_format
from cfe_lightning.files.tensors import LargerThanFileError, allocation_limit, load_plain
from cfe_lightning.files.text import one_line
from cfe_lightning.files.trust import resolve_class_path

#: Arguments that make torchvision's builders download weights.
_DOWNLOADS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


def load_classifier(path: str, trusted: list[str] | None = None) -> FrozenClassifier:
    """Reads a classifier file written by ``FrozenClassifier.save`` or by ``train.py --config classifier_<data>.yaml``.

    Args:
        path: Path of the classifier file.
        trusted: Packages besides cfe_lightning and torchvision whose classes the file may name; the word
            ``exported_program`` lets it hold a TorchScript or torch.export program.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a classifier file, or names a class that is not trusted.
    """
    file = Path(path)
    if not file.is_file():
        if what := foreign_format(path):
            raise FileNotFoundError(f"{path} is {what}.")
        raise FileNotFoundError(
            f"There is no classifier file {file}: train one with `python train.py --config classifier_<data>.yaml`, "
            "or take your own network with cfe_lightning.classifier.wrap_classifier."
        )

    # Plain data of the file.
    try:
        spec, weights = _read(file)
    except ValueError as error:
        if what := foreign_format(file, error):
            raise ValueError(f"{file} is not a classifier file of cfe_lightning, but {what}.") from error
        raise ValueError(
            f"{file} is not a classifier file of cfe_lightning ({str(error).rstrip('.')}): for a plain state dict use "
            "cfe_lightning.classifier.wrap_classifier or torchvision_classifier."
        ) from error

    # Network with the file's weights.
    with allocation_limit(file):
        network = build_network(spec, trusted or ())
    fill(network, weights, str(file), spec.class_path)
    classifier = FrozenClassifier(network, spec)
    check_outputs(classifier, str(file))
    return classifier


def is_classifier_file(path: Path) -> bool:
    """Tells whether a file holds a spec and weights; builds no network."""
    try:
        return path.is_file() and bool(_read(path))
    except (OSError, ValueError):
        return False


def build_network(spec: ClassifierSpec, trusted: Sequence[str] = ()) -> nn.Module:
    """Builds the spec's network without weights; ``trusted`` as in ``load_classifier``.

    Raises:
        ValueError: If the class path is refused (see ``resolve_class_path``), if the class does not take the spec's
            arguments, or if these ask for weights from the internet.
    """
    kind = resolve_class_path(spec.class_path, trusted)

    # No downloads.
    downloads = [name for name in _DOWNLOADS if not any(spec.init_args.get(name) is none for none in (None, False))]
    if spec.class_path.startswith("torchvision.") and downloads:
        raise ValueError(
            f"{spec.class_path} is to be built with {downloads[0]} {spec.init_args[downloads[0]]!r:.80}, which would "
            "download, but a file's network is built without weights: leave that argument out, or use torchvision's "
            "weights with cfe_lightning.classifier.torchvision_classifier."
        )

    # Construction.
    try:
        network = kind(**spec.init_args)
    except LargerThanFileError:
        raise
    # A constructor may raise anything.
    except Exception as error:
        raise ValueError(
            f"{spec.class_path} cannot be built with init_args {spec.init_args!s:.300}: {one_line(error)}."
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{spec.class_path} builds a {type(network).__name__} and not a network.")
    return network


def fill(network: nn.Module, weights: dict[str, Any], file: str, kind: str) -> None:
    """Loads a file's weights, by name, into the network that was built for them.

    Raises:
        ValueError: If names or shapes differ; the message names the ``file`` and the network's class, ``kind``.
    """
    odd = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(f"The weights in {file} do not fit {kind}: {odd!r:.80} is a {type(weights[odd]).__name__}.")
    try:
        network.load_state_dict(weights)
    # A network may load its weights in its own way and raise anything.
    except Exception as error:
        raise ValueError(f"The weights in {file} do not fit {kind}: {one_line(error)}.") from error


def check_outputs(classifier: FrozenClassifier, file: str) -> None:
    """Checks that a file's network takes the images and returns the classes of the file's spec.

    Raises:
        ValueError: If the network does not answer one image with one number per class; the message names the ``file``.
    """
    spec, network = classifier.spec, classifier.network
    image = probe_image(network, spec.channels, spec.image_size, batch_size=1)
    try:
        with torch.no_grad():
            output = logits_of(network(image), 1, len(spec.class_names))
    # A network may raise anything on images that it was not made for.
    except Exception as error:
        raise ValueError(
            f"The network in {file} cannot take the images {list(image.shape)} of the file's spec: {one_line(error)}."
        ) from error

    # Two classes may be one output before a sigmoid.
    num_names = len(spec.class_names)
    num_outputs = output.shape[1]
    if num_outputs != num_names and not (num_outputs == 1 and num_names == 2):
        raise ValueError(
            f"The network in {file} has {num_outputs} outputs, but the file's spec names {num_names} classes: use a "
            "file that train.py or save() wrote."
        )


def _read(file: Path) -> tuple[ClassifierSpec, dict[str, Any]]:
    content = load_plain(file)
    return ClassifierSpec.from_dict(_part(content, "classifier")), _part(content, "state_dict")


def _part(content: Any, key: str) -> dict[str, Any]:
    """Returns one dictionary of a file's content; its keys are texts."""
    if isinstance(content, dict) and {"explainer", "classifier"} <= content.keys():
        raise ValueError("it is the checkpoint of an explainer")
    part = content.get(key) if isinstance(content, dict) else None
    if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
        raise ValueError(f"it holds no {key.replace('_', ' ')}")
    return part
