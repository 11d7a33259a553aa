"""``explain.py``: explains every image of a folder with one checkpoint, or with a method that needs no training."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_lightning.cli.arguments import assignment, count, positive, shard
from cfe_lightning.cli.environment import check_torchvision
from cfe_lightning.cli.guard import add_debug, guarded
from cfe_lightning.files.atomic import check_writable
from cfe_lightning.files.text import VERSION

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from cfe_lightning.classifier import FrozenClassifier
    from cfe_lightning.explainer import ExplainerModule
    from cfe_lightning.explaining.folder import OutputFolder

FAILED_ROWS = 3
_SHOWN_PROBLEMS = 20
#: Of the libraries about their own insides, nothing that a user of this command could act on.
_UNHELPFUL_WARNINGS = (
    "does not have many workers",
    "available but not used",
    "does not have a deterministic implementation",
    "Couldn't infer the batch indices",
    "LeafSpec",
)


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="explain.py",
        description="Explains every image below a folder: what would have to change for it to be another class? "
        "Writes manifest.csv, summary.json, report.html and images/. The same command again does what is missing.",
        epilog="Exit code: 0 every image was explained (every row confirmed), 1 the program is at fault, 3 some could "
        "not be read or explained, see the manifest (some rows not confirmed), 2 nothing could be done, "
        "128 + signal interrupted: 130 Ctrl-C, 143 SIGTERM.",
    )
    explainer = parser.add_mutually_exclusive_group()
    explainer.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="best.ckpt or last.ckpt of a run of train.py"
    )
    explainer.add_argument(
        "--method",
        metavar="NAME",
        help="a method that needs no training, as steerable_lens, or a baseline, as integrated_gradients; with "
        "--classifier",
    )
    parser.add_argument(
        "--classifier",
        metavar="FILE|NAME",
        help="with --method: the classifier that train.py or save() wrote, or a network of torchvision, as resnet50, "
        "with its own weights",
    )
    parser.add_argument(
        "--input",
        type=Path,
        help="folder of images, read with everything below it; for an explainer of several slices one folder or NIfTI "
        "volume for each patient",
    )
    parser.add_argument("--output", type=Path, help="folder for the results, apart from the input")
    parser.add_argument(
        "--verify",
        metavar="OUTPUT",
        type=Path,
        help="instead of explaining: open the pictures of an earlier run again and confirm its manifest with the "
        "classifier, which is found by the paths noted there, or given with --checkpoint or --classifier",
    )
    parser.add_argument(
        "--target", metavar="CLASS", help="class to ask for (default: the image's runner-up, or the other of a pair)"
    )
    parser.add_argument(
        "--window",
        metavar=("LEVEL", "WIDTH"),
        type=float,
        nargs=2,
        help="values shown of DICOM and NIfTI files, as in training (default: all that a slice has)",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
        default=[],
        dest="changes",
        help="argument of the method that should differ from training or its default, as num_steps=16; can be repeated",
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="explain only the first N images")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run's results instead of resuming")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=16, help="images at a time (default: 16)")
    parser.add_argument("--devices", metavar="N", type=positive, default=1, help="GPUs or processes (default: 1)")
    parser.add_argument(
        "--shard",
        metavar="i/n",
        type=shard,
        help="explain the i-th of n parts of the input, on a machine of its own: n runs write to one output folder, "
        "and after them the same command without --shard merges them and writes the report",
    )
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu", "mps"), default="auto")
    parser.add_argument("--precision", choices=("32-true", "16-mixed", "bf16-mixed"), default="32-true")
    parser.add_argument(
        "--channels-last", action="store_true", help="memory layout that tensor cores like, with --precision bf16-mixed"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the method's networks: a minute or more at the start, faster after it",
    )
    parser.add_argument("--num-workers", metavar="N", type=count, default=0, help="processes that read images")
    parser.add_argument(
        "--animation", choices=("gif", "webp", "mp4"), help="also write the steps of every image as animation"
    )
    parser.add_argument(
        "--trusted",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="package besides cfe_lightning and torchvision whose classes the checkpoint may name; can be repeated",
    )
    add_debug(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parser().parse_args(arguments)
    return guarded(
        lambda: _explain(options) if options.verify is None else _verify(options),
        debug=options.debug,
        kept=f"what is finished at --batch-size {options.batch_size} is kept in {options.verify or options.output}, "
        "the same command again does the rest",
    )


def _explain(options: argparse.Namespace) -> int:
    _check_options(options)
    check_torchvision()
    _check_folders(options.input, options.output)
    from cfe_lightning.compute.acceleration import ChannelsLast, CompileBlocks
    from cfe_lightning.compute.processes import is_first_process, launched_processes
    from cfe_lightning.data.patient_table import find_patients
    from cfe_lightning.data.stream import ImageStream
    from cfe_lightning.explaining.folder import OutputFolder, Shard
    from cfe_lightning.explaining.survey import SurveyFile
    from cfe_lightning.explaining.writer import ExplanationWriter
    from cfe_lightning.images import can_save_video, find_images
    from cfe_lightning.images.medical import check_window, is_slice

    window = check_window(options.window)
    if options.animation == "mp4" and not can_save_video():
        raise ValueError("--animation mp4 needs the package av: pip install av, or choose webp or gif.")
    started = time.perf_counter()
    explainer = _explainer(options)
    target = _target(options.target, explainer.classifier.class_names)
    part = None if options.shard is None else Shard(*options.shard)
    output = OutputFolder(options.output, part)
    names: list[str] = []
    batches: list[list[str]] = []
    # Only the first process touches the output folder; ImageStream hands its list to the others.
    # Processes with a shard each know nothing of one another, whoever has started them.
    launched = launched_processes()
    alone = part is not None and (launched > 1 or options.devices == 1)
    machines = 1 if alone else _machines(options.devices, launched)
    is_first = alone or is_first_process()
    if is_first:
        found = find_images(options.input, is_slice) if explainer.num_slices == 1 else find_patients(options.input)
        names = list(islice(found, options.limit))
        if not names:
            kind = "image" if explainer.num_slices == 1 else "folder of slices"
            raise ValueError(f"There is no {kind} below {options.input}: give a folder that holds some.")
        output.prepare(_header(options, explainer), options.overwrite)
        if part is not None:
            names = [name for batch in part.own(_batches(names, options.batch_size)) for name in batch]
        batches = _missing(names, options, output)
    stream = ImageStream(
        folder=options.input,
        batches=batches,
        image_size=explainer.image_size,
        channels=explainer.channels,
        target=target,
        num_slices=explainer.num_slices,
        window=window,
        num_workers=options.num_workers,
    )
    callbacks: list[pl.Callback] = [
        ExplanationWriter(
            output, num_images=sum(map(len, batches[:: options.devices * machines])), animation=options.animation
        )
    ]
    if options.checkpoint is not None:
        # One shard draws the atlas for all.
        draws = part is None or part.number == 1
        callbacks.insert(0, SurveyFile(options.checkpoint, output.path if draws else None))
    if options.channels_last:
        callbacks.append(ChannelsLast())
    if options.compile:
        callbacks.append(CompileBlocks())
    devices = _own_device(options.accelerator) if alone and options.devices == 1 else options.devices
    _predict(options, explainer, stream, callbacks, devices, machines)
    if not is_first:
        return 0
    if part is not None:
        return _finish_shard(names, output, explainer)
    return _finish(options, output, explainer, len(names), time.perf_counter() - started)


def _machines(devices: int, launched: int) -> int:
    """Over how many machines the processes lie that torchrun or srun has started, ``devices`` on each; 1 alone."""
    if launched > 1 and launched % devices:
        raise ValueError(
            f"torchrun or srun has started {launched} processes, but --devices is {devices}: give as --devices the "
            "processes of one machine."
        )
    if launched == 1 and (machine := os.environ.get("NODE_RANK", "0")) != "0":
        raise ValueError(
            f"NODE_RANK is {machine}, but machines that torchrun or srun has not started cannot share the images: give "
            "each a --shard of its own, or unset NODE_RANK."
        )
    return max(launched // devices, 1)


def _own_device(accelerator: str) -> int | list[int]:
    """The trainer's ``devices`` for one shard: of several that were started on a machine, each takes another GPU."""
    import torch

    place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    num_gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu") else 0
    return 1 if place is None or num_gpus < 2 else [int(place) % num_gpus]


