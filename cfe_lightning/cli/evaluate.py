"""``cfe-evaluate``: measures checkpoints and baselines on the same images and writes one table."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from cfe_lightning.cli.arguments import count, file_assignment, positive, probabilities
from cfe_lightning.cli.bench import add_bench_options, run_bench
from cfe_lightning.cli.environment import check_torchvision
from cfe_lightning.cli.guard import add_debug, guarded
from cfe_lightning.files.atomic import check_writable
from cfe_lightning.files.text import VERSION, digest

if TYPE_CHECKING:
    import torch
    from torch.utils.data import ConcatDataset, Dataset, Subset

    from cfe_lightning.classifier import FrozenClassifier
    from cfe_lightning.data.base import ImageData, Sample
    from cfe_lightning.evaluation.instruments import Instruments
    from cfe_lightning.evaluation.summary import ResultRow
    from cfe_lightning.evaluation.tally import Measures
    from cfe_lightning.explainer import ExplainerModule
    from cfe_lightning.explanation import Explainer


#: Options that are about given checkpoints and data.
_NOT_FOR_BENCH = (
    *("classifier", "second", "iso", "split", "protocol", "cycles", "diversity", "sanity", "weights", "attributes"),
    *("asked", "fid_reference", "gallery", "curve_steps", "num_workers", "trusted"),
)
#: Options that are about the bench alone.
_FOR_BENCH = ("cues", "cue_sizes", "shortcuts", "cue_agreement", "methods", "budget")

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="cfe-evaluate",
        description="Measures explainers on the same labelled images: prints one table and writes report.html, "
        "gallery.html, table.md, table.csv, differences.csv, groups.csv, metrics.json, per_image.csv and curves.npz.",
        epilog="Baselines: integrated_gradients, gradient_shap, internal_influence, guided_grad_cam, grad_cam, lrp, "
        "occlusion, saliency, random, neutral_descent; or all. Exit code: 0 measured, 1 the program is at fault, "
        "2 nothing could be done, 128 + signal interrupted: 130 Ctrl-C, 143 SIGTERM.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, nargs="+", help="best.ckpt of one or more runs")
    parser.add_argument(
        "--data",
        metavar="CONFIG|FOLDER",
        help="a training config, of which the data section is read, or a folder with one folder of images per class",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder for the results (default: evaluated/ beside the checkpoint)"
    )
    parser.add_argument("--split", choices=("train", "val", "test", "all"), default="test", help="(default: test)")
    parser.add_argument("--baselines", metavar="NAMES", default="", help="comma-separated (default: none)")
    parser.add_argument(
        "--classifier", metavar="FILE", help="classifier that judges all (default: each explainer's own)"
    )
    parser.add_argument(
        "--second", metavar="FILE", help="classifier trained by itself for the same classes, for transfer_flip"
    )
    parser.add_argument(
        "--iso",
        metavar="P,...",
        type=probabilities,
        default=[],
        help="also compare the smallest edits that reach these probabilities of the target, as 0.5,0.9",
    )
    parser.add_argument(
        "--protocol",
        choices=("all", "ace"),
        default="all",
        help="populations: all images, or those of the published protocol of DiME and ACE (default: all)",
    )
    parser.add_argument("--cycles", action="store_true", help="also ask again from the edits (11 more explanations)")
    parser.add_argument(
        "--diversity",
        metavar="N",
        type=count,
        default=0,
        help="also compare N edits of every image, with different random numbers",
    )
    parser.add_argument(
        "--sanity", action="store_true", help="also explain for a classifier with random weights, twice"
    )
    parser.add_argument(
        "--weights",
        metavar="NAME=FILE",
        type=file_assignment,
        action="append",
        default=[],
        help="a network that measures: lpips, inception, user, face, simsiam or oracle; can be repeated (or set "
        "CFE_WEIGHTS_LPIPS and so on)",
    )
    parser.add_argument("--attributes", metavar="CSV", type=Path, help="labels of the data, for cd with an oracle")
    parser.add_argument("--asked", metavar="NAME", help="the oracle's label that is asked for")
    parser.add_argument(
        "--fid-reference", metavar="FOLDER", type=Path, help="held-out images that FID and KID compare edits with"
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="measure N images drawn from the split")
    parser.add_argument(
        "--gallery",
        metavar="N",
        type=count,
        default=12,
        help="show N images with everybody's answers side by side, 0 shows none (default: 12)",
    )
    parser.add_argument("--batch-size", metavar="N", type=positive, default=32, help="images at a time (default: 32)")
    parser.add_argument(
        "--curve-steps",
        metavar="N",
        type=count,
        default=50,
        help="blocks of COUT, insertion and deletion, 0 skips them (default: 50)",
    )
    parser.add_argument("--num-workers", metavar="N", type=count, default=0, help="processes that read images")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--seed", metavar="N", type=count, default=0, help="of draws and intervals (default: 0)")
    parser.add_argument(
        "--trusted",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="package besides cfe_lightning and torchvision whose classes checkpoints and the config may name; can be "
        "repeated",
    )
    add_bench_options(parser)
    add_debug(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    return guarded(
        lambda: _evaluate(options),
        debug=options.debug,
        kept=f"what is measured at --batch-size {options.batch_size} is kept in {_folder(options)}, the same command "
        "again does the rest",
    )


def _folder(options: argparse.Namespace) -> Path:
    """Where results are collected: --output, or beside the first checkpoint."""
    return options.output or (options.checkpoint or [Path()])[0].parent / "evaluated"


def _evaluate(options: argparse.Namespace) -> int:
    check_torchvision()
    if options.bench:
        if options.output is not None:
            _check_output(options.output)
        if given := _given(options, _NOT_FOR_BENCH):
            raise ValueError(f"--bench does not take {given}: leave it out.")
        return run_bench(options, _device(options.device), _baseline_names(options.baselines))
    if given := _given(options, _FOR_BENCH):
        raise ValueError(f"Only the bench takes {given}: add --bench synthetic, or leave it out.")
    if not options.checkpoint or not options.data:
        raise ValueError("There is nothing to measure: give --checkpoint FILE and --data CONFIG|FOLDER, or --bench.")
    folder = _folder(options)
    _check_output(folder)
    from cfe_lightning.classifier import load_classifier
    from cfe_lightning.classifier.check import check_class_names
    from cfe_lightning.evaluation import evaluate as evaluation
    from cfe_lightning.evaluation import tables as evaluation_table
    from cfe_lightning.evaluation.gallery import Gallery
    from cfe_lightning.evaluation.page import write_evaluation_html
    from cfe_lightning.evaluation.store import EvaluationStore
    from cfe_lightning.evaluation.tally import Measures

    if options.diversity == 1:
        raise ValueError("--diversity compares edits of the same image: give at least 2, or 0 for none.")
    wanted = _baseline_names(options.baselines)
    device = _device(options.device)
    checkpoints = _load(options.checkpoint, options.trusted, device)
    judge = load_classifier(options.classifier, options.trusted).to(device) if options.classifier else None
    second = load_classifier(options.second, options.trusted).to(device) if options.second else None
    first = next(iter(checkpoints.values()))
    measures = Measures(
        curve_steps=options.curve_steps,
        iso=tuple(options.iso),
        cycles=options.cycles,
        diversity=options.diversity,
        sanity=options.sanity,
        ace=options.protocol == "ace",
        second=second,
        instruments=_instruments(options, device),
    )
    data, section = _data(options.data, first, options.trusted)
    for classifier in (*(explainer.classifier for explainer in checkpoints.values()), judge, second):
        if classifier is not None:
            check_class_names(data.class_names, classifier.class_names)
    _check_images(data, checkpoints)
    baselines, rows = _baselines(wanted, checkpoints, options, measures)
    explainers: dict[str, Explainer] = {**checkpoints, **baselines}
    chosen = _chosen(data, options)
    settings = _settings(options, checkpoints, judge, measures, section)
    store = EvaluationStore(
        folder, digest([settings, str(device), options.batch_size, options.gallery, _names(chosen)])
    )
    gallery = Gallery()
    result = evaluation.evaluate(
        explainers,
        _batches(chosen, options, len(store)),
        judge=judge,
        measures=measures,
        reference=_reference(options, first),
        store=store,
        gallery=gallery,
        shown=evaluation.evenly(len(chosen), options.gallery),
        device=device,
        seed=options.seed,
    )
    result.rows += rows
    for row in rows:
        gallery.fail(row.name, *row.notes)
    tables = evaluation_table.save(result, folder, settings)
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    write_evaluation_html(result, tables, folder, facts, gallery.write(folder, result.class_names))
    store.clear()
    table = tables[0].markdown().encode(sys.stdout.encoding or "utf-8", "backslashreplace")
    sys.stdout.write(f"{table.decode(sys.stdout.encoding or 'utf-8')}\nwritten to {folder}\n")
    return 0


def _given(options: argparse.Namespace, names: Iterable[str]) -> str:
    """Which of these options differ from their defaults, as the user writes them."""
    defaults = parser()
    given = [name for name in names if getattr(options, name) != defaults.get_default(name)]
    return " and ".join(f"--{name.replace('_', '-')}" for name in given)


def _instruments(options: argparse.Namespace, device: torch.device) -> Instruments:
    from cfe_lightning.evaluation.instruments import load_instruments, weights_from

    return load_instruments(
        weights_from(dict(options.weights), os.environ),
        trusted=options.trusted,
        attributes=options.attributes,
        asked=options.asked,
        device=device,
    )


def _reference(options: argparse.Namespace, explainer: ExplainerModule) -> Iterator[torch.Tensor]:
    """The held-out images, batch by batch, read as the explainer needs them."""
    if options.fid_reference is None:
        return
    from cfe_lightning.data.stream import read_batch
    from cfe_lightning.images import find_images

    names = list(find_images(options.fid_reference))
    failed = 0
    for start in range(0, len(names), options.batch_size):
        batch = read_batch(
            names[start : start + options.batch_size],
            folder=options.fid_reference,
            image_size=explainer.image_size,
            channels=explainer.channels,
        )
        failed += len(batch["failed"])
        if batch["name"]:
            yield batch["image"]
    if failed == len(names):
        raise ValueError(f"There is no readable image below {options.fid_reference}: give a folder that holds some.")
    if failed:
        log.warning(
            "%d of %d images below %s cannot be read and are left out.", failed, len(names), options.fid_reference
        )


def _load(paths: Sequence[Path], trusted: Sequence[str], device: torch.device) -> dict[str, ExplainerModule]:
    """The explainers by the names of their runs."""
    from cfe_lightning.explainer import load_explainer
    from cfe_lightning.explaining.survey import provide_survey

    explainers = [load_explainer(path, trusted).to(device) for path in paths]
    for explainer, path in zip(explainers, paths, strict=True):
        provide_survey(explainer, path)
    plain = [path.resolve().parent.name if path.stem in ("best", "last") else path.stem for path in paths]
    full = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    names = [short if plain.count(short) == 1 else long for short, long in zip(plain, full, strict=True)]
    return dict(zip(_distinct(names), explainers, strict=True))


def _distinct(names: Iterable[str]) -> list[str]:
    """Numbers names that come again: no row may replace another."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _baseline_names(listed: str) -> list[str]:
    from cfe_lightning.methods.baselines import BASELINES

    names = [name.strip() for name in listed.split(",") if name.strip()]
    if names == ["all"]:
        return list(BASELINES)
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"There is no baseline {name!r}: choose from {', '.join(BASELINES)}.")
    return list(dict.fromkeys(names))


