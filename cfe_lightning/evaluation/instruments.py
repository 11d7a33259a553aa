"""Networks that measure beside the judge, from files of the user's: nothing is downloaded, weights are read as data.

Source: evaluation, sections 4.2, 5.1, 6 and 11. One file is code by its nature: a TorchScript or torch.export program,
and whoever names it as ``user`` trusts its author (see ``networks.exported``).
"""

from __future__ import annotations

import csv
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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

#: Images [B, C, H, W] in [-1, 1] to features [B, D].
Embedding = Callable[[Tensor], Tensor]

#: What can be given, and what file it takes.
NAMES: dict[str, str] = {
    "lpips": "a state dictionary of torchvision's AlexNet, VGG16 or SqueezeNet 1.1, whole or of its features alone",
    "inception": "pt_inception-2015-12-05, the Inception v3 of torch-fidelity (which must be installed)",
    "user": "a TorchScript or torch.export program of yours that maps RGB images in [0, 1] to features [N, D]",
    "face": "a state dictionary of the ResNet-50 of VGGFace2, with or without its classifier",
    "simsiam": "the published checkpoint of SimSiam's ResNet-50, or its state dictionary",
    "oracle": "a classifier file of cfe_lightning for a multi-label network, which sees the attributes",
}
#: Before the name of an environment variable that says where a file is.
ENVIRONMENT_PREFIX = "CFE_WEIGHTS_"
#: LPIPS was not made for smaller images, in pixels a side.
LPIPS_SIZE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruments:
    """What measures beside the judge; None where no file was given.

    Attributes:
        lpips: Images and their edits to perceptual distances [B].
        inception: Features for the published FID and KID, [B, 2048].
        user: Features of the user's own network, [B, D].
        face: Embeddings of faces, [B, 2048].
        simsiam: Embeddings of anything, [B, 2048].
        oracle: A multi-label network: ``label_probabilities`` are what it sees.
        correlations: Of every label with the asked one in a table of labels, [L] float64 in [-1, 1].
        asked: Index of the label that is asked for among the oracle's.
        hashes: SHA-256 of every file by its name; that of the table of labels is called ``attributes``.
    """

    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    inception: Embedding | None = None
    user: Embedding | None = None
    face: Embedding | None = None
    simsiam: Embedding | None = None
    oracle: FrozenClassifier | None = None
    correlations: Tensor | None = None
    asked: int | None = None
    hashes: dict[str, str] = field(default_factory=dict)


def weights_from(options: Mapping[str, str | Path] | None, environ: Mapping[str, str]) -> dict[str, Path]:
    """The files that were named: by options first, else by variables such as ``CFE_WEIGHTS_LPIPS``.

    Args:
        options: Name to file.
        environ: The environment; an empty variable counts as none.

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
            raise ValueError(f"There are no instruments for the {origin} {', '.join(shown)}: {_known()}.")
    files = {**named, **(options or {})}
    return {name: Path(files[name]) for name in NAMES if name in files}


def load_instruments(
    weights: Mapping[str, Path],
    *,
    trusted: Sequence[str] = (),
    attributes: Path | None = None,
    asked: str | None = None,
    device: str | torch.device = "cpu",
) -> Instruments:
    """Reads the files and builds the networks around them, frozen.

    Args:
        weights: Name to file, see ``NAMES``.
        trusted: For the oracle's file, see ``load_classifier``.
        attributes: A table of labels with 0 or -1 and 1: the image's name first, then a column for every label of the
            oracle. A ``.csv`` has a header over all columns; anything else is taken to be CelebA's own
            ``list_attr_celeba.txt``.
        asked: The oracle's label that the edits were asked to change.
        device: Where the networks compute; images are to be there too.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not what its name needs, or the table and the oracle do not fit.
    """
    _check(weights, attributes, asked)
    built: dict[str, nn.Module] = {}
    for name, build in _BUILDERS.items():
        if name in weights:
            with _explained(name, weights[name]):
                built[name] = build(Path(weights[name])).eval().requires_grad_(False).to(device)
    lpips = None
    if "lpips" in weights:
        with _explained("lpips", weights["lpips"]):
            lpips = _lpips(Path(weights["lpips"]), device)
    oracle = _oracle(weights["oracle"], trusted).to(device) if "oracle" in weights else None
    index = None if oracle is None or asked is None else _index(oracle, asked)
    correlations = None
    if oracle is not None and attributes is not None and index is not None:
        labels = read_labels(Path(attributes), oracle.label_names)
        correlations = attribute_correlations(labels, index).to(device)
    files = {**weights, **({} if attributes is None else {"attributes": attributes})}
    return Instruments(
        lpips=lpips,
        inception=built.get("inception"),
        user=built.get("user"),
        face=built.get("face"),
        simsiam=built.get("simsiam"),
        oracle=oracle,
        correlations=correlations,
        asked=index,
        hashes={name: sha256_of(Path(path)) for name, path in files.items()},
    )


class _Perceptual:
    """LPIPS of images of any size, [B, C, H, W] twice -> [B]; small ones are enlarged first."""

    def __init__(self, measure: Lpips) -> None:
        self.measure = measure

    @torch.no_grad()
    def __call__(self, image: Tensor, edited: Tensor) -> Tensor:
        return self.measure.per_image(_at_least(image), _at_least(edited))


def _at_least(image: Tensor) -> Tensor:
    height, width = (max(side, LPIPS_SIZE) for side in image.shape[-2:])
    if (height, width) == image.shape[-2:]:
        return image
    return F.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)


class _Inception(nn.Module):
    """The published features: torch-fidelity's network takes 8-bit RGB and resizes it, [B, C, H, W] -> [B, 2048]."""

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
        # torch-fidelity unpickles whatever it is given, so it is given a file of ours.
        copy = Path(folder) / "weights.pt"
        torch.save(weights, copy)
        metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(copy))
    return _Inception(metric.inception)


