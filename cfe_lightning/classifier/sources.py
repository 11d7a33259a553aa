"""Where a frozen classifier comes from besides our own files: torchvision, a class of the user's, an exported program.

Every function returns a ``FrozenClassifier`` and so is a ``class_path`` in YAML. Naming a class or a program here is
the user's consent to run it; the allow-list of ``class_paths.resolve_class_path`` is for what checkpoint files name.
"""

from __future__ import annotations

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
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import probe_image, returns_probabilities, trace_layers
from cfe_lightning.classifier.weights import load_weights
from cfe_lightning.files.text import one_line
from cfe_lightning.files.trust import TRUST_EXPORTED, check_exported_trusted, public_path, resolve_class_path

_log = logging.getLogger(__name__)
#: torchvision's networks with further outputs for training, and the names of those outputs' weights.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def is_torchvision_network(name: str) -> bool:
    """Whether ``torchvision_classifier`` knows a network of this name."""
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
) -> FrozenClassifier:
    """Any classification network of torchvision, with its own metadata for everything that is not given.

    Args:
        name: For example ``resnet50``.
        weights: The name of torchvision's weights, for example ``IMAGENET1K_V2`` or ``DEFAULT`` (downloaded once by
            torchvision), or a file with your own state dictionary; None leaves the network random.
        class_names: Names in logit order; None takes those of the weights. Two where a file's network has one output
            before a sigmoid.
        image_size: Side of the square images; None takes that of the weights, as do ``mean`` and ``std``.
        mean: One number per channel on the [0, 1] scale.
        std: As ``mean``.
        init_args: Further arguments of torchvision's builder, for example ``{image_size: 256}`` for a ViT.
        head: Dotted name of the last linear layer; None finds it.
        feature_map: Dotted name of the last map before pooling; None finds it.
        label: One of ``class_names`` of a multi-label network, explained against its absence.

    Raises:
        FileNotFoundError: If ``weights`` looks like a file and there is none.
        ValueError: If there is no such network or weights, or classes, weights and network do not fit.
    """
    if not is_torchvision_network(name):
        raise ValueError(
            f"torchvision has no classification network {name!r}; it has resnet18, densenet121 and others."
        )
    known = models.get_model_weights(name)
    named, file = _named_or_file(name, weights)
    metadata = known.DEFAULT if named is None else named
    preset = metadata.transforms()
    image_size = image_size or preset.crop_size[0]
    categories = metadata.meta["categories"]
    class_names = class_names or categories
    if named is not None and len(class_names) != len(categories):
        raise ValueError(
            f"The weights {weights} of {name} know {len(categories)} classes, but class_names has {len(class_names)}: "
            "leave class_names out, or give the file of a network trained for your classes as weights."
        )
    class_path = f"torchvision.models.{name}"
    built_for = preset.crop_size[0] if named is not None else image_size
    arguments = {"num_classes": len(class_names), **_own_arguments(name, built_for), **(init_args or {})}
    if named is not None:
        # Sets by itself what our arguments say when the network is built anew without the download.
        try:
            network = _build(class_path, {"weights": named, **(init_args or {})})
        except URLError as error:
            raise ValueError(
                f"The weights {weights} of {name} could not be downloaded ({error.reason}): fetch them where a "
                "network is, or give a file of your own as weights."
            ) from error
    else:
        network = _build(class_path, arguments)
    if file is not None:
        network, arguments = _fill(network, class_path, arguments, file, without=_AUXILIARY.get(name, ()))
    elif named is None:
        _log.warning("%s has random weights, because weights were not given.", name)
    return _freeze(
        network,
        class_path=class_path,
        init_args=arguments,
        class_names=class_names,
        image_size=image_size,
        mean=mean or preset.mean,
        std=std or preset.std,
        head=head,
        feature_map=feature_map,
        label=label,
        bgr=False,
    )


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
) -> FrozenClassifier:
    """A network of your own, by the import path of its class.

    You name the class, so it is trusted here; a checkpoint made with it will ask for ``--trusted <package>`` later.

    Args:
        class_path: For example ``my_package.networks.MyNet``; the folder that holds ``my_package`` must be on
            PYTHONPATH, unless ``train.py`` lies there too.
        state_dict_path: A file of ``torch.save(network.state_dict(), ...)``. The usual wrappings (``state_dict``,
            ``model``, ...) and prefixes (``module.``, ``model.``, ``net.``, ...) are taken off.
        class_names: Names in logit order; two where the network has one output before a sigmoid.
        image_size: Side of the square images the network expects, in pixels.
        mean: One number per channel on the [0, 1] scale: what the training subtracted after scaling to [0, 1].
        std: As ``mean``: what the training divided by.
        init_args: Arguments of the class: numbers, strings and lists.
        head: Dotted name of the last linear layer; None finds it.
        feature_map: Dotted name of the last map before pooling; None finds it.
        label: One of ``class_names`` of a multi-label network, explained against its absence.
        bgr: The network takes colours as blue, green, red, as with OpenCV; give mean and std as red, green, blue.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the class cannot be found or built, the weights do not fit it, it returns no logits, or they do
            not fit the class names.
    """
    arguments = dict(init_args or {})
    network = _build(class_path, arguments)
    load_weights(network, state_dict_path)
    return _freeze(
        network,
        class_path=class_path,
        init_args=arguments,
        class_names=class_names,
        image_size=image_size,
        mean=mean,
        std=std,
        head=head,
        feature_map=feature_map,
        label=label,
        bgr=bgr,
    )


