"""The options of ``cfe-evaluate``, for given checkpoints and for the known-cause bench."""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from cfe_lightning.files.arguments import count, file_assignment, numbers, option, positive, probabilities

#: Options that concern given checkpoints and data.
_NOT_FOR_BENCH = (
    "classifier, second, iso, split, protocol, cycles, diversity, sanity, weights, attributes, asked, fid_reference, "
    "gallery, curve_steps, num_workers, trusted"
)
#: Test images of every cell of the bench, unless --limit says otherwise.
NUM_TEST = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """Options that concern the known-cause bench alone."""

    bench: str | None = option(
        None,
        "train classifiers with a planted shortcut and measure which explainers give it away; no --checkpoint",
        choices=("synthetic",),
    )
    cues: str = option("lesion,colour,texture", "(default: all three)", metavar="NAMES")
    cue_sizes: list[float] = option([0.7, 1.0, 1.4], "0.5 to 1.6", metavar="X,...", type=numbers)
    shortcuts: list[float] = option(
        [0.0, 0.5, 0.9, 1.0],
        "probabilities that the mark follows the class; otherwise it sits anywhere (default: 0,0.5,0.9,1)",
        metavar="P,...",
        type=numbers,
    )
    cue_agreement: float = option(
        0.95,
        "share of training images with the cue of their class; at 1 cues are the easier reason and hardly any "
        "classifier uses its mark (default: 0.95)",
        metavar="P",
        type=float,
    )
    methods: str = option(
        "steerable_lens,dxai,mirror_cfe",
        "comma-separated, of configs NAME_synthetic.yaml (default: steerable_lens,dxai,mirror_cfe)",
        metavar="NAMES",
    )
    budget: float = option(1.0, "factor on the length of all trainings (default: 1)", metavar="X", type=float)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(BenchOptions):
    """All options of the command."""

    checkpoint: list[Path] | None = option(None, "best.ckpt of one or more runs", metavar="FILE", type=Path, nargs="+")
    data: str | None = option(
        None,
        "a training config, of which the data section is read, or a folder with one folder of images per class",
        metavar="CONFIG|FOLDER",
    )
    output: Path | None = option(
        None, "folder for the results (default: evaluated/ beside the checkpoint)", metavar="DIR", type=Path
    )
    split: str = option("test", "(default: test)", choices=("train", "val", "test", "all"))
    baselines: str = option("", "comma-separated (default: none)", metavar="NAMES")
    classifier: str | None = option(
        None, "classifier that judges all explainers (default: each explainer's own)", metavar="FILE"
    )
    second: str | None = option(
        None, "another classifier trained for the same classes, for transfer_flip", metavar="FILE"
    )
    iso: list[float] = option(
        [],
        "also compare the smallest edits that reach these probabilities of the target, such as 0.5,0.9",
        metavar="P,...",
        type=probabilities,
    )
    protocol: str = option(
        "all",
        "populations: all images, or those of the published protocol of DiME and ACE (default: all)",
        choices=("all", "ace"),
    )
    cycles: bool = option(False, "also explain the edits again (11 more explanations)")
    diversity: int = option(
        0, "also compare N edits of every image, drawn with different random numbers", metavar="N", type=count
    )
    sanity: bool = option(False, "also explain a classifier with random weights, twice")
    weights: list[tuple[str, Path]] = option(
        [],
        "a network that measures: lpips, inception, user, face, simsiam or oracle; can be repeated (or set "
        "CFE_WEIGHTS_LPIPS and so on)",
        metavar="NAME=FILE",
        type=file_assignment,
        action="append",
    )
    attributes: Path | None = option(None, "labels of the data, for cd with an oracle", metavar="CSV", type=Path)
    asked: str | None = option(None, "the oracle's label that the edits ask for", metavar="NAME")
    fid_reference: Path | None = option(
        None, "held-out images that FID and KID compare edits with", metavar="FOLDER", type=Path
    )
    limit: int | None = option(None, "measure N images drawn from the split", metavar="N", type=positive)
    gallery: int = option(
        12, "show N images with all explainers' answers side by side, 0 for none (default: 12)", metavar="N", type=count
    )
    batch_size: int = option(32, "images per batch (default: 32)", metavar="N", type=positive)
    curve_steps: int = option(
        50, "blocks of COUT, insertion and deletion, 0 skips them (default: 50)", metavar="N", type=count
    )
    num_workers: int = option(0, "processes that read images", metavar="N", type=count)
    device: str = option("auto", "(default: auto)", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, "seed of draws and intervals (default: 0)", metavar="N", type=count)
    trusted: list[str] = option(
        [],
        "package besides cfe_lightning and torchvision whose classes checkpoints and the config may name; can be "
        "repeated",
        metavar="PACKAGE",
        action="append",
    )

    def __post_init__(self) -> None:
        # The bench.
        if self.bench is not None:
            if given := self._given(_NOT_FOR_BENCH.split(", ")):
                raise ValueError(f"--bench does not take {given}: leave it out.")
            if self.checkpoint or self.data:
                raise ValueError(
                    "--bench trains its own explainers on built-in data: leave out --checkpoint and --data."
                )
            if self.output is None:
                raise ValueError("--bench keeps its trainings and results in a folder: add --output DIR.")
            return

        # Given checkpoints.
        if given := self._given(one.name for one in fields(BenchOptions)):
            raise ValueError(f"Only the bench takes {given}: add --bench synthetic, or leave it out.")
        if not self.checkpoint or not self.data:
            raise ValueError(
                "There is nothing to measure: give --checkpoint FILE and --data CONFIG|FOLDER, or --bench."
            )
        if self.diversity == 1:
            raise ValueError("--diversity compares edits of the same image: give at least 2, or 0 for none.")

    @property
    def folder(self) -> Path:
        """The folder for the results."""
        return results_folder(self.output, self.checkpoint)

    def _given(self, names: Iterable[str]) -> str:
        """Names the options that differ from their defaults, as a user writes them."""
        defaults = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(self)
        }
        given = [name for name in names if getattr(self, name) != defaults[name]]
        return " and ".join(f"--{name.replace('_', '-')}" for name in given)


def results_folder(output: Path | None, checkpoint: Sequence[Path] | None) -> Path:
    """Returns the folder for the results: ``output``, or ``evaluated/`` beside the first checkpoint."""
    return output or (checkpoint or [Path()])[0].parent / "evaluated"
