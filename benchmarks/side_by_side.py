"""All five methods and the baselines on one classifier per data set: tables of docs/measured/side_by_side.md.

    python benchmarks/side_by_side.py --set lesion colour texture --output checkpoints/side_by_side
    python benchmarks/side_by_side.py --set mnist smiles --root FOLDER --output checkpoints/side_by_side

For every set: one classifier, a short training of every method that needs one (half an hour of one core in all), then
one ``cfe-evaluate`` over everything on the same test images. What is already there is not done again. ``--root`` holds
the unpacked data sets.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from dxai import ROOT, folder, run

BASELINES = (
    "integrated_gradients,gradient_shap,grad_cam,guided_grad_cam,internal_influence,lrp,occlusion,saliency,random"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A data set as command-line arguments, and epochs of each training that suit its number of images."""

    data: list[str]
    channels: int = 3
    classifier: tuple[str, ...] = ("--trainer.max_epochs", "4")
    dxai: int = 2
    mirror: int = 3
    autoencoder: int = 4
    stylex: int = 3

    def below(self, root: str) -> Task:
        """The same with the folder that holds the data filled in."""
        return replace(self, data=[argument.format(root=root) for argument in self.data])


#: A classifier trained with noise has no use for patterns that nobody sees.
_NOISE = ("--model.noise", "0.3", "--trainer.max_epochs")
SETS = {
    "lesion": Task(data=["--data.cue", "lesion"], mirror=4, autoencoder=6, stylex=4),
    "colour": Task(data=["--data.cue", "colour"]),
    "texture": Task(data=["--data.cue", "texture"], dxai=3),
    "mnist": Task(
        data=folder("mnist", '["3", "8"]', 32, 1),
        channels=1,
        classifier=(*_NOISE, "30"),
        dxai=10,
        mirror=21,
        autoencoder=28,
        stylex=21,
    ),
    "smiles": Task(
        data=[*folder("smiles", '["no_smile", "smile"]', 32, 1), "--data.horizontal_flip", "true"],
        channels=1,
        classifier=(*_NOISE, "8"),
        dxai=3,
        mirror=7,
        autoencoder=9,
        stylex=6,
    ),
}


def train(config: str, task: Task, output: Path, label: str, epochs: int | None, *options: str) -> Path | None:
    """Trains one run unless it is there; returns its best checkpoint, None where the method refuses."""
    done, refused = output / f"{label}.seconds", output / f"{label}.refused"
    if refused.exists():
        return None
    if not done.exists():
        length = () if epochs is None else ("--trainer.max_epochs", str(epochs))
        try:
            seconds = run(
                *("train.py", "--config", config, *task.data, "--output", str(output), "--run", label, "--overwrite"),
                *("--trainer.enable_progress_bar", "false", *length, *options),
            )
        except subprocess.CalledProcessError as error:
            # One sentence on the screen says why, such as a calibration that does not hold.
            if error.returncode != 2:
                raise
            refused.touch()
            return None
        done.write_text(f"{seconds:.0f}\n")
    return output / label / "best.ckpt"


def train_all(task: Task, output: Path) -> list[Path]:
    """The classifier of a set and every method on it; returns the checkpoints there are, in the order of the table."""
    classifier = output / "classifier.pt"
    train(
        *("classifier_synthetic.yaml", task, output, "classifier", None, "--model.architecture", "pooled"),
        *(*task.classifier, "--model.output", str(classifier)),
    )
    explained = ("--model.classifier.init_args.path", str(classifier))
    dxai = train("dxai_synthetic.yaml", task, output, "dxai", task.dxai, *explained)
    mirror = train("mirror_synthetic.yaml", task, output, "mirror", task.mirror, *explained)
    autoencoder = train(
        *("diffusion_autoencoder_synthetic.yaml", task, output, "autoencoder", task.autoencoder),
        *("--model.channels", str(task.channels)),
    )
    fitted = ("--model.autoencoder", str(autoencoder), *explained)
    diff = train("diff_explainer_synthetic.yaml", task, output, "diff_explainer", None, *fitted)
    if diff is None:
        # Its calibration did not hold: with a metric set by hand it shows what it then makes.
        by_hand = (*fitted, "--model.metric", "covariance")
        diff = train("diff_explainer_synthetic.yaml", task, output, "diff_explainer_by_hand", None, *by_hand)
    stylex = train("stylex_synthetic.yaml", task, output, "stylex", task.stylex, *explained)
    lens = train("steerable_lens_synthetic.yaml", task, output, "steerable_lens", None, *explained)
    return [checkpoint for checkpoint in (dxai, mirror, diff, stylex, lens) if checkpoint is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", choices=SETS, default=["lesion", "colour", "texture"])
    parser.add_argument("--root", default="data", help="folder of the unpacked real data sets")
    parser.add_argument("--limit", type=int, default=96, help="test images")
    parser.add_argument("--train-only", action="store_true", help="leave the evaluation out")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "side_by_side")
    options = parser.parse_args()
    for name in options.set:
        output = options.output / name
        checkpoints = train_all(SETS[name].below(options.root), output)
        if options.train_only:
            continue
        evaluate = "import sys; from cfe_lightning.cli.evaluate import main; sys.exit(main())"
        run(
            *("-c", evaluate, "--checkpoint", *map(str, checkpoints), "--baselines", BASELINES, "--iso", "0.5,0.9"),
            *("--data", str(checkpoints[0].parent / "config.yaml"), "--limit", str(options.limit)),
            *("--output", str(output / "evaluated")),
        )
        print((output / "evaluated" / "table.md").read_text())


if __name__ == "__main__":
    main()
