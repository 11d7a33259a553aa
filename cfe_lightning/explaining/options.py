"""The options of ``explain.py``, checked against each other before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfe_lightning.files.arguments import assignment, count, option, positive, shard
from cfe_lightning.files.atomic import check_writable


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainOptions:
    """Options as on the command line; with ``verify`` there is neither input nor output.

    Raises:
        ValueError: If an option is missing, options contradict each other, or input and output lie within one another.
        OSError: If the input does not exist or is a file, or the output takes no files.
    """

    checkpoint: Path | None = option(
        None, "best.ckpt or last.ckpt of a run of train.py", metavar="FILE", type=Path, group="explainer"
    )
    method: str | None = option(
        None,
        "a method without training, such as steerable_lens, or a baseline, such as integrated_gradients; needs "
        "--classifier",
        metavar="NAME",
        group="explainer",
    )
    classifier: str | None = option(
        None,
        "with --method: a classifier file that train.py or save() wrote, or a torchvision network, such as resnet50, "
        "with its own weights",
        metavar="FILE|NAME",
    )
    input: Path = option(
        None,
        "folder of images, read with all folders below it; for an explainer of several slices one folder or NIfTI "
        "volume per patient",
        type=Path,
    )
    output: Path = option(None, "folder for the results, apart from the input", type=Path)
    verify: Path | None = option(
        None,
        "instead of explaining: read the pictures of an earlier run again and confirm its manifest with the "
        "classifier, found by the paths noted there or given with --checkpoint or --classifier",
        metavar="OUTPUT",
        type=Path,
    )
    target: str | None = option(
        None, "class to ask for (default: the image's runner-up, or the other class of a pair)", metavar="CLASS"
    )
    window: list[float] | None = option(
        None,
        "range of values shown of DICOM and NIfTI files, as in training (default: the range of each slice)",
        metavar=("LEVEL", "WIDTH"),
        type=float,
        nargs=2,
    )
    changes: list[tuple[str, Any]] = option(
        [],
        "argument of the method that differs from training or its default, such as num_steps=16; can be repeated",
        flag="--set",
        metavar="NAME=VALUE",
        type=assignment,
        action="append",
    )
    limit: int | None = option(None, "explain only the first N images", metavar="N", type=positive)
    overwrite: bool = option(False, "remove an earlier run's results instead of resuming")
    batch_size: int = option(16, "images per batch (default: 16)", metavar="N", type=positive)
    devices: int = option(1, "GPUs or processes (default: 1)", metavar="N", type=positive)
    shard: tuple[int, int] | None = option(
        None,
        "explain the i-th of n parts of the input, on a machine of its own: n runs write to one output folder, then "
        "the same command without --shard merges them and writes the report",
        metavar="i/n",
        type=shard,
    )
    accelerator: str = option("auto", "type of device (default: auto)", choices=("auto", "cpu", "gpu", "mps"))
    precision: str = option(
        "32-true", "number format (default: 32-true)", choices=("32-true", "16-mixed", "bf16-mixed")
    )
    channels_last: bool = option(False, "use the memory layout of tensor cores, with --precision bf16-mixed")
    compile: bool = option(False, "torch.compile the method's networks: a minute or more at the start, faster after it")
    num_workers: int = option(0, "processes that read images", metavar="N", type=count)
    animation: str | None = option(
        None, "also write the steps of every image as an animation", choices=("gif", "webp", "mp4")
    )
    trusted: list[str] = option(
        [],
        "package besides cfe_lightning and torchvision whose classes the checkpoint may name; can be repeated",
        metavar="PACKAGE",
        action="append",
    )

    def __post_init__(self) -> None:
        # Verification.
        given = [name for name in ("input", "output", "target", "limit", "window") if getattr(self, name) is not None]
        if self.verify is not None and given:
            raise ValueError(f"--verify takes the folder of an earlier run alone: leave out --{' and --'.join(given)}.")
        if self.verify is not None:
            return

        # Explaining.
        if missing := [name for name in ("input", "output") if name not in given]:
            raise ValueError(
                f"--{' and --'.join(missing)} must be given, the folder of images and one for the results."
            )
        if self.checkpoint is None and self.method is None:
            raise ValueError(
                "No explainer is given: add --checkpoint with a best.ckpt of train.py, or --method with --classifier."
            )
        if (self.method is None) != (self.classifier is None):
            raise ValueError(
                "--method and --classifier go together: give both, or --checkpoint, which holds its own classifier."
            )
        if self.shard is not None and self.overwrite:
            raise ValueError(
                "--overwrite with --shard would remove what the other shards are writing: remove the earlier results "
                "first, or give another --output."
            )
        check_folders(self.input, self.output)


def check_folders(source: Path, output: Path) -> None:
    """Refuses folders that cannot be input and output of one run.

    Raises:
        FileNotFoundError: If there is no input folder.
        NotADirectoryError: If the input is a file.
        ValueError: If one lies within the other.
        PermissionError: If the output takes no files.
    """
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