def _check_options(options: argparse.Namespace) -> None:
    missing = [name for name in ("input", "output") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"--{' and --'.join(missing)} must be given, the folder of images and one for the results.")
    if options.checkpoint is None and options.method is None:
        raise ValueError(
            "Who is to explain? Give --checkpoint with a best.ckpt of train.py, or --method with --classifier."
        )
    if (options.method is None) != (options.classifier is None):
        raise ValueError(
            "--method and --classifier go together: give both, or --checkpoint, which holds its own classifier."
        )
    if options.shard is not None and options.overwrite:
        raise ValueError(
            "--overwrite with --shard would remove what the other shards are writing: remove the earlier results "
            "first, or give another --output."
        )


def _verify(options: argparse.Namespace) -> int:
    """Confirms the manifest of an earlier run; what is not confirmed is listed and kept in verification.json."""
    given = [name for name in ("input", "output", "target", "limit", "window") if getattr(options, name) is not None]
    if given:
        raise ValueError(f"--verify takes the folder of an earlier run alone: leave out --{' and --'.join(given)}.")
    check_torchvision()
    from tqdm import tqdm

    from cfe_lightning.explaining.folder import OutputFolder
    from cfe_lightning.explaining.verify import verify

    output = OutputFolder(options.verify)
    if output.header() is None:
        raise FileNotFoundError(f"{options.verify} holds no manifest.jsonl: give the --output of explain.py.")
    if parts := output.parts():
        # Not merged here: whoever still writes would lose rows.
        raise ValueError(
            f"{options.verify} holds rows of a run or shard that has not finished ({parts[0].name}): let it finish, or "
            "give its command again without --shard, then --verify."
        )
    classifier = _verifying_classifier(options, output)
    num_slices = (output.header() or {}).get("num_slices", 1)
    verdicts = dict(tqdm(verify(options.verify, classifier, num_slices), desc="verifying", unit="image", disable=None))
    problems = {name: found for name, found in verdicts.items() if found}
    output.write_verification(
        {
            "checked": len(verdicts),
            "confirmed": len(verdicts) - len(problems),
            "classifier_fingerprint": classifier.fingerprint(),
            "problems": problems,
        }
    )
    for name, found in islice(problems.items(), _SHOWN_PROBLEMS):
        sys.stdout.write(f"{name}: {'; '.join(found)}\n")
    if len(problems) > _SHOWN_PROBLEMS:
        sys.stdout.write(f"... and {len(problems) - _SHOWN_PROBLEMS} more, see verification.json\n")
    sys.stdout.write(f"{len(verdicts) - len(problems)} of {len(verdicts)} rows confirmed\n")
    return FAILED_ROWS if problems else 0


