"""One run of ``cfe-evaluate`` in three steps: load what is compared, measure it, write tables and pages."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from tqdm import tqdm

from cfe_lightning.classifier import FrozenClassifier, load_classifier
from cfe_lightning.classifier.check import check_class_names
from cfe_lightning.data.base import ImageData, Sample, Split
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.stream import read_batch
from cfe_lightning.evaluation import evaluate as evaluation
from cfe_lightning.evaluation import tables
from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.gallery import Gallery
from cfe_lightning.evaluation.instruments import load_instruments, weights_from
from cfe_lightning.evaluation.options import EvaluateOptions
from cfe_lightning.evaluation.page import write_evaluation_html
from cfe_lightning.evaluation.store import EvaluationStore
from cfe_lightning.explainer import ExplainerModule, load_explainer, sha256_of
from cfe_lightning.explaining.survey import provide_survey
from cfe_lightning.explanation import Explainer
from cfe_lightning.files.configs import classes_of, in_our_words, load_config
from cfe_lightning.files.text import VERSION, digest
from cfe_lightning.images import find_images
from cfe_lightning.metrics.case import Measures
from cfe_lightning.training.folder import find_configs

log = logging.getLogger(__name__)


class EvaluateRun:
    """Measures checkpoints and baselines on the same labelled images.

    Args:
        options: Checked options of the command, without ``bench``.
        device: Device of all networks and images.

    Attributes:
        checkpoints: The trained explainers by the names of their runs.

    Raises:
        ValueError: If checkpoints, classifiers and data do not fit each other.
    """

    def __init__(self, options: EvaluateOptions, device: torch.device) -> None:
        # Networks.
        self.options, self.device = options, device
        self._paths = options.checkpoint or []
        self.checkpoints = _load(self._paths, options.trusted, device)
        self.judge = self._classifier(options.classifier)
        self.measures = Measures(
            curve_steps=options.curve_steps,
            iso=tuple(options.iso),
            cycles=options.cycles,
            diversity=options.diversity,
            sanity=options.sanity,
            ace=options.protocol == "ace",
            second=self._classifier(options.second),
            instruments=load_instruments(
                weights_from(dict(options.weights), os.environ),
                trusted=options.trusted,
                attributes=options.attributes,
                asked=options.asked,
                device=device,
            ),
        )

        # Data.
        self._first = next(iter(self.checkpoints.values()))
        self._data, self._section = _data(str(options.data), self._first, options.trusted)
        self._check_data()
        self.gallery = Gallery()

    def _classifier(self, path: str | None) -> FrozenClassifier | None:
        return None if path is None else load_classifier(path, self.options.trusted).to(self.device)

    def _check_data(self) -> None:
        """Refuses data of other classes, sizes or channels than the explainers'."""
        data = self._data
        own = [explainer.classifier for explainer in self.checkpoints.values()]
        for classifier in (*own, self.judge, self.measures.second):
            if classifier is not None:
                check_class_names(data.class_names, classifier.class_names)
        for name, explainer in self.checkpoints.items():
            if (explainer.image_size, explainer.channels) != (data.image_size, data.channels):
                raise ValueError(
                    f"{name} explains images of {explainer.image_size} pixels and {explainer.channels} channels, but "
                    f"the data has {data.image_size} and {data.channels}: set image_size and channels of the data, and "
                    "evaluate checkpoints of different sizes one by one."
                )

    def classifiers(self) -> dict[str, FrozenClassifier]:
        """Returns every distinct classifier by the name of the first run that explains it."""
        found: dict[str, tuple[str, FrozenClassifier]] = {}
        for name, explainer in self.checkpoints.items():
            found.setdefault(explainer.classifier.fingerprint(), (name, explainer.classifier))
        return dict(found.values())

    def measure(self, baselines: Mapping[str, Explainer], left_out: Mapping[str, str]) -> Evaluation:
        """Measures all explainers, going on where an earlier run was stopped.

        Args:
            baselines: Further explainers by name.
            left_out: Names of explainers that cannot run here, and why.
        """
        # Images and the identity of this evaluation.
        options, chosen, self.settings = self.options, self._chosen(), self._settings()
        identity = [self.settings, str(self.device), options.batch_size, options.gallery, _names(chosen)]
        self._store = EvaluationStore(options.folder, digest(identity))

        # Measurements.
        result = evaluation.evaluate(
            {**self.checkpoints, **baselines},
            self._batches(chosen, len(self._store)),
            judge=self.judge,
            measures=self.measures,
            reference=self._reference(),
            store=self._store,
            gallery=self.gallery,
            shown=evaluation.evenly(len(chosen), options.gallery),
            device=self.device,
            seed=options.seed,
        )

        # Rows of what cannot run.
        for name, reason in left_out.items():
            result.rows.append(evaluation.unavailable(name, reason, self.measures))
            self.gallery.fail(name, reason)
        return result

    def write(self, result: Evaluation) -> str:
        """Writes tables and pages, forgets the finished batches, and returns the leading table as Markdown."""
        folder = self.options.folder
        written = tables.save(result, folder, self.settings)
        facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.settings.items()}
        write_evaluation_html(result, written, folder, facts, self.gallery.write(folder, result.class_names))
        self._store.clear()
        return written[0].markdown()

    def _chosen(self) -> Subset[Sample]:
        """Draws the images to be measured, in a fixed order."""
        self._data.prepare_data()
        self._data.setup("test")
        every: ConcatDataset[Sample] = ConcatDataset(_datasets(self._data, self.options.split))
        return Subset(every, evaluation.sample_indices(len(every), self.options.limit, self.options.seed))

    def _batches(self, chosen: Subset[Sample], finished: int) -> Iterator[dict[str, Any]]:
        """Yields the batches that are not finished, with progress."""
        size = self.options.batch_size
        rest = Subset(chosen, range(min(finished * size, len(chosen)), len(chosen)))
        if not len(rest):
            return
        loader = DataLoader(rest, batch_size=size, shuffle=False, num_workers=self.options.num_workers)
        total = finished + len(loader)
        yield from tqdm(loader, desc="evaluating", unit="batch", file=sys.stderr, initial=finished, total=total)

    def _reference(self) -> Iterator[torch.Tensor]:
        """Yields batches of the held-out images, [B, C, H, W] in [-1, 1]."""
        folder = self.options.fid_reference
        if folder is None:
            return
        names, size, failed = list(find_images(folder)), self.options.batch_size, 0
        for start in range(0, len(names), size):
            some = names[start : start + size]
            batch = read_batch(some, folder=folder, image_size=self._first.image_size, channels=self._first.channels)
            failed += len(batch["failed"])
            if batch["name"]:
                yield batch["image"]
        if failed == len(names):
            raise ValueError(f"There is no readable image below {folder}: give a folder that holds some.")
        if failed:
            log.warning("%d of %d images below %s cannot be read and are left out.", failed, len(names), folder)

    def _settings(self) -> dict[str, Any]:
        """Collects everything that the numbers depend on; equal hashes mean equal settings."""
        second = self.measures.second

        # Options as they are given.
        def given(names: str) -> dict[str, Any]:
            return {name: getattr(self.options, name) for name in names.split()}

        settings = {
            **given("protocol"),
            "checkpoints": dict(zip(self.checkpoints, map(sha256_of, self._paths), strict=True)),
            "judged_by": {n: (self.judge or one.classifier).fingerprint() for n, one in self.checkpoints.items()},
            "second": None if second is None else second.fingerprint(),
            "data": self._section,
            **given("split limit curve_steps iso cycles diversity sanity"),
            "weights": self.measures.instruments.hashes,
            **given("asked fid_reference seed baselines"),
        }
        plain = json.loads(json.dumps(settings, default=str))
        return {"version": VERSION, **plain, "config_hash": digest(settings)}