def _baselines(
    names: Sequence[str],
    checkpoints: dict[str, ExplainerModule],
    options: argparse.Namespace,
    measures: Measures,
) -> tuple[dict[str, Explainer], list[ResultRow]]:
    """Every baseline on every distinct classifier; one that cannot explain a classifier becomes an empty row."""
    from cfe_lightning.evaluation.evaluate import unavailable
    from cfe_lightning.methods.baselines.captum import build_baseline

    classifiers: dict[str, tuple[str, FrozenClassifier]] = {}
    for run, explainer in checkpoints.items():
        classifiers.setdefault(explainer.classifier.fingerprint(), (run, explainer.classifier))
    built: dict[str, Explainer] = {}
    empty: list[ResultRow] = []
    for name in names:
        for run, classifier in classifiers.values():
            title = name if len(classifiers) == 1 else f"{name} on the classifier of {run}"
            if title in checkpoints:
                title = f"{title} (baseline)"
            try:
                built[title] = build_baseline(name, classifier, options.seed)
            except ValueError as error:
                log.warning("%s is left out: %s", title, error)
                empty.append(unavailable(title, str(error), measures))
    return built, empty


def _data(given: str, explainer: ExplainerModule, trusted: Sequence[str]) -> tuple[ImageData, dict[str, Any]]:
    """The data of a training config, or of class folders read the way the explainer needs them."""
    if Path(given).is_dir():
        from cfe_lightning.data.folder import ImageFolder

        section = {
            "root": given,
            "image_size": explainer.image_size,
            "channels": explainer.channels,
            "class_names": list(explainer.classifier.class_names),
        }
        return ImageFolder(**section), section  # type: ignore[arg-type]
    from cfe_lightning.files.configs import load_config
    from cfe_lightning.training import folder as run_folder

    (path,) = run_folder.find_configs([given])
    described = load_config(path).get("data")
    if not isinstance(described, dict):
        raise ValueError(f"{path} has no data section: give a training config, or a folder of class folders.")
    return _instantiate(described, path, trusted), described


