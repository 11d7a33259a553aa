"""train.py --dry-run: what it says about a run, that it leaves nothing behind, and that every method can have one."""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from cases import CASES, IMAGE_SIZE, NUM_CLASSES, Case
from toy import ToyData, ToyDataset, ToyExplainer, toy_classifier, toy_trainer

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.cli.train import main
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.files.trust import public_path
from cfe_lightning.training import run as configured_run
from cfe_lightning.training import stopwatch
from cfe_lightning.training.dry_run import advice, parameter_table, planned_epochs, validations_per_epoch
from cfe_lightning.training.stopwatch import Measured

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CLASSIFIER = {
    "class_path": "cfe_lightning.classifier.load_classifier",
    "init_args": {"path": "classifier.pt", "trusted": ["toy"]},
}
CALLBACKS = [
    {"class_path": "cfe_lightning.training.EMA"},
    {"class_path": "cfe_lightning.training.SampleGrid", "init_args": {"every_n_batches": 1}},
    {"class_path": "cfe_lightning.training.NonFiniteGuard"},
    {"class_path": "cfe_lightning.training.LastCheckpoint", "init_args": {"every_n_batches": 1}},
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    toy_classifier().save("classifier.pt")
    return tmp_path


def write_config(kind: str = "toy.ToyExplainer", arguments: dict[str, Any] | None = None, **data: Any) -> None:
    arguments = {"classifier": CLASSIFIER} if arguments is None else arguments
    config = {
        "model": {"class_path": kind, "init_args": arguments},
        "data": {"class_path": "toy.ToyData", "init_args": {"num_images": 64, **data}},
        "trainer": {"max_epochs": 5, "accelerator": "cpu", "callbacks": CALLBACKS},
    }
    Path("toy.yaml").write_text(yaml.safe_dump(config))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dry_run(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[dict[str, str], list[str]]:
    """The rows of the table, and what is said after it."""
    assert main(["--config", "toy.yaml", "--trusted", "toy", "--dry-run", *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = max(number for number, line in enumerate(lines) if line.startswith(("checkpoint", "all"))) + 1
    rows = {line[:23].strip(): line[23:].strip() for line in lines[:end] if line}
    return rows, lines[end:]


@pytest.mark.parametrize(("batch", "code", "ended"), [(2, 143, ["child"]), (None, 0, [])])
def test_a_signal_ends_it_at_once_and_what_was_started_with_it(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    batch: int | None,
    code: int,
    ended: list[str],
) -> None:
    write_config()
    killed: list[str] = []
    launcher = SimpleNamespace(procs=[SimpleNamespace(kill=lambda: killed.append("child"))])
    step = ToyExplainer.training_step

    def stopped(self: ToyExplainer, images: Any, batch_idx: int) -> None:
        self.trainer.strategy._launcher = launcher
        if batch_idx == batch:
            signal.raise_signal(signal.SIGTERM)
        step(self, images, batch_idx)

    monkeypatch.setattr(ToyExplainer, "training_step", stopped)
    assert main(["--config", "toy.yaml", "--trusted", "toy", "--dry-run", "--skip-classifier-check"]) == code
    said = "\ninterrupted by SIGTERM: nothing is left behind, the same command measures anew\n"
    assert capsys.readouterr().err.endswith(said) == bool(code)
    assert killed == ended


def test_it_says_what_a_run_takes_and_leaves_nothing_behind(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody asks for a key, and no run begins.
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(configured_run, "wandb_must_be_offline", None)
    write_config()
    before = files(workplace)
    rows, _ = dry_run(capsys)
    assert files(workplace) == before
    assert not Path("checkpoints").exists()
    assert rows["parameters"].split() == ["trainable", "frozen"]
    # Two class images; a linear critic of 768 values; 3 mixing weights, batch norm and 2 x 2 weights of the classifier.
    assert rows["class_images"].split() == ["1,536", "0"]
    assert rows["critic"].split() == ["769", "0"]
    assert rows["classifier"].split() == ["0", "9"]
    assert rows["all"].split() == ["2,305", "9"]
    assert rows["images"] == "64 train, 64 val"
    assert rows["iterations per epoch"] == "16 of 4 images"
    assert "median of 10" in rows["seconds per iteration"]
    assert rows["run"].endswith(" for 5 epochs")
    assert rows["waiting for data"].endswith("% of the time")
    assert rows["peak memory"].endswith("since training began")


def test_the_size_of_a_checkpoint_is_that_of_the_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config()
    rows, _ = dry_run(capsys)
    options = ["--trainer.max_epochs", "1", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["--config", "toy.yaml", "--trusted", "toy", *options]) == 0
    number, unit = rows["checkpoint"].split()
    assert unit == "kB"
    assert float(number) == pytest.approx(Path("checkpoints/toy/last.ckpt").stat().st_size / 1000, rel=0.02)


def test_it_stands_beside_an_existing_run_and_can_continue_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config()
    options = ["--trainer.max_epochs", "1", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["--config", "toy.yaml", "--trusted", "toy", *options]) == 0
    capsys.readouterr()
    before = files(workplace)
    assert "run" in dry_run(capsys)[0]
    assert "run" in dry_run(capsys, "--resume")[0]
    assert "run" in dry_run(capsys, "--overwrite")[0]
    assert files(workplace) == before


def test_mistakes_are_found_as_in_a_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config()
    assert main(["--config", "toy.yaml", "--trusted", "toy", "--dry-run", "--data.num_images", "3"]) == 2
    assert "The training split has 3 images" in capsys.readouterr().err
    assert main(["--config", "toy.yaml", "--trusted", "toy", "--dry-run", "--model.amplitud", "1"]) == 2


@pytest.mark.parametrize(
    ("overrides", "run"),
    [
        (["--trainer.max_steps", "64"], "for 2 epochs"),  # two optimisers, 16 iterations an epoch
        (["--trainer.max_epochs", "-1"], "no end is set"),
        (["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1"], "for 1 epochs"),
    ],
)
def test_the_end_of_a_run(workplace: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], run: str) -> None:
    write_config()
    assert dry_run(capsys, *overrides)[0]["run"].endswith(run)


def test_a_run_without_validation(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config()
    rows, _ = dry_run(capsys, "--trainer.limit_val_batches", "0")
    assert rows["images"] == "64 train"
    assert "validation" not in rows["epoch"]


def test_a_classifier_is_measured_and_not_written(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config("cfe_lightning.classifier.training.ClassifierTraining", {"output": "trained.pt"})
    rows, _ = dry_run(capsys)
    assert set(files(workplace)) == {"classifier.pt", "toy.yaml"}
    assert int(rows["network"].split()[0].replace(",", "")) > 100


@pytest.mark.parametrize("case", CASES)
def test_every_method_has_one(
    case: Case, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "_TIMED", 2)
    case.classifier().save("classifier.pt")
    write_config(
        public_path(case.kind),
        {"classifier": CLASSIFIER, **case.arguments},
        image_size=IMAGE_SIZE,
        num_classes=NUM_CLASSES,
    )
    before = files(workplace)
    rows, said = dry_run(capsys, "--skip-classifier-check")
    assert files(workplace) == before
    if case.num_epochs:
        assert int(rows["all"].split()[0].replace(",", "")) > 0
        assert {"seconds per iteration", "epoch", "run", "checkpoint"} <= rows.keys()
    else:
        assert said[0] == ""
        assert said[1].startswith(f"{case.kind.__name__} needs no training: train.py saves it at once, as a checkpoint")


class Unequal(ToyExplainer):
    """Every fourth iteration takes long, and reading the training split beforehand takes time."""

    def __init__(self, classifier: FrozenClassifier, *, penalty_interval: int = 4) -> None:
        super().__init__(classifier)
        self.read = 0

    def on_fit_start(self) -> None:
        dataset = self.trainer.datamodule.dataset("train")  # type: ignore[attr-defined]
        self.read = len([dataset[index] for index in range(len(dataset))])
        time.sleep(0.25)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if self.trainer.fit_loop.total_batch_idx % 4 == 0:
            time.sleep(0.2)


def run(module: ToyExplainer, data: ToyData, folder: Path, **options: Any) -> Measured:
    watch = stopwatch.Stopwatch(1.0)
    trainer = toy_trainer(folder, [watch], max_epochs=-1, limit_val_batches=3, num_sanity_val_steps=0, **options)
    trainer.strategy.checkpoint_io = watch.scales
    with pytest.raises(stopwatch.MeasuredError):
        trainer.fit(module, data)
    return watch.measured


def test_whole_cycles_are_timed_and_averaged(tmp_path: Path) -> None:
    measured = run(Unequal(toy_classifier()), ToyData(num_images=64), tmp_path)
    assert measured.cycle == 4
    assert len(measured.seconds) == len(measured.waits) == 12
    # Of any four iterations in a row one sleeps.
    assert measured.iteration_seconds >= 0.05
    assert Measured(seconds=[1.0, 1.0, 5.0, 1.0, 1.0, 1.0], cycle=4).iteration_seconds == 2
    assert Measured(seconds=[1.0, 3.0], cycle=4).iteration_seconds == 2


def test_preparation_is_seen_on_a_few_batches_and_scaled_to_all_images(tmp_path: Path) -> None:
    module, data = Unequal(toy_classifier()), ToyData(num_images=160)
    measured = run(module, data, tmp_path)
    assert module.read == 16
    assert measured.preparation >= 2.5
    # The training itself has seen everything.
    assert len(data.dataset("train")) == 160  # type: ignore[arg-type]
    assert measured.iterations == 40


def test_patience_ends_before_a_whole_cycle(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "_PATIENCE", 0.0)
    write_config(f"{__name__}.Unequal")
    rows, said = dry_run(capsys, "--trusted", __name__.partition(".")[0])
    assert "median of 2" in rows["seconds per iteration"]
    assert said[0].startswith("Only 2 of the 4 iterations were timed after which every penalty has come once")


class SlowToRead(ToyDataset):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.01)
        return super().__getitem__(index)


class SlowData(ToyData):
    def dataset(self, split: Any) -> ToyDataset:
        return SlowToRead(split, self.num_images, self.image_size, self.channels, len(self.class_names))


def test_waiting_for_data_is_seen(tmp_path: Path) -> None:
    measured = run(ToyExplainer(toy_classifier()), SlowData(num_images=64), tmp_path)
    assert all(0.04 <= wait <= seconds for wait, seconds in zip(measured.waits, measured.seconds, strict=True))
    # 16 batches of 4 images, of which 3 were seen.
    assert measured.val_batches == 16
    assert measured.val_seconds >= 0.64


class Doubtful(ToyExplainer):
    def on_validation_epoch_end(self) -> None:
        raise ValueError("It has learnt nothing.")


def test_a_method_that_finds_it_has_learnt_nothing_is_measured_all_the_same(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(f"{__name__}.Doubtful")
    rows, said = dry_run(capsys, "--trusted", __name__.partition(".")[0])
    assert {"epoch", "run", "checkpoint"} <= rows.keys()
    assert said[0] == "The end of a validation could not be measured: It has learnt nothing."


def test_validations_and_epochs_are_counted_as_the_trainer_does() -> None:
    assert validations_per_epoch(1.0, 1, 100) == 1
    assert validations_per_epoch(1.0, 5, 100) == 0.2
    assert validations_per_epoch(0.25, 1, 100) == 4
    assert validations_per_epoch(30, 1, 100) == 3
    assert validations_per_epoch(250, None, 100) == 0.4
    assert validations_per_epoch("00:01:00:00", 1, 100) == 1
    assert planned_epochs(7, -1, 100, 2.0) == 7
    assert planned_epochs(7, 400, 100, 2.0) == 2
    assert planned_epochs(None, 50, 100, 1.0) == 0.5
    assert math.isinf(planned_epochs(-1, -1, 100, 2.0))


def test_shared_parameters_count_once() -> None:
    module = torch.nn.Module()
    module.one, module.two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    module.two.weight = module.one.weight
    module.two.requires_grad_(False)
    module.free = torch.nn.Parameter(torch.zeros(5))
    rows = [line.split() for line in parameter_table(module).splitlines()]
    assert rows[1:] == [["one", "2", "6"], ["two", "0", "2"], ["free", "5", "0"], ["all", "7", "8"]]


def seen(waiting: float, memory_share: float = 0.0) -> Measured:
    return Measured(
        seconds=[1.0, 1.0], waits=[waiting, waiting], images={"train": 90, "val": 10}, memory_share=memory_share
    )


def test_advice_is_given_where_it_is_clear(tmp_path: Path) -> None:
    module = ToyExplainer(toy_classifier())
    data = ToyData()
    assert advice(seen(0.05, 0.5), module, data, num_cores=8) is None
    # Reading takes 0.75 s and computing 0.25 s: three processes deliver as fast as one computes.
    expected = "Waiting for data takes 75% of the time: --data.num_workers 3 would keep up."
    assert advice(seen(0.75), module, data, num_cores=8) == expected
    # Two processes deliver one batch a second, computing takes half of it.
    data.num_workers = 2
    expected = "Waiting for data takes 50% of the time: --data.num_workers 4 would keep up."
    assert advice(seen(0.5), module, data, num_cores=8) == expected
    expected = (
        "Waiting for data takes 50% of the time: images in a smaller size or on a faster disk, or more than 2 cores, "
        "would help."
    )
    assert advice(seen(0.5), module, data, num_cores=2) == expected
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(b"")
    folder = ImageFolder(root=str(tmp_path), image_size=256, num_workers=2)
    expected = (
        "Waiting for data takes 50% of the time: --data.cache_folder FOLDER would keep the resized images on a disk "
        "(78.6 MB)."
    )
    assert advice(seen(0.5), module, folder, num_cores=2) == expected
    many_parts = SimpleNamespace(hparams={"micro_batches": 2}, blocks=lambda: [module])
    assert advice(seen(0.5, 0.934), many_parts, data, num_cores=2) == (  # type: ignore[arg-type]
        "The GPU's memory is 93% full: a smaller --data.batch_size or --model.micro_batches 4 or the callback "
        "cfe_lightning.compute.acceleration.RecomputeActivations would need less."
    )