def _verifying_classifier(options: argparse.Namespace, output: OutputFolder) -> FrozenClassifier:
    """The classifier that the folder names: where it was, or where the user says."""
    from cfe_lightning.explainer import load_explainer, sha256_of

    summary, header = output.summary(), output.header() or {}
    checkpoint, classifier = options.checkpoint, options.classifier
    if checkpoint is None and classifier is None:
        checkpoint = Path(summary["checkpoint"]) if "checkpoint" in summary else None
        classifier = summary.get("classifier")
    if checkpoint is not None:
        if "checkpoint_sha256" in header and sha256_of(checkpoint) != header["checkpoint_sha256"]:
            raise ValueError(f"{checkpoint} is not the checkpoint that made {options.verify}: give that one.")
        found = load_explainer(checkpoint, options.trusted).classifier
    elif classifier is not None:
        found = _classifier(classifier, options.trusted)
    else:
        raise ValueError(
            f"{options.verify} does not say which classifier it is about: give --checkpoint or --classifier."
        )
    expected = summary.get("classifier_fingerprint", header.get("classifier_sha256"))
    if expected is not None and found.fingerprint() != expected:
        raise ValueError(
            f"{checkpoint or classifier} holds another classifier than the one that {options.verify} is about: give "
            "that one with --checkpoint or --classifier."
        )
    return found