def _instantiate(section: dict[str, Any], path: Path, trusted: Sequence[str]) -> ImageData:
    from jsonargparse import ArgumentError, ArgumentParser

    from cfe_lightning.data.base import ImageData
    from cfe_lightning.files.configs import classes_of, in_our_words

    reader = ArgumentParser(exit_on_error=False)
    reader.add_subclass_arguments(ImageData, "data", required=True)
    try:
        with classes_of(trusted):
            return reader.instantiate_classes(reader.parse_object({"data": section})).data
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"The data section of {path} cannot be used: {in_our_words(str(error))}") from error


def _check_images(data: ImageData, checkpoints: dict[str, ExplainerModule]) -> None:
    for name, explainer in checkpoints.items():
        if (explainer.image_size, explainer.channels) != (data.image_size, data.channels):
            raise ValueError(
                f"{name} explains images of {explainer.image_size} pixels and {explainer.channels} channels, but the "
                f"data has {data.image_size} and {data.channels}: set image_size and channels of the data, and "
                "evaluate checkpoints of different sizes one by one."
            )


def _chosen(data: ImageData, options: argparse.Namespace) -> Subset[Sample]:
    """The images to be measured, in a fixed order."""
    from torch.utils.data import ConcatDataset, Subset

    from cfe_lightning.evaluation.evaluate import sample_indices

    data.prepare_data()
    data.setup("test")
    every: ConcatDataset[Sample] = ConcatDataset(_datasets(data, options.split))
    return Subset(every, sample_indices(len(every), options.limit, options.seed))


