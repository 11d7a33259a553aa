"""Makes frozen classifiers from other sources than our own files: torchvision, a user's class, an exported program.

Every function returns a ``FrozenClassifier`` and so is a ``class_path`` in YAML. A user who names a class or a program
here consents to run it; the allow-list of ``files.trust.resolve_class_path`` is for the classes that files name.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from cfe_lightning.classifier.exported import ExportedNetwork
from cfe_lightning.classifier.frozen import FrozenClassifier
from cfe_lightning.classifier.outputs import Outputs, logits_of
from cfe_lightning.classifier.probes import check_network
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import probe_image, trace_layers
from cfe_lightning.classifier.weights import load_weights
from cfe_lightning.files.text import one_line
from cfe_lightning.files.trust import TRUST_EXPORTED, check_exported_trusted, public_path, resolve_class_path

_log = logging.getLogger(__name__)
#: torchvision's networks with further outputs for training, and the prefixes of those outputs' weights.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def is_torchvision_network(name: str) -> bool:
    """Tells whether torchvision has a classification network of this name."""
    return name in models.list_models(module=models)


def torchvision_classifier(
    name: str,
    weights: str | None = None,
    class_names: list[str] | None = None,
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    init_args: dict[str, Any] | None = None,
    head: str | None = None,
    feature_map: str | None = None,
    label: str | None = None,
    outputs: Outputs = "logits",
    weights_key: str | None = None,
) -> FrozenClassifier:
    """Makes a classifier of any classification network of torchvision; its metadata supply missing arguments.

    Args:
        name: Name of the network, for example ``resnet50``.
        weights: Name of torchvision's weights, for example ``IMAGENET1K_V2`` or ``DEFAULT`` (downloaded once by
            torchvision), or a file with your own state dictionary; None leaves the network random.
        class_names: Class names in logit order, two for one output before a sigmoid; None takes those of the weights.
        image_size: Side of the square input images in pixels; None takes that of the weights.
        mean: Mean per channel on the [0, 1] scale; None takes that of the weights.
        std: Standard deviation per channel on the [0, 1] scale; None takes that of the weights.
        init_args: Further arguments of torchvision's builder, for example ``{image_size: 256}`` for a ViT.
        head: Dotted name of the last linear layer; None finds it.
        feature_map: Dotted name of the last map before pooling; None finds it.
        label: One of ``class_names`` of a multi-label network, explained against its absence.
        outputs: Meaning of the outputs. Of a network that ends in softmax or sigmoid, ``probabilities`` are turned back
            into logits, exactly unless they were rounded to 0 or 1.
        weights_key: Entry or prefix to take in the file of weights, such as ``state_dict`` beside ``state_dict_ema``;
            None takes the one that fits, and EMA weights where there are both.

    Raises:
        FileNotFoundError: If ``weights`` looks like a file and there is none.
        ValueError: If there is no such network, or if classes, weights and network do not fit each other.
    """
    if not is_torchvision_network(name):
        raise ValueError(f"torchvision has no classification network {name!r}; it has resnet18, densenet121, ...")

    # Metadata of the weights, or of the network's best weights.
    named, file = _named_or_file(name, weights)
    metadata = models.get_model_weights(name).DEFAULT if named is None else named
    preset, categories = metadata.transforms(), metadata.meta["categories"]
    class_names, image_size = class_names or categories, image_size or preset.crop_size[0]
    if named is not None and len(class_names) != len(categories):
        raise ValueError(
            f"The weights {weights} of {name} know {len(categories)} classes, but class_names has {len(class_names)}: "
            "leave class_names out, or give the file of a network trained for your classes as weights."
        )

    # Network.
    class_path = f"torchvision.models.{name}"
    built_for = image_size if named is None else preset.crop_size[0]
    arguments = {"num_classes": len(class_names), **_own_arguments(name, built_for), **(init_args or {})}
    if named is not None:
        # Torchvision's weights set by themselves the arguments that ``_own_arguments`` repeats for a later rebuild.
        try:
            network = _build(class_path, {"weights": named, **(init_args or {})})
        except URLError as error:
            raise ValueError(
                f"The weights {weights} of {name} could not be downloaded ({error.reason}): fetch them on a machine "
                "with internet access, or give a file of your own as weights."
            ) from error
    elif file is not None:
        network, arguments = _build_and_fill(class_path, arguments, file, _AUXILIARY.get(name, ()), weights_key)
    else:
        network = _build(class_path, arguments)
        _log.warning("%s has random weights, because weights were not given.", name)
    spec = ClassifierSpec(
        class_path=class_path, init_args=arguments, class_names=tuple(class_names), image_size=image_size,
        mean=tuple(mean or preset.mean), std=tuple(std or preset.std), head=head, feature_map=feature_map, label=label,
        outputs=outputs,
    )  # fmt: skip
    return _freeze(network, spec)


def wrap_classifier(
    class_path: str,
    state_dict_path: str,
    class_names: list[str],
    image_size: int,
    mean: list[float],
    std: list[float],
    init_args: dict[str, Any] | None = None,
    head: str | None = None,
    feature_map: str | None = None,
    label: str | None = None,
    bgr: bool = False,
    outputs: Outputs = "logits",
    weights_key: str | None = None,
) -> FrozenClassifier:
    """Makes a classifier of a network of your own, by the import path of its class.

    You name the class, so it is trusted here; a checkpoint made with it will ask for ``--trusted <package>`` later.

    Args:
        class_path: Import path of the class, for example ``my_package.networks.MyNet``; the folder that holds
            ``my_package`` must be on PYTHONPATH, unless ``train.py`` lies there too.
        state_dict_path: File of ``torch.save(network.state_dict(), ...)`` or of safetensors. Dictionaries around the
            weights and prefixes before their names are removed.
        class_names: Class names in logit order; two for one output before a sigmoid.
        image_size: Side of the network's square input images in pixels.
        mean: Mean per channel on the [0, 1] scale, as in the network's training.
        std: Standard deviation per channel on the [0, 1] scale, as in the network's training.
        init_args: Arguments of the class: numbers, texts and lists.
        head: Dotted name of the last linear layer; None finds it.
        feature_map: Dotted name of the last map before pooling; None finds it.
        label: One of ``class_names`` of a multi-label network, explained against its absence.
        bgr: The network takes colours as blue, green, red (OpenCV); give mean and std as red, green, blue.
        outputs: Meaning of the outputs. Of a network that ends in softmax or sigmoid, ``probabilities`` are turned back
            into logits, exactly unless they were rounded to 0 or 1.
        weights_key: Entry or prefix to take in the file of weights, such as ``state_dict`` beside ``state_dict_ema``;
            None takes the one that fits, and EMA weights where there are both.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the class cannot be found or built, or if weights, outputs or class names do not fit it.
    """
    arguments = dict(init_args or {})
    network = _build(class_path, arguments)
    load_weights(network, state_dict_path, key=weights_key)
    spec = ClassifierSpec(
        class_path=class_path, init_args=arguments, class_names=tuple(class_names), image_size=image_size,
        mean=tuple(mean), std=tuple(std), head=head, feature_map=feature_map, label=label, bgr=bgr,
        outputs=outputs,
    )  # fmt: skip
    return _freeze(network, spec)


def exported_classifier(
    path: str,
    class_names: list[str],
    image_size: int,
    mean: list[float],
    std: list[float],
    label: str | None = None,
    bgr: bool = False,
    outputs: Outputs = "logits",
) -> FrozenClassifier:
    """Makes a classifier of a TorchScript or ``torch.export`` program: logits and usually gradients, but no features.

    Loading a program runs its author's code, so use only files you trust. The program travels inside every checkpoint
    made with it, which will ask for ``--trusted exported_program`` later.

    Args:
        path: File of ``torch.jit.save`` or ``torch.export.save``, exported in eval mode for batches of any size.
        class_names: Class names in logit order; two for one output before a sigmoid.
        image_size: Side of the program's square input images in pixels.
        mean: Mean per channel on the [0, 1] scale, as in the network's training.
        std: Standard deviation per channel on the [0, 1] scale, as in the network's training.
        label: One of ``class_names`` of a multi-label network, explained against its absence.
        bgr: The program takes colours as blue, green, red; give mean and std as red, green, blue.
        outputs: Meaning of the outputs. Of a network that ends in softmax or sigmoid, ``probabilities`` are turned back
            into logits, exactly unless they were rounded to 0 or 1.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such program, or was exported in train mode or for one batch size.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no exported program {path}.")
    # The call is the user's trust, except while a stranger's config is built.
    check_exported_trusted([TRUST_EXPORTED])
    try:
        network = ExportedNetwork(Path(path).read_bytes())
    # The loaders may raise anything on files that are broken or of another version.
    except Exception as error:
        raise ValueError(f"{path} cannot be used as an exported classifier: {one_line(error)}.") from error
    _check_export(network, path, len(mean), image_size)
    spec = ClassifierSpec(
        class_path=public_path(ExportedNetwork), init_args={}, class_names=tuple(class_names), image_size=image_size,
        mean=tuple(mean), std=tuple(std), head=None, label=label, bgr=bgr, outputs=outputs,
    )  # fmt: skip
    return _freeze(network, spec)


