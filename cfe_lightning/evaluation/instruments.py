"""Networks that measure beside the judge, from files of the user: nothing is downloaded, and weights are plain data.

They serve LPIPS (arXiv 1801.03924), FID (1706.08500) and KID (1801.01401), and the similarities and attribute counts of
ACE (2303.09962). Only the file ``user`` is code, a TorchScript or torch.export program: users name only programs that
they trust (see ``classifier.exported``).
"""

import csv
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier, load_classifier
from cfe_lightning.classifier.exported import ExportedNetwork
from cfe_lightning.classifier.weights import load_weights, read_weights
from cfe_lightning.compute.losses import Lpips
from cfe_lightning.evaluation.embeddings import FaceEmbedding, SimSiamEmbedding, UserEmbedding, coloured
from cfe_lightning.explainer import sha256_of
from cfe_lightning.files.text import one_line
from cfe_lightning.metrics.attributes import attribute_correlations
from cfe_lightning.metrics.case import Instruments

#: Every network that can be given, and the file it takes.
NAMES: dict[str, str] = {
    "lpips": "a state dictionary of torchvision's AlexNet, VGG16 or SqueezeNet 1.1, whole or of its features alone",
    "inception": "pt_inception-2015-12-05, the Inception v3 of torch-fidelity (which must be installed)",
    "user": "a TorchScript or torch.export program of yours that maps RGB images in [0, 1] to features [N, D]",
    "face": "a state dictionary of the ResNet-50 of VGGFace2, with or without its classifier",
    "simsiam": "the published checkpoint of SimSiam's ResNet-50, or its state dictionary",
    "oracle": "a classifier file of cfe_lightning for a multi-label network, which recognises the attributes",
}
_CHOICE = f"choose from {', '.join(NAMES)}"
#: Start of the names of environment variables that give files.
ENVIRONMENT_PREFIX = "CFE_WEIGHTS_"
#: Shortest side of images for LPIPS, in pixels; smaller images are enlarged.
LPIPS_SIZE = 64


def weights_from(options: Mapping[str, str | Path] | None, environ: Mapping[str, str]) -> dict[str, Path]:
    """Collects files by name from the options, or else from non-empty variables such as ``CFE_WEIGHTS_LPIPS``.

    Raises:
        ValueError: If a name is not one of ``NAMES``.
    """
    named = {
        variable.removeprefix(ENVIRONMENT_PREFIX).lower(): path
        for variable, path in environ.items()
        if variable.startswith(ENVIRONMENT_PREFIX) and path
    }

    for origin, names in (("weights", options or {}), ("variables", named)):
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            shown = [name if origin == "weights" else f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in unknown]
            raise ValueError(f"There are no instruments for the {origin} {', '.join(shown)}: {_CHOICE}.")
    files = named | dict(options or {})
    return {name: Path(files[name]) for name in NAMES if name in files}


def load_instruments(
    weights: Mapping[str, Path],
    *,
    trusted: Sequence[str] = (),
    attributes: Path | None = None,
    asked: str | None = None,
    device: str | torch.device = "cpu",
) -> Instruments:
    """Builds frozen networks from files.

    Args:
        weights: Files by the names of ``NAMES``.
        trusted: Packages whose classes the oracle's file may name, see ``load_classifier``.
        attributes: Table of labels, 1 for yes and 0 or -1 for no: first the image's name, then a column for every label
            of the oracle. A ``.csv`` file has a header over all columns; any other file is read like CelebA's
            ``list_attr_celeba.txt``.
        asked: Label of the oracle that the edits are asked to change.
        device: Device of the networks and of the images they are given.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not what its name needs, or the table and the oracle do not fit.
    """
    _check(weights, attributes, asked)

    # Networks.
    built: dict[str, Any] = {}
    for name, build in _BUILDERS.items():
        if name in weights:
            with _explained(name, weights[name]):
                built[name] = build(weights[name])
                if isinstance(built[name], nn.Module):
                    built[name].eval().requires_grad_(False).to(device)

    # The oracle and the correlations of its labels.
    oracle = _oracle(weights["oracle"], trusted, asked).to(device) if "oracle" in weights else None
    index = correlations = None
    if oracle is not None and asked is not None:
        index = oracle.label_names.index(asked)
        if attributes is not None:
            correlations = attribute_correlations(read_labels(attributes, oracle.label_names), index).to(device)

    # Digests.
    files = {**weights, **({} if attributes is None else {"attributes": attributes})}
    hashes = {name: sha256_of(path) for name, path in files.items()}
    return Instruments(**built, oracle=oracle, correlations=correlations, asked=index, hashes=hashes)


def _at_least(image: Tensor) -> Tensor:
    """Enlarges images to sides of at least ``LPIPS_SIZE``."""
    size = tuple(max(side, LPIPS_SIZE) for side in image.shape[-2:])
    return image if size == image.shape[-2:] else F.interpolate(image, size=size, mode="bilinear", align_corners=False)