def _user(path: Path) -> nn.Module:
    return UserEmbedding(ExportedNetwork(path.read_bytes()))


def _face(path: Path) -> nn.Module:
    embedding = FaceEmbedding()
    load_weights(embedding.network, path, without=("fc.", "module.fc."))
    return embedding


def _simsiam(path: Path) -> nn.Module:
    embedding = SimSiamEmbedding()
    load_weights(embedding, path, without=("predictor.", "module.predictor."))
    return embedding


_BUILDERS: dict[str, Callable[[Path], nn.Module]] = {
    "inception": _inception,
    "user": _user,
    "face": _face,
    "simsiam": _simsiam,
}


def _lpips(path: Path, device: str | torch.device) -> _Perceptual:
    found = {name: value for name, value in read_weights(path).items() if "classifier." not in name}
    weights = {name.rpartition("features.")[2]: value for name, value in found.items()}
    measure = Lpips(pretrained=False, net=_backbone(weights))
    measure.load_backbone(weights)
    measure.network.to(device)
    return _Perceptual(measure)


def _backbone(weights: Mapping[str, Tensor]) -> Literal["alex", "vgg", "squeeze"]:
    """Which of the three networks has such layers."""
    if "3.squeeze.weight" in weights:
        return "squeeze"
    first = weights.get("0.weight", torch.empty(0)).shape
    if tuple(first) == (64, 3, 11, 11):
        return "alex"
    if tuple(first) == (64, 3, 3, 3):
        return "vgg"
    raise ValueError(f"its layers ({', '.join(list(weights)[:3])}, ...) are those of none of the three networks")


def _oracle(path: Path, trusted: Sequence[str]) -> FrozenClassifier:
    oracle = load_classifier(str(path), list(trusted))
    if oracle.spec.label is None:
        raise ValueError(
            f"The oracle {path} decides between classes ({', '.join(oracle.class_names[:5])}), but the attributes are "
            "counted of a multi-label network: name one of its outputs as label when you wrap it."
        )
    return oracle


def _index(oracle: FrozenClassifier, asked: str) -> int:
    if asked not in oracle.label_names:
        raise ValueError(f"The oracle has no label {asked!r} to ask for: it has {', '.join(oracle.label_names)}.")
    return oracle.label_names.index(asked)


def read_labels(path: Path, names: Sequence[str]) -> Tensor:
    """The columns of a table of labels, see ``load_instruments``.

    Args:
        path: The table.
        names: The columns that are wanted.

    Returns:
        [N, L] bool.

    Raises:
        ValueError: If it is no such table, or has no column for a name.
    """
    rows = _rows(path)
    header = next(rows, [])
    if len(header) == 1:
        header = next(rows, [])  # CelebA's own table starts with the number of images
    # A .csv names the first column too.
    columns = header[1:] if path.suffix == ".csv" else header
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(
            f"The table of attributes {path} has no column for the oracle's {', '.join(missing)}: its header must hold "
            f"the names of all labels after the image's; it has {', '.join(columns[:5]) or 'none'}."
        )
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
    """The fields of every line but empty ones, separated by commas in a .csv and by blanks otherwise."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        lines = csv.reader(stream) if path.suffix == ".csv" else (line.split() for line in stream)
        try:
            for fields in lines:
                if fields:
                    yield [value.strip() for value in fields]
        except csv.Error as error:
            raise ValueError(f"The table of attributes {path} cannot be read: {error}.") from error


def _check(weights: Mapping[str, Path], attributes: Path | None, asked: str | None) -> None:
    """What can be told before a network is built."""
    unknown = [name for name in weights if name not in NAMES]
    if unknown:
        raise ValueError(f"There are no instruments {', '.join(unknown)}: {_known()}.")
    for name, path in weights.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path} for {name}: it takes {NAMES[name]}.")
    if attributes is not None and not Path(attributes).is_file():
        raise FileNotFoundError(f"There is no table of attributes {attributes}: give CelebA's, or a .csv of your own.")
    if "oracle" not in weights and (attributes is not None or asked is not None):
        raise ValueError("Attributes are counted in the eyes of an oracle: give its file as oracle too.")
    if attributes is not None and asked is None:
        raise ValueError("A table of attributes is read for the correlations with the asked one: name that one too.")


def _known() -> str:
    return f"choose from {', '.join(NAMES)}"


@contextmanager
def _explained(name: str, path: Path) -> Iterator[None]:
    """One sentence, whatever a loader says of a file."""
    try:
        yield
    # They raise nearly anything on files that are broken or of another network.
    except Exception as error:
        reason = one_line(error)
        raise ValueError(f"{path} cannot be used as {name}, which takes {NAMES[name]}: {reason}.") from error