def _explainer(options: argparse.Namespace) -> ExplainerModule:
    """What explains: a trained method out of its checkpoint, or one without training around a classifier."""
    from cfe_lightning.explainer import load_explainer
    from cfe_lightning.methods.find import build_untrained

    if options.checkpoint is not None:
        return load_explainer(options.checkpoint, options.trusted, dict(options.changes))
    return build_untrained(options.method, _classifier(options.classifier, options.trusted), dict(options.changes))


def _classifier(given: str, trusted: Sequence[str]) -> FrozenClassifier:
    """A classifier file, or a network of torchvision; a file of that name comes first."""
    from cfe_lightning.classifier import load_classifier, torchvision_classifier
    from cfe_lightning.classifier.sources import is_torchvision_network

    if is_torchvision_network(given) and not Path(given).exists():
        return torchvision_classifier(given, weights="DEFAULT")
    return load_classifier(given, list(trusted))


def _predict(
    options: argparse.Namespace,
    explainer: ExplainerModule,
    stream: pl.LightningDataModule,
    callbacks: list[pl.Callback],
    devices: int | list[int],
    machines: int,
) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from cfe_lightning.compute.memory import is_out_of_memory

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in _UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    try:
        pl.Trainer(
            accelerator=options.accelerator,
            devices=devices,
            num_nodes=machines,
            # A process that is through waits for the slowest, however long that takes.
            strategy="auto"
            if isinstance(devices, list) or devices * machines == 1
            else DDPStrategy(timeout=timedelta(days=7)),
            precision=options.precision,
            inference_mode=False,
            deterministic="warn",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).predict(explainer, datamodule=stream, return_predictions=False)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if not is_out_of_memory(error) or 1 not in (options.batch_size, explainer.back_off.at_once):
            raise
        raise ValueError(
            "The device ran out of memory with a single image: the same command with --precision bf16-mixed, "
            "--accelerator cpu or on a larger device does the rest."
        ) from error


def _finish(
    options: argparse.Namespace, output: OutputFolder, explainer: ExplainerModule, num_images: int, seconds: float
) -> int:
    from cfe_lightning.explaining.overview import write_overview
    from cfe_lightning.report.page import write_html

    output.merge()
    output.write_table()
    write_overview(output, num_slices=explainer.num_slices)
    summary = output.write_summary(
        n_planned=num_images,
        **{"checkpoint" if options.checkpoint else "classifier": str(options.checkpoint or options.classifier)},
        classifier_fingerprint=explainer.classifier.fingerprint(),
        caution=explainer.caution,
        image_size=explainer.image_size,
        versions={name: importlib.metadata.version(name) for name in ("torch", "torchvision", "lightning")},
        batch_size=options.batch_size,
        device=str(explainer.device),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
    )
    report = write_html(output.path)
    sys.stdout.write(_table(summary, report) + _advice(explainer))
    if summary["n_done"] == 0:
        first = next(output.rows())
        raise ValueError(
            f"None of the {num_images} images below {options.input} could be explained; {first['name']!r} failed "
            f"with: {first['error']}"
        )
    return FAILED_ROWS if summary["n_failed"] else 0