def exported_classifier(
    path: str,
    class_names: list[str],
    image_size: int,
    mean: list[float],
    std: list[float],
    label: str | None = None,
    bgr: bool = False,
) -> FrozenClassifier:
    """A TorchScript or ``torch.export`` program: logits (and usually gradients), but no features.

    Loading a program is running its author's code, so use files you trust only. The program travels inside every
    checkpoint made with it, which will ask for ``--trusted exported_program`` later.

    Args:
        path: A file of ``torch.jit.save`` or ``torch.export.save``, exported in eval mode for batches of any size.
        class_names: See ``wrap_classifier``, as for the other arguments.
        image_size: Side of the square images the program expects, in pixels.
        mean: One number per channel on the [0, 1] scale.
        std: As ``mean``.
        label: One of ``class_names`` of a multi-label network, explained against its absence.
        bgr: The program takes colours as blue, green, red.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such program, or was exported in train mode or for one batch size.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no exported program {path}.")
    check_exported_trusted([TRUST_EXPORTED])
    try:
        network = ExportedNetwork(Path(path).read_bytes())
    # The loaders raise nearly anything on files that are broken or of another version.
    except Exception as error:
        raise ValueError(f"{path} cannot be used as an exported classifier: {one_line(error)}.") from error
    _check_export(network, path, len(mean), image_size)
    return _freeze(
        network,
        class_path=public_path(ExportedNetwork),
        init_args={},
        class_names=class_names,
        image_size=image_size,
        mean=mean,
        std=std,
        head=None,
        feature_map=None,
        label=label,
        bgr=bgr,
    )


def _build(class_path: str, arguments: dict[str, Any]) -> nn.Module:
    """A network without weights of ours; the user has named its class."""
    kind = resolve_class_path(class_path, trusted=[class_path.partition(".")[0]])
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{class_path} cannot be built with init_args {arguments}: {error}.") from error


def _fill(
    network: nn.Module, class_path: str, arguments: dict[str, Any], file: Path, without: Sequence[str]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the file's weights and its arguments; for two classes the file may also have one output."""
    try:
        load_weights(network, file, without)
        return network, arguments
    except ValueError:
        if arguments["num_classes"] == 2:
            single = {**arguments, "num_classes": 1}
            network = _build(class_path, single)
            with suppress(ValueError):
                load_weights(network, file, without)
                return network, single
        # In the words for the number of classes that was asked for.
        raise