def _load(paths: Sequence[Path], trusted: Sequence[str], device: torch.device) -> dict[str, ExplainerModule]:
    explainers = [load_explainer(path, trusted).to(device) for path in paths]
    for explainer, path in zip(explainers, paths, strict=True):
        provide_survey(explainer, path)
    plain = [path.resolve().parent.name if path.stem in ("best", "last") else path.stem for path in paths]
    full = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    names = [short if plain.count(short) == 1 else long for short, long in zip(plain, full, strict=True)]
    return dict(zip(_distinct(names), explainers, strict=True))


def _distinct(names: Iterable[str]) -> list[str]:
    """Numbers repeated names: no row may replace another."""
    result, seen = [], Counter[str]()
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _data(given: str, explainer: ExplainerModule, trusted: Sequence[str]) -> tuple[ImageData, dict[str, Any]]:
    """Builds the data of a training config, or of class folders read the way the explainer needs them."""
    # A folder.
    if Path(given).is_dir():
        section = {
            "root": given,
            "image_size": explainer.image_size,
            "channels": explainer.channels,
            "class_names": list(explainer.classifier.class_names),
        }
        return ImageFolder(**section), section  # type: ignore[arg-type]

    # The data section of a config.
    (path,) = find_configs([given])
    described = load_config(path).get("data")
    if not isinstance(described, dict):
        raise ValueError(f"{path} has no data section: give a training config, or a folder of class folders.")
    reader = ArgumentParser(exit_on_error=False)
    reader.add_subclass_arguments(ImageData, "data", required=True)
    try:
        with classes_of(trusted):
            return reader.instantiate_classes(reader.parse_object({"data": described})).data, described
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"The data section of {path} cannot be used: {in_our_words(str(error))}") from error


def _datasets(data: ImageData, split: str) -> list[Dataset[Sample]]:
    """Returns one split, or all that hold images: a small folder may leave one of them empty."""
    if split != "all":
        return [data.dataset(cast(Split, split))]
    found, error = [], None
    for each in get_args(Split):
        try:
            found.append(data.dataset(each))
        except ValueError as empty:
            error = empty
    if error is not None and not found:
        raise error
    return found


def _names(chosen: Subset[Sample]) -> list[str]:
    """Returns the images' names where files give them; generated images are identified by settings and number."""
    parts = cast("ConcatDataset[Sample]", chosen.dataset).datasets
    every = [name for part in parts for name in getattr(part, "names", [""] * len(cast("Sized", part)))]
    return [every[index] for index in chosen.indices]