class _Inception(nn.Module):
    """Inception v3 as in published FIDs, [B, C, H, W] in [-1, 1] -> [B, 2048]; it takes 8-bit RGB and resizes it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.network(images.to_uint8(coloured(image)))


def _inception(path: Path) -> nn.Module:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("the published Inception v3 is part of torch-fidelity: pip install torch-fidelity")
    weights = read_weights(path)
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles any file, so it gets one that holds the checked weights only.
        copy = Path(folder) / "weights.pt"
        torch.save(weights, copy)
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(copy))
    return _Inception(metric.inception)


def _face(path: Path) -> nn.Module:
    embedding = FaceEmbedding()
    load_weights(embedding.network, path, without=("fc.", "module.fc."))
    return embedding


def _simsiam(path: Path) -> nn.Module:
    embedding = SimSiamEmbedding()
    load_weights(embedding, path, without=("predictor.", "module.predictor."))
    return embedding


def _lpips(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Builds LPIPS between images [B, C, H, W] in [-1, 1] of any size, [B]; small images are enlarged first."""
    # Whole models have a classifier, which LPIPS does not use.
    found = {name: value for name, value in read_weights(path).items() if "classifier." not in name}
    weights = {name.rpartition("features.")[2]: value for name, value in found.items()}
    measure = Lpips(pretrained=False, net=_backbone(weights))
    measure.load_backbone(weights)

    @torch.no_grad()
    def distance(image: Tensor, edited: Tensor) -> Tensor:
        return measure.per_image(_at_least(image), _at_least(edited))

    return distance


#: Functions that build a network from a file, by name of the instrument.
_BUILDERS: dict[str, Callable[[Path], Callable[..., Tensor]]] = {
    "inception": _inception,
    "user": lambda path: UserEmbedding(ExportedNetwork(path.read_bytes())),
    "face": _face,
    "simsiam": _simsiam,
    "lpips": _lpips,
}


def _backbone(weights: Mapping[str, Tensor]) -> Literal["alex", "vgg", "squeeze"]:
    if "3.squeeze.weight" in weights:
        return "squeeze"
    first = tuple(weights.get("0.weight", torch.empty(0)).shape)
    if first in ((64, 3, 11, 11), (64, 3, 3, 3)):
        return "alex" if first[2] == 11 else "vgg"
    raise ValueError(f"its layers ({', '.join(list(weights)[:3])}, ...) are those of none of the three networks")


def _oracle(path: Path, trusted: Sequence[str], asked: str | None) -> FrozenClassifier:
    oracle = load_classifier(str(path), list(trusted))
    if oracle.spec.label is None:
        raise ValueError(
            f"The oracle {path} decides between classes ({', '.join(oracle.class_names[:5])}), but attributes are "
            "counted with a multi-label network: name one of its outputs as label when you wrap it."
        )
    if asked is not None and asked not in oracle.label_names:
        raise ValueError(f"The oracle has no label {asked!r} to ask for: it has {', '.join(oracle.label_names)}.")
    return oracle


def read_labels(path: Path, names: Sequence[str]) -> Tensor:
    """Reads the columns ``names`` of a table of labels, [N, L] bool; ``load_instruments`` describes its format.

    Raises:
        ValueError: If the file is no such table, or has no column for a name.
    """
    # Heading.
    rows = _rows(path)
    # CelebA's own table starts with the number of images.
    if len(header := next(rows, [])) == 1:
        header = next(rows, [])
    # A .csv file names the first column, too.
    columns = header[1:] if path.suffix == ".csv" else header
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(
            f"The table of attributes {path} has no column for the oracle's {', '.join(missing)}: its header must hold "
            f"the names of all labels after the image's; it has {', '.join(columns[:5]) or 'none'}."
        )

    # Rows.
    places = [columns.index(name) + 1 for name in names]
    labels = []
    for row in rows:
        if len(row) != len(columns) + 1 or not {row[place] for place in places} <= {"1", "0", "-1"}:
            raise ValueError(
                f"The table of attributes {path} does not hold 1 and 0 (or -1) for each of its {len(columns)} columns "
                f"in the row of {row[0]!r}."
            )
        labels.append([row[place] == "1" for place in places])
    if len(labels) < 2:
        raise ValueError(f"The table of attributes {path} has {len(labels)} rows, but correlations need many.")
    return torch.tensor(labels)


def _rows(path: Path) -> Iterator[list[str]]:
    """Yields the fields of all lines but empty ones, separated by commas in a .csv file and by blanks otherwise."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        lines = csv.reader(stream) if path.suffix == ".csv" else (line.split() for line in stream)
        try:
            for fields in lines:
                if fields:
                    yield [value.strip() for value in fields]
        except csv.Error as error:
            raise ValueError(f"The table of attributes {path} cannot be read: {error}.") from error


def _check(weights: Mapping[str, Path], attributes: Path | None, asked: str | None) -> None:
    """Refuses wrong names, missing files and incomplete arguments before a network is built."""
    unknown = [name for name in weights if name not in NAMES]
    if unknown:
        raise ValueError(f"There are no instruments {', '.join(unknown)}: {_CHOICE}.")
    for name, path in weights.items():
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path} for {name}: it takes {NAMES[name]}.")
    if attributes is not None and not attributes.is_file():
        raise FileNotFoundError(f"There is no table of attributes {attributes}: give CelebA's, or a .csv of your own.")
    if "oracle" not in weights and (attributes is not None or asked is not None):
        raise ValueError("Attributes are counted by an oracle: give its file as oracle too.")
    if attributes is not None and asked is None:
        raise ValueError("A table of attributes gives correlations with the asked attribute: name that one too.")


@contextmanager
def _explained(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    # Loaders raise nearly anything on broken files and on weights of other networks.
    except Exception as error:
        raise ValueError(f"{path} cannot be used as {name}, which takes {NAMES[name]}: {one_line(error)}.") from error