def _build(class_path: str, arguments: dict[str, Any]) -> nn.Module:
    """Builds a network whose class the user has named and so trusts."""
    kind = resolve_class_path(class_path, trusted=[class_path.partition(".")[0]])
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{class_path} cannot be built with init_args {arguments}: {error}.") from error


def _build_and_fill(
    class_path: str, arguments: dict[str, Any], file: Path, without: Sequence[str], key: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a network with a file's weights, and its arguments; for two classes the file may also have one output."""
    network = _build(class_path, arguments)
    try:
        load_weights(network, file, without, key)
        return network, arguments
    except ValueError:
        if arguments["num_classes"] == 2:
            single = {**arguments, "num_classes": 1}
            network = _build(class_path, single)
            with suppress(ValueError):
                load_weights(network, file, without, key)
                return network, single
        # The first attempt's message, which speaks of the requested number of classes.
        raise


def _freeze(network: nn.Module, spec: ClassifierSpec) -> FrozenClassifier:
    """Tries the network once, checks its outputs, and traces the layers that the spec leaves None.

    Raises:
        ValueError: If the network does not take the images, returns no logits, or does not fit the class names.
    """
    network.eval()
    image, named = probe_image(network, spec.channels, spec.image_size), len(spec.class_names)
    try:
        with torch.no_grad():
            answer = network(image.clone())
    # A network may raise anything on images that it was not made for.
    except Exception as error:
        raise ValueError(
            f"{spec.class_path} cannot take images {list(image.shape)} (set image_size, and one mean and std per "
            f"channel): {one_line(error)}."
        ) from error

    # Outputs.
    try:
        outputs = logits_of(answer, len(image), named)
    except ValueError as error:
        raise ValueError(
            f"{spec.class_path} returns something else than one row of logits per image: {error}; wrap it in a class "
            "of your own that returns them."
        ) from error
    _check_number(outputs, spec)
    check_network(
        network,
        spec.class_path,
        spec.channels,
        spec.image_size,
        named,
        spec.outputs,
        labelled=spec.label is not None,
        exported=isinstance(network, ExportedNetwork),
    )

    # Layers.
    layers = trace_layers(
        network, spec.channels, spec.image_size, head=spec.head, feature_map=spec.feature_map, num_classes=named
    )
    _log.info("%s: head %s, feature map %s.", spec.class_path, layers.head, layers.feature_map)
    classifier = FrozenClassifier(network, spec.with_layers(layers))
    if spec.feature_map is not None:
        shape = list(classifier.feature_map(torch.zeros(image.shape)).shape)
        if len(shape) != 4:
            raise ValueError(f"feature_map names {spec.feature_map!r}, but its output {shape} is no map [B, D, h, w].")
    return classifier


def _check_number(outputs: Tensor, spec: ClassifierSpec) -> None:
    """Checks that a network has one output for each class name."""
    # One output before a sigmoid stands for two classes, or for one label and its absence.
    number = outputs.shape[1]
    expected = 2 if number == 1 and spec.label is None else number
    if len(spec.class_names) != expected:
        raise ValueError(
            f"{spec.class_path} has {number} output{'s' if number > 1 else ''}, so class_names needs {expected} "
            f"name{'s' if expected > 1 else ''}, but has {len(spec.class_names)}: {list(spec.class_names)[:10]}."
        )


def _check_export(network: ExportedNetwork, path: str, channels: int, image_size: int) -> None:
    """Checks that a program takes batches of any size."""
    image = probe_image(network, channels, image_size, batch_size=3)
    taken = []
    for batch_size in (1, 2, 3):
        try:
            with torch.no_grad():
                network(image[:batch_size].clone())
            taken.append(batch_size)
        # A program may raise anything; _freeze reports a program that takes no batch size at all.
        except Exception as error:
            _log.debug("%s refuses %d images: %s", path, batch_size, error)
    if taken and len(taken) < 3:
        raise ValueError(
            f"{path} takes only batches of {' or '.join(map(str, taken))} images: export it for any number, with "
            "torch.export.export(network, (image,), dynamic_shapes=({0: torch.export.Dim.AUTO},)) and several images."
        )


def _own_arguments(name: str, image_size: int) -> dict[str, Any]:
    """Returns the arguments that some of torchvision's builders set by themselves when they are given weights."""
    if name in _AUXILIARY:
        return {"transform_input": True, "aux_logits": False, "init_weights": False}
    # The position embedding of a ViT has a fixed size.
    return {"image_size": image_size} if name.startswith("vit_") else {}


def _named_or_file(name: str, weights: str | None) -> tuple[WeightsEnum | None, Path | None]:
    """Reads ``weights`` as a member of torchvision's enumeration for a network, or as a file."""
    if weights is None:
        return None, None
    # Torchvision writes ResNet50_Weights.DEFAULT, its users mostly DEFAULT.
    enumeration = models.get_model_weights(name)
    known, member = enumeration.__members__, weights.removeprefix(f"{enumeration.__name__}.")
    if member in known:
        return known[member], None
    if not Path(weights).is_file():
        raise FileNotFoundError(f"weights {weights!r} are neither a file nor among {name}'s: {', '.join(known)}.")
    return None, Path(weights)
