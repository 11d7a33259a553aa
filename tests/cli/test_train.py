"""train.py from a temporary folder: what it writes, what it refuses and in which words, what it continues."""

from __future__ import annotations

import csv
import errno
import json
import logging
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import toy
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from toy import FixedToyExplainer, ToyNetwork, toy_classifier

from cfe_lightning.cli import train as command
from cfe_lightning.explainer import load_explainer
from cfe_lightning.files.trust import resolve_class_path
from cfe_lightning.training import run as configured_run
from cfe_lightning.training import tracking

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a classifier and a config, as a user's would be."""
    monkeypatch.chdir(tmp_path)
    # LightningCLI looks at it although the arguments are given.
    monkeypatch.setattr(sys, "argv", ["train.py"])
    toy_classifier().save("classifier.pt")
    write_config()
    return tmp_path


def write_config(name: str = "toy.yaml", kind: str = "toy.ToyExplainer", **model: Any) -> None:
    load = {"path": "classifier.pt", "trusted": ["toy"]}
    classifier = {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": load}
    config = {
        "seed_everything": 3,
        "model": {"class_path": kind, "init_args": {"classifier": classifier, **model}},
        "data": {"class_path": "toy.ToyData", "init_args": {"batch_size": 4, "horizontal_flip": False}},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "cfe_lightning.training.EMA", "init_args": {"decay": 0.9}},
                {"class_path": "cfe_lightning.training.SampleGrid", "init_args": {"every_n_batches": 4}},
                {"class_path": "cfe_lightning.training.Throughput", "init_args": {"every_n_batches": 4}},
            ],
            "logger": {
                "class_path": "lightning.pytorch.loggers.WandbLogger",
                "init_args": {"project": "cfe-lightning"},
            },
        },
    }
    Path("configs").mkdir(exist_ok=True)
    (Path("configs") / name).write_text(yaml.safe_dump(config))


def main(arguments: Sequence[str]) -> int:
    return command.main([*arguments, "--trusted", "toy", "--trusted", __name__.partition(".")[0]])


def train(*arguments: str) -> int:
    return main(["--config", "toy.yaml", *arguments])