def _freeze(
    network: nn.Module,
    *,
    class_path: str,
    init_args: dict[str, Any],
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    head: str | None,
    feature_map: str | None,
    label: str | None,
    bgr: bool,
) -> FrozenClassifier:
    """Tries the network once, finds its layers, and checks that what it returns is what the names say."""
    spec = ClassifierSpec(
        class_path=class_path,
        init_args=init_args,
        head=head,
        class_names=tuple(class_names),
        image_size=image_size,
        mean=tuple(mean),
        std=tuple(std),
        feature_map=feature_map,
        label=label,
        bgr=bgr,
    )
    network.eval()
    image = probe_image(network, spec.channels, image_size)
    try:
        with torch.no_grad():
            output = network(image)
    # Every network refuses in its own words what it was not made for.
    except Exception as error:
        raise ValueError(
            f"{class_path} cannot take images {list(image.shape)} (set image_size, and one mean and std per channel): "
            f"{one_line(error)}."
        ) from error
    _check_output(output, spec)
    if returns_probabilities(network, image):
        raise ValueError(
            f"{class_path} returns probabilities, but logits are needed: take the last softmax or sigmoid out of its "
            "forward."
        )
    layers = trace_layers(network, spec.channels, image_size, head=head, feature_map=feature_map)
    _log.info("%s: head %s, feature map %s.", class_path, layers.head, layers.feature_map)
    classifier = FrozenClassifier(network, spec.with_layers(layers))
    if feature_map is not None:
        shape = list(classifier.feature_map(torch.zeros(2, spec.channels, image_size, image_size)).shape)
        if len(shape) != 4:
            raise ValueError(f"feature_map names {feature_map!r}, whose output {shape} is no map [B, D, h, w].")
    return classifier


def _check_output(output: Any, spec: ClassifierSpec) -> None:
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ValueError(
            f"{spec.class_path} returns a {kind}, but one tensor of logits is needed: name a class of yours whose "
            f"forward returns the logits out of that {kind}."
        )
    outputs = 1 if output.ndim == 1 else output.shape[-1]
    if output.ndim > 2 or len(output) != 2:
        raise ValueError(f"{spec.class_path} returns {list(output.shape)} for two images, but logits are [2, K].")
    # One output before a sigmoid stands for two classes, or for one label and its absence.
    expected = 2 if outputs == 1 and spec.label is None else outputs
    if len(spec.class_names) != expected:
        raise ValueError(
            f"{spec.class_path} has {outputs} output{'s' if outputs > 1 else ''}, so class_names needs {expected} "
            f"name{'s' if expected > 1 else ''}, but has {len(spec.class_names)}: {list(spec.class_names)[:10]}."
        )


def _check_export(network: ExportedNetwork, path: str, channels: int, image_size: int) -> None:
    """A program must answer every image by itself, in batches of any size."""
    image = probe_image(network, channels, image_size, batch_size=3)
    outputs: dict[int, Tensor] = {}
    for batch_size in (1, 2, 3):
        try:
            with torch.no_grad():
                output = network(image[:batch_size])
            if isinstance(output, Tensor) and len(output) == batch_size:
                outputs[batch_size] = output
        # Each kind of program refuses in its own words; what no batch size suits is reported by _freeze.
        except Exception as error:
            _log.debug("%s refuses %d images: %s", path, batch_size, error)
    if outputs and len(outputs) < 3:
        raise ValueError(
            f"{path} takes no batch but of {' or '.join(str(size) for size in outputs)} images: export it for any "
            "number, with torch.export.export(network, (image,), dynamic_shapes=({0: torch.export.Dim.AUTO},)) for a "
            "batch of two or more."
        )
    if outputs and not torch.allclose(outputs[1], outputs[3][:1], rtol=1e-3, atol=1e-3 * float(outputs[3].std())):
        raise ValueError(
            f"{path} answers an image otherwise when others are beside it, so it was exported in train mode: call "
            "network.eval() and export it again."
        )


def _own_arguments(name: str, image_size: int) -> dict[str, Any]:
    """What some of torchvision's builders would otherwise set by themselves when they are given weights."""
    if name in _AUXILIARY:
        return {"transform_input": True, "aux_logits": False, "init_weights": False}
    return {"image_size": image_size} if name.startswith("vit_") else {}


def _named_or_file(name: str, weights: str | None) -> tuple[WeightsEnum | None, Path | None]:
    """What ``weights`` means: a member of torchvision's enumeration, or a file."""
    if weights is None:
        return None, None
    known = models.get_model_weights(name).__members__
    member = weights.removeprefix(f"{models.get_model_weights(name).__name__}.")
    if member in known:
        return known[member], None
    if not Path(weights).is_file():
        raise FileNotFoundError(f"weights {weights!r} are neither a file nor among {name}'s: {', '.join(known)}.")
    return None, Path(weights)