def _finish_shard(names: list[str], output: OutputFolder, explainer: ExplainerModule) -> int:
    """Says what one shard has done; table and report are left to the run that merges them all."""
    mine = set(names)
    status = {row["name"]: row["status"] for row in output.rows() if row["name"] in mine}
    failed = sum(one == "failed" for one in status.values())
    assert output.shard is not None, "called for shards only"
    sys.stdout.write(
        f"shard {output.shard.number} of {output.shard.total}: {len(status) - failed} explained, {failed} failed; when "
        "all shards are through, the same command without --shard merges them and writes table and report\n"
        + _advice(explainer)
    )
    return FAILED_ROWS if failed else 0


def _advice(explainer: ExplainerModule) -> str:
    """What the next run could do better."""
    fits = explainer.back_off.at_once
    return "" if fits is None else f"memory was short: --batch-size {fits} saves the attempts in vain\n"


def _table(summary: dict[str, Any], report: Path) -> str:
    lines = [("explained", str(summary["n_done"])), ("failed", str(summary["n_failed"]))]
    for title, key in (("flip rate", "flip_rate"), ("flip rate, saved", "flip_rate_saved"), ("mean L1", "l1")):
        measured = summary[key]
        if "value" in measured:
            low, high = measured.get("interval", (None, None))
            interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            lines.append((title, f"{measured['value']:.4f}{interval}"))
    if "median" in summary["s_per_image"]:
        lines.append(("seconds per image", f"{summary['s_per_image']['median']:.3g}"))
    if "warning" in summary:
        lines.append(("warning", summary["warning"]))
    return "".join(f"{title:<18} {value}\n" for title, value in [*lines, ("report", str(report))])


def _missing(names: list[str], options: argparse.Namespace, output: OutputFolder) -> list[list[str]]:
    """The batches still to be explained: images without a row or changed since, then the failed ones once more.

    An interrupted run leaves whole batches behind, so the same images meet again and give the same numbers.
    """
    from cfe_lightning.data.stream import source_of

    recorded = {row["name"]: (row["status"], row["source"]) for row in output.rows()}
    new: list[str] = []
    failed: list[str] = []
    for name in names:
        status, source = recorded.get(name, ("missing", None))
        if source != source_of(options.input / name):
            new.append(name)
        elif status == "failed":
            failed.append(name)
    return [batch for group in (new, failed) for batch in _batches(group, options.batch_size)]


def _batches(names: list[str], size: int) -> list[list[str]]:
    return [names[first : first + size] for first in range(0, len(names), size)]


def _header(options: argparse.Namespace, explainer: ExplainerModule) -> dict[str, Any]:
    """What makes two runs the same; the batch size and the devices are free to change."""
    from cfe_lightning.explainer import sha256_of
    from cfe_lightning.files.trust import public_path

    if options.checkpoint is not None:
        made_from = {"checkpoint_sha256": sha256_of(options.checkpoint)}
    else:
        made_from = {"classifier_sha256": explainer.classifier.fingerprint(), "untrained": options.method}
    return {
        **made_from,
        "method": public_path(type(explainer)),
        "version": VERSION,
        "classes": list(explainer.classifier.class_names),
        **({"num_slices": explainer.num_slices} if explainer.num_slices > 1 else {}),
        "input": str(options.input.resolve()),
        "target": options.target,
        "window": options.window,
        "set": dict(options.changes) or None,
        "precision": options.precision,
        "animation": options.animation,
    }


def _check_folders(source: Path, output: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"There is no input folder {source}.")
    if not source.is_dir():
        raise NotADirectoryError(f"The input {source} is a file: give the folder that holds the images.")
    inner, outer = output.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(
            f"The input {source} and the output {output} lie within one another, so results would be read as images: "
            "give an --output elsewhere."
        )
    check_writable(output)


def _target(name: str | None, class_names: Sequence[str]) -> int | None:
    if name is None:
        return None
    if name not in class_names:
        raise ValueError(f"--target {name!r} is not a class of this classifier: choose from {', '.join(class_names)}.")
    return class_names.index(name)