def error(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one sentence that a refused command leaves."""
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1].removeprefix("error: ")


def weights(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["current_model_state"]


def assert_same_weights(one: str, other: str) -> None:
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


def assert_same_log(one: str, other: str) -> list[dict[str, str]]:
    """The rows of both runs' metrics.csv, which may differ in speed."""
    logs = []
    for folder in (one, other):
        with Path(folder, "metrics.csv").open(newline="") as file:
            logs.append([{**row, "images_per_second": ""} for row in csv.DictReader(file)])
    assert logs[0] == logs[1]
    return logs[0]


def test_a_run_fills_one_folder_and_nothing_else(workplace: Path) -> None:
    assert train("--run", "first", "--model.amplitude", "0.6") == 0
    written = {str(path.relative_to(workplace)) for path in workplace.rglob("*") if path.is_file()}
    assert written - {"classifier.pt", "configs/toy.yaml"} == {
        "checkpoints/first/best.ckpt",
        "checkpoints/first/last.ckpt",
        "checkpoints/first/config.yaml",
        "checkpoints/first/metrics.csv",
        "checkpoints/first/samples/00000000.png",
        "checkpoints/first/samples/00000004.png",
        "checkpoints/first/samples/00000008.png",
    }
    # The checkpoint alone is enough, and is the averaged model.
    Path("classifier.pt").unlink()
    explainer = load_explainer("checkpoints/first/best.ckpt", ["toy"])
    assert explainer.hparams.amplitude == 0.6
    assert explainer.hparams.keys() == {"amplitude", "learning_rate", "num_steps", "adversarial_weight"}
    config = yaml.safe_load(Path("checkpoints/first/config.yaml").read_text())
    assert config["model"]["init_args"]["amplitude"] == 0.6
    # As the user gave it: what W&B was told about this run is no part of it.
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "."
    with Path("checkpoints/first/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(8)]
    assert {"train/class", "train/adversarial", "train/proximity", "train/critic", "val/loss"} <= rows[0].keys()
    assert [bool(row["images_per_second"]) for row in rows] == [False] * 3 + [True] + [False] * 3 + [True]
    assert float(rows[-1]["val/loss"]) < float(rows[3]["val/loss"])


def test_the_run_is_named_after_its_config_and_overrides_count_in_any_order(workplace: Path) -> None:
    assert main(["--model.amplitude", "0.4", "--trainer.max_epochs=1", "--config", "configs/toy.yaml"]) == 0
    checkpoint = torch.load("checkpoints/toy/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["amplitude"] == 0.4
    assert checkpoint["epoch"] == 0


def test_resuming_is_the_straight_run_bit_for_bit(workplace: Path) -> None:
    assert train("--run", "straight", "--trainer.max_epochs", "4") == 0
    assert train("--run", "short") == 0
    assert train("--run", "short", "--resume", "--trainer.max_epochs", "3") == 0
    # Without a config the run's own is taken, wherever its folder is now.
    Path("checkpoints/short").rename("moved")
    assert main(["--resume", "moved/last.ckpt", "--trainer.max_epochs", "4"]) == 0
    assert_same_weights("checkpoints/straight/last.ckpt", "moved/last.ckpt")
    best = [torch.load(f"{folder}/best.ckpt", weights_only=True) for folder in ("checkpoints/straight", "moved")]
    assert best[0]["global_step"] == best[1]["global_step"]
    log = assert_same_log("checkpoints/straight", "moved")
    assert len(log) == 16
    assert not Path("checkpoints/short").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_stopping_says_how_to_continue(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    step = toy.ToyExplainer.training_step

    def interrupted(self: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.total_batch_idx == 5:
            signal.raise_signal(number)
        step(self, batch, batch_idx)

    assert train("--run", "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(toy.ToyExplainer, "training_step", interrupted)
        assert train("--run", "stopped") == code
    printed = capsys.readouterr().err
    command = re.search(r"Training stopped after 6 batches by .+\. Continue with: train.py (--resume \S+)", printed)
    assert command is not None
    assert main(command[1].split()) == 0
    assert_same_weights("checkpoints/straight/last.ckpt", "checkpoints/stopped/last.ckpt")
    assert_same_log("checkpoints/straight", "checkpoints/stopped")


@pytest.mark.parametrize("place", ["ToyData.__init__", "ToyData.setup", "ToyExplainer.configure_optimizers"])
def test_a_signal_before_training_ends_cleanly(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    kind, name = place.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(toy, kind), name, lambda *_, **__: signal.raise_signal(signal.SIGTERM), raising=False)
        assert train() == 143
    said = capsys.readouterr().err
    assert "Stopped by SIGTERM. No batch is lost: give the same command again." in said
    assert "Traceback" not in said
    assert train("--trainer.max_epochs", "1") == 0


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_room(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--run", "straight") == 0
    save = torch.save
    monkeypatch.setattr(logging, "raiseExceptions", True)  # put back by the test

    def full(content: Any, file: Any) -> None:
        if content.get("epoch") == 1:
            file.write(b"half of a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        said = error(capsys, "--config", "toy.yaml", "--run", "full")
    assert said.startswith("No space left on device: checkpoints/full/last.ckpt (")
    assert not list(Path("checkpoints/full").rglob("*.part"))
    assert torch.load("checkpoints/full/last.ckpt", weights_only=True)["epoch"] == 0
    Path("checkpoints/full/.best.ckpt.part").write_text("what a kill has left")
    assert train("--run", "full", "--resume") == 0
    assert not list(Path("checkpoints/full").rglob("*.part"))
    assert_same_weights("checkpoints/straight/last.ckpt", "checkpoints/full/last.ckpt")
    assert_same_log("checkpoints/straight", "checkpoints/full")


def test_without_the_package_of_wandb_a_run_is_logged_to_its_folder(
    workplace: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train("--trainer.max_epochs", "1") == 0
    assert "everything is logged to metrics.csv and samples/." in caplog.text
    assert Path("checkpoints/toy/metrics.csv").is_file()


def test_a_mode_that_wandb_does_not_know_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "of line")
    assert error(capsys, "--config", "toy.yaml") == (
        "WANDB_MODE='of line' is no mode of W&B: choose from online, offline, shared, disabled, dryrun, run, or unset "
        "it."
    )


def test_a_run_is_not_overwritten_by_accident(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    before = Path("checkpoints/toy/last.ckpt").read_bytes()
    Path("checkpoints/toy/notes.txt").write_text("mine")
    assert error(capsys, "--config", "toy.yaml") == (
        "checkpoints/toy already holds a run: continue it with --resume, keep it with --run OTHER_NAME, or replace it "
        "with --overwrite."
    )
    # A mistake in the new run must not cost the old one.
    error(capsys, "--config", "toy.yaml", "--overwrite", "--data.batch_size", "0")
    assert Path("checkpoints/toy/last.ckpt").read_bytes() == before
    assert train("--overwrite", "--trainer.max_epochs", "1") == 0
    assert torch.load("checkpoints/toy/last.ckpt", weights_only=True)["epoch"] == 0
    assert Path("checkpoints/toy/notes.txt").read_text() == "mine"
    assert not Path("checkpoints/toy/samples/00000008.png").exists()
    message = error(capsys, "--config", "toy.yaml", "--overwrite", "--resume")
    assert message.startswith("--overwrite would remove checkpoints/toy/last.ckpt, which --resume needs")


def test_an_explainer_without_parameters_is_saved_at_once(workplace: Path) -> None:
    write_config("fixed.yaml", "toy.FixedToyExplainer")
    assert main(["--config", "fixed.yaml"]) == 0
    assert not Path("checkpoints/fixed/last.ckpt").exists()
    explainer = load_explainer("checkpoints/fixed/best.ckpt", ["toy"])
    assert explainer.explain(next(iter_images())).flipped.all()


def iter_images():
    from toy import toy_images

    yield toy_images()


def test_a_classifier_is_trained_by_the_same_command(workplace: Path) -> None:
    config = {
        "model": {
            "class_path": "cfe_lightning.classifier.training.ClassifierTraining",
            "init_args": {"output": "trained.pt", "learning_rate": 0.01},
        },
        "data": {"class_path": "toy.ToyData", "init_args": {"num_images": 32, "batch_size": 8}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    Path("configs/small.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", "small.yaml"]) == 0
    assert {"best.ckpt", "last.ckpt", "config.yaml", "metrics.csv"} == {
        p.name for p in Path("checkpoints/small").iterdir()
    }
    assert Path("trained.pt").is_file()
    assert main(["--config", "small.yaml", "--resume", "--trainer.max_epochs", "2"]) == 0
    assert torch.load("checkpoints/small/last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No config is named: give --config FILE; in configs/ there are: "),
        (
            ["--config", "toi.yaml"],
            "There is no config 'toi.yaml', neither as given nor in configs/, where there are: toy",
        ),
        (["--resume"], "--resume needs to know which run: add --config, --run NAME, or the path of a checkpoint."),
        (
            ["--resume", "gone/last.ckpt"],
            "There is no gone/config.yaml of a run to resume: name the config with --config.",
        ),
        (["--config", "toy.yaml", "--resume"], "There is no checkpoints/toy/last.ckpt to resume: leave out --resume"),
        (
            ["--config", "toy.yaml", "--model.amplitud", "1"],
            "Parser key \"model\": Problem with given class_path 'toy.ToyExplainer': Option 'amplitud' is not accepted "
            "(--print_config shows every option)",
        ),
        (
            ["--config", "toy.yaml", "--model.amplitude", "much"],
            'Parser key "model": Problem with given class_path \'toy.ToyExplainer\': Parser key "amplitude": Expected '
            "a <class 'float'>. Got value: much (--print_config shows every option)",
        ),
        (["--config", "toy.yaml", "--trainer.max_epoch", "1"], "unrecognized arguments: --trainer.max_epoch 1"),
        (
            ["--config", "toy.yaml", "--model", "toy.Gone"],
            "Parser key \"model\": Problem with given class_path 'toy.Gone':",
        ),
        (["--config", "toy.yaml", "--data.channels", "2"], "channels must be 1 (grey) or 3 (RGB), got 2."),
        (
            ["--config", "toy.yaml", "--model.classifier.init_args.path", "gone.pt"],
            "There is no classifier file gone.pt: train one with",
        ),
        (
            ["--config", "toy.yaml", "--data.num_images", "3"],
            "The training split has 3 images for 1 process(es), fewer",
        ),
        (["--config", "toy.yaml", "--trainer.accelerator", "cuda"], "`CUDAAccelerator` can not run on your system"),
    ],
)
def test_a_mistake_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("needs a machine without GPU")
    assert error(capsys, *arguments).startswith(message)
    assert not list(Path().glob("checkpoints/*/*.ckpt"))


def test_the_classifier_is_checked_before_the_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = toy_classifier()
    classifier.network.fc.weight.data = classifier.network.fc.weight.data.flip(0)  # names in the wrong order
    classifier.save("classifier.pt")
    enough = ["--data.num_images", "64"]
    assert "accuracy" in error(capsys, "--config", "toy.yaml", *enough)
    assert not Path("checkpoints/toy").exists()
    assert train(*enough, "--skip-classifier-check", "--trainer.max_epochs", "1") == 0
    assert "class" in error(capsys, "--config", "toy.yaml", "--run", "three", "--data.num_classes", "3")


def test_gradients_of_several_batches_are_added_up_by_the_method(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--config", "toy.yaml", "--trainer.accumulate_grad_batches", "4")
    assert error(capsys, *asked) == (
        "accumulate_grad_batches 4 adds up gradients for one optimiser, but ToyExplainer steps its own: leave it out."
    )
    write_config(kind="cfe_lightning.methods.dxai.Dxai", min_resolution=8)
    assert "set --model.micro_batches 4 and a --data.batch_size 4 times as large instead" in error(capsys, *asked)


def test_a_classifier_without_gradients_is_refused_by_the_methods_that_need_them(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ToyNetwork.forward
    monkeypatch.setattr(ToyNetwork, "forward", lambda network, image: forward(network, image).detach())
    write_config("fixed.yaml", "toy.FixedToyExplainer")
    message = error(capsys, "--config", "fixed.yaml", "--skip-classifier-check")
    assert message.startswith("No gradient reaches the image through this classifier (ToyNetwork)")
    assert not Path("checkpoints").exists()
    monkeypatch.setattr(FixedToyExplainer, "needs_gradient", False)
    assert main(["--config", "fixed.yaml"]) == 0


def test_only_what_the_command_trusts_is_trusted_while_it_trains(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def named_late(module: Any) -> None:
        resolve_class_path("evil.Network", trusted=["evil"])

    monkeypatch.setattr(toy.ToyExplainer, "configure_model", named_late)
    assert "--trusted evil" in error(capsys, "--config", "toy.yaml", "--skip-classifier-check")
    assert "--trusted evil" in error(capsys, "--config", "toy.yaml", "--skip-classifier-check", "--dry-run")


def test_a_resumed_run_does_not_keep_its_checkpoint_in_memory(workplace: Path) -> None:
    assert train() == 0
    again = configured_run.ConfiguredRun(
        [Path("configs/toy.yaml")], [], Path("checkpoints/toy"), Path("checkpoints/toy/last.ckpt"), ["toy"]
    )
    assert again.checkpoint == {}


def test_another_architecture_cannot_be_resumed(
    workplace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert train("--trainer.max_epochs", "1") == 0
    toy_classifier(image_size=8).save("classifier.pt")
    message = error(capsys, "--config", "toy.yaml", "--resume")
    assert message == (
        "checkpoints/toy/last.ckpt cannot be resumed with this config: 2 weights differ in name or shape, for example "
        "class_images; use the run's own config.yaml, or start a new run without --resume."
    )
    toy_classifier().save("classifier.pt")
    assert train("--resume", "--model.amplitude", "0.3") == 0
    assert "Resuming with other settings than the checkpoint's: amplitude 0.8 -> 0.3." in caplog.messages


def test_another_runs_checkpoint_starts_a_run_of_its_own(workplace: Path) -> None:
    assert train("--run", "one", "--trainer.max_epochs", "1") == 0
    kept = Path("checkpoints/one/last.ckpt").read_bytes()
    assert train("--run", "two", "--resume", "checkpoints/one/last.ckpt") == 0
    assert Path("checkpoints/one/last.ckpt").read_bytes() == kept
    assert torch.load("checkpoints/two/last.ckpt", weights_only=True)["epoch"] == 1


def test_a_loss_that_is_no_number_has_its_own_exit_code(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "--config", "toy.yaml", "--model.adversarial_weight", ".inf", code=1)
    assert re.match(r"train/\w+ is not finite at iteration \d+: training stopped", message)
    assert Path("checkpoints/toy/nonfinite.ckpt").is_file()
    assert not Path("checkpoints/toy/last.ckpt").exists()


def test_save_last_would_be_a_second_last_checkpoint(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    text = f"--trainer.callbacks=[{yaml.safe_dump(checkpoint, default_flow_style=True, width=999).strip()}]"
    assert "remove save_last" in error(capsys, "--config", "toy.yaml", text)


def test_print_config_shows_every_option(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train("--print_config", "--model.num_steps", "7")
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["num_steps"] == 7
    assert shown["trainer"]["inference_mode"] is False
    assert shown["trainer"]["logger"]["init_args"]["project"] == "cfe-lightning"


def test_the_options_of_a_class_need_no_config(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--model.help", "toy.ToyExplainer"])
    assert end.value.code == 0
    assert "--model.num_steps" in capsys.readouterr().out


def test_several_devices_find_the_strategy_that_two_optimisers_need(workplace: Path, tmp_path: Path) -> None:
    config = [Path("configs/toy.yaml")]
    several = configured_run.ConfiguredRun(config, ["--trainer.devices", "2"], tmp_path / "run", None, ["toy"]).trainer
    assert several.world_size == 2
    assert several.strategy._ddp_kwargs == {"find_unused_parameters": True}
    ours = {"class_path": "cfe_lightning.classifier.training.ClassifierTraining", "init_args": {"output": "a.pt"}}
    for architecture, unknown in (("resnet18", False), ("torchvision.models.resnet18", True)):
        ours["init_args"]["architecture"] = architecture
        options = ["--trainer.devices", "2", "--model", json.dumps(ours)]
        several = configured_run.ConfiguredRun(config, options, tmp_path / "run", None, ["toy", "torchvision"]).trainer
        assert several.strategy._ddp_kwargs == {"find_unused_parameters": unknown, "broadcast_buffers": False}
    assert configured_run.ConfiguredRun(config, [], tmp_path / "run", None, ["toy"]).trainer.world_size == 1


def test_help_names_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("config", "run", "output", "resume", "overwrite", "print_config"))


class FakeWandbLogger(DummyLogger):
    """Notes what it was started with."""

    started: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self,
        project: str,
        save_dir: str = ".",
        name: str | None = None,
        id: str | None = None,
        mode: str | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__()
        self.id = id or "abc123"
        self.started.append({"project": project, "save_dir": save_dir, "name": name, "id": id, "mode": mode})

    @property
    def version(self) -> str:
        return self.id

    def log_image(self, **_: Any) -> None:
        pass


def test_wandb_is_told_about_the_run_and_continues_its_curves(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "WandbLogger", FakeWandbLogger)
    monkeypatch.setattr(configured_run, "wandb_must_be_offline", lambda: True)
    text = (
        Path("configs/toy.yaml")
        .read_text()
        .replace("lightning.pytorch.loggers.WandbLogger", f"{__name__}.FakeWandbLogger")
    )
    Path("configs/toy.yaml").write_text(text)
    assert train("--trainer.max_epochs", "1") == 0
    assert train("--resume") == 0
    assert train("--run", "other", "--resume", "checkpoints/toy/last.ckpt") == 0
    run = {"project": "cfe-lightning", "save_dir": "checkpoints/toy", "name": "toy", "mode": "offline"}
    other = run | {"save_dir": "checkpoints/other", "name": "other"}
    assert FakeWandbLogger.started == [run | {"id": None}, run | {"id": "abc123"}, other | {"id": None}]


def test_wandb_can_be_switched_off(workplace: Path) -> None:
    assert train("--trainer.logger", "false", "--trainer.max_epochs", "1") == 0
    assert Path("checkpoints/toy/metrics.csv").is_file()