def _names(chosen: Subset[Sample]) -> list[str]:
    """The images by name where files say so; generated ones are told apart by their settings and number."""
    parts = cast("ConcatDataset[Sample]", chosen.dataset).datasets
    every = [name for part in parts for name in getattr(part, "names", [""] * len(cast("Sized", part)))]
    return [every[index] for index in chosen.indices]


def _batches(chosen: Subset[Sample], options: argparse.Namespace, finished: int) -> Iterator[dict[str, Any]]:
    """The batches after so many finished ones, with progress."""
    from torch.utils.data import DataLoader, Subset
    from tqdm import tqdm

    rest = Subset(chosen, range(min(finished * options.batch_size, len(chosen)), len(chosen)))
    if not len(rest):
        return
    loader = DataLoader(dataset=rest, batch_size=options.batch_size, shuffle=False, num_workers=options.num_workers)
    total = finished + len(loader)
    yield from tqdm(loader, desc="evaluating", unit="batch", file=sys.stderr, initial=finished, total=total)


def _datasets(data: ImageData, split: str) -> list[Dataset[Sample]]:
    """One split, or all that hold images: a small folder may leave one of them empty."""
    from cfe_lightning.data.base import Split

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


def _settings(
    options: argparse.Namespace,
    checkpoints: dict[str, ExplainerModule],
    judge: FrozenClassifier | None,
    measures: Measures,
    section: dict[str, Any],
) -> dict[str, Any]:
    """How the numbers came about; equal hashes mean equal settings."""
    from cfe_lightning.explainer import sha256_of

    judges = {name: (judge or explainer.classifier).fingerprint() for name, explainer in checkpoints.items()}
    settings = {
        "protocol": options.protocol,
        "checkpoints": {name: sha256_of(path) for name, path in zip(checkpoints, options.checkpoint, strict=True)},
        "judged_by": judges,
        "second": None if measures.second is None else measures.second.fingerprint(),
        "data": section,
        "split": options.split,
        "limit": options.limit,
        "curve_steps": options.curve_steps,
        "iso": options.iso,
        "cycles": options.cycles,
        "diversity": options.diversity,
        "sanity": options.sanity,
        "weights": measures.instruments.hashes,
        "asked": options.asked,
        "fid_reference": options.fid_reference,
        "seed": options.seed,
        "baselines": options.baselines,
    }
    plain = json.loads(json.dumps(settings, default=str))
    return {"version": VERSION, **plain, "config_hash": digest(settings)}


def _device(asked: str) -> torch.device:
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name in available if available[name]))
    if not available[asked]:
        raise ValueError(f"There is no {asked} device here: use --device auto or cpu.")
    return torch.device(asked)


def _check_output(folder: Path) -> None:
    from cfe_lightning.files.atomic import refuse_links

    file = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if file is not None:
        raise NotADirectoryError(f"--output {folder} cannot be a folder, {file} is a file: give a folder.")
    check_writable(folder)
    for part in (folder, folder / "unfinished"):
        refuse_links(part)
