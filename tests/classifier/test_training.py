import csv
import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from toy import ToyData, toy_class_names, toy_classifier, toy_trainer

from cfe_lightning.classifier import load_classifier
from cfe_lightning.classifier.training import ClassifierTraining
from cfe_lightning.compute.acceleration import ChannelsLast
from cfe_lightning.files.trust import only_trusted

TOY = {"architecture": "toy.ToyNetwork", "init_args": {"num_classes": 2}}


class Spoil(Callback):
    """Swaps the classes' weights from the second epoch on, so that the first is the best, and keeps the first.

    ``first`` replaces the weights that the first epoch has found.
    """

    def __init__(self, first=None):
        self.replaced_by = first
        self.first = None

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            self.first = {name: value.clone() for name, value in module.network.state_dict().items()}

    def on_validation_start(self, trainer, module):
        weight = module.network.fc.weight.data
        if trainer.current_epoch > 0:
            weight.copy_(-8 * torch.eye(2))
        elif self.replaced_by is not None:
            weight.copy_(self.replaced_by)


class Note(Callback):
    """Writes every process's accuracy, loss and number of the best epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, module):
        best = {key: module.best[key] for key in ("accuracy", "loss", "epoch")}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(best))


class Watch(Callback):
    """Records the network's mode in every training batch and every validation batch."""

    def __init__(self):
        self.training, self.validating = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.training.append(module.network.training and module.network.norm.training)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.validating.append(module.network.training or module.network.norm.training)


def fit(module, data, tmp_path, callbacks=(), max_epochs=1, resume=None, **options):
    pl.seed_everything(0)
    trainer = toy_trainer(tmp_path, callbacks, max_epochs=max_epochs, inference_mode=True, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


def accuracy_of(classifier, dataset):
    samples = [dataset[index] for index in range(len(dataset))]
    logits = classifier(torch.stack([sample["image"] for sample in samples]))
    labels = torch.stack([sample["label"] for sample in samples])
    return (logits.argmax(dim=1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def test_fit_writes_a_file_that_says_everything(tmp_path):
    output = tmp_path / "new" / "toy.pt"
    module = ClassifierTraining(output=str(output), architecture="resnet18", small_image=True)
    fit(module, ToyData(num_images=4, channels=1), tmp_path)
    classifier = load_classifier(str(output))
    spec = classifier.spec
    assert classifier.class_names == toy_class_names(2)
    assert (spec.image_size, spec.mean, spec.std) == (16, (0.5,), (0.5,))
    assert (spec.head, spec.feature_map) == ("fc", "layer4")
    assert spec.init_args == {"num_classes": 2, "channels": 1, "small_image": True}
    assert classifier.feature_map(torch.zeros(1, 1, 16, 16)).shape == (1, 512, 2, 2)
    assert [path.name for path in output.parent.iterdir()] == ["toy.pt"]


def test_the_noise_does_not_depend_on_the_layout(tmp_path, monkeypatch):
    seen, forward = [], ClassifierTraining.forward
    monkeypatch.setattr(
        ClassifierTraining, "forward", lambda module, image: seen.append(image.clone()) or forward(module, image)
    )
    for folder, callbacks in (("plain", []), ("other", [ChannelsLast()])):
        pl.seed_everything(0, verbose=False)
        module = ClassifierTraining(output=str(tmp_path / folder / "toy.pt"), noise=0.5)
        fit(module, ToyData(num_images=8), tmp_path / folder, callbacks=callbacks, num_sanity_val_steps=0)
    plain, other = seen[0], seen[len(seen) // 2]
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, other)


def test_simple_learns_an_easy_task_and_the_file_is_as_good_as_logged(tmp_path):
    output = tmp_path / "toy.pt"
    # 10 validation images in batches of 4: an average over batches would weigh the last two images double.
    data = ToyData(num_images=10, image_size=8, num_classes=3)
    module = ClassifierTraining(output=str(output), learning_rate=0.01, label_smoothing=0.1)
    trainer = fit(module, data, tmp_path, max_epochs=8)
    classifier = load_classifier(str(output))
    accuracy, loss = accuracy_of(classifier, data.dataset("val"))
    assert accuracy == pytest.approx(module.best["accuracy"], abs=1e-6)
    assert loss == pytest.approx(module.best["loss"], rel=1e-3)
    assert accuracy >= 0.8
    results = trainer.test(module, datamodule=data, verbose=False)
    assert results[0]["test/accuracy"] == pytest.approx(accuracy_of(classifier, data.dataset("test"))[0], abs=1e-6)


def test_the_best_epoch_is_written_and_not_the_last(tmp_path):
    output, spoil = tmp_path / "toy.pt", Spoil()
    module = ClassifierTraining(output=str(output), **TOY)
    fit(module, ToyData(), tmp_path, callbacks=[spoil], max_epochs=3)
    written = load_classifier(str(output), trusted=["toy"]).network.state_dict()
    assert module.best["epoch"] == 0
    for name, value in spoil.first.items():
        assert torch.equal(written[name], value), name


def test_the_sanity_check_does_not_count_and_of_equal_accuracies_the_lower_loss_is_kept(tmp_path):
    module = ClassifierTraining(output=str(tmp_path / "toy.pt"), **TOY)
    for accuracy, loss, epoch in [
        (1.0, 0.1, 9),
        (0.5, 1.0, 0),
        (0.75, 2.0, 1),
        (0.75, 1.5, 2),
        (0.75, 1.6, 3),
        (0.5, 0.1, 4),
    ]:
        module._measured = lambda values=(accuracy, loss): values
        module._trainer = SimpleNamespace(sanity_checking=accuracy == 1.0, current_epoch=epoch)
        module.log_dict = lambda *args, **kwargs: None
        module.on_validation_epoch_end()
    assert module.best["epoch"] == 2


def test_train_mode_comes_back_after_every_validation(tmp_path):
    watch = Watch()
    module = ClassifierTraining(output=str(tmp_path / "toy.pt"), **TOY)
    fit(module, ToyData(num_images=8), tmp_path, callbacks=[watch], max_epochs=3)
    assert watch.training == [True] * 6
    assert watch.validating == [False] * (2 + 3 * 2)
    # Batch norm has counted the training batches up to the best epoch, and no validation batch.
    written = load_classifier(str(tmp_path / "toy.pt"), trusted=["toy"]).network
    assert written.norm.num_batches_tracked == 2 * (module.best["epoch"] + 1)


def test_a_resumed_run_remembers_the_best_epoch(tmp_path):
    output, spoil = tmp_path / "toy.pt", Spoil()
    keep = ModelCheckpoint(dirpath=tmp_path / "run", save_last=True, monitor="val/accuracy", mode="max")
    fit(ClassifierTraining(output=str(output), **TOY), ToyData(), tmp_path, callbacks=[keep, spoil])
    output.unlink()
    resumed = ClassifierTraining(output=str(output), **TOY)
    fit(resumed, ToyData(), tmp_path, [Spoil()], max_epochs=2, resume=tmp_path / "run" / "last.ckpt")
    assert resumed.best["epoch"] == 0
    written = load_classifier(str(output), trusted=["toy"]).network.state_dict()
    for name, value in spoil.first.items():
        assert torch.equal(written[name], value), name


def test_two_processes_agree_on_one_file(tmp_path):
    output = tmp_path / "toy.pt"
    # Process 0 validates on images of class 0 and process 1 on images of class 1, and the first
    # epoch always answers 0: alone, one would measure 1 and the other 0.
    data = ToyData(num_images=8, batch_size=2)
    module = ClassifierTraining(output=str(output), **TOY)
    logger = CSVLogger(tmp_path, name="", version="log")
    callbacks = [Spoil(first=torch.zeros(2, 2)), Note(tmp_path)]
    fit(module, data, tmp_path, callbacks, max_epochs=2, devices=2, strategy="ddp_spawn", logger=logger)
    accuracy, loss = accuracy_of(load_classifier(str(output), trusted=["toy"]), data.dataset("val"))
    assert accuracy == 0.5
    for rank in (0, 1):
        best = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert best["epoch"] == 0
        assert best["accuracy"] == pytest.approx(accuracy)
        assert best["loss"] == pytest.approx(loss, abs=1e-5)
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    assert [float(row["val/accuracy"]) for row in rows] == [pytest.approx(accuracy), 0.0]


def test_the_loss_is_smoothed_cross_entropy(tmp_path):
    module = ClassifierTraining(output="x.pt", label_smoothing=0.2, image_size=8, channels=1, class_names=["a", "b"])
    module.configure_model()
    module.log = lambda *args, **kwargs: None
    batch = {"image": torch.zeros(2, 1, 8, 8), "label": torch.tensor([0, 0])}
    log_p = module(batch["image"]).log_softmax(dim=1)
    expected = -(0.9 * log_p[0, 0] + 0.1 * log_p[0, 1])
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_noise_is_for_training_only(tmp_path):
    module = ClassifierTraining(output="x.pt", noise=0.5, image_size=64, channels=1, class_names=["a", "b"])
    module.configure_model()
    module.log = lambda *args, **kwargs: None
    seen = []
    module.network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    batch = {"image": torch.zeros(8, 1, 64, 64), "label": torch.zeros(8, dtype=torch.long)}
    module.training_step(batch, 0)
    module.validation_step(batch, 0)
    # The network's own scale is [-1, 1] as well: mean and standard deviation 0.5 on [0, 1].
    assert seen[0].std().item() == pytest.approx(0.5, rel=0.02)
    assert seen[1].abs().max() == 0


def test_the_network_sees_what_the_frozen_classifier_will_show_it(tmp_path):
    module = ClassifierTraining(
        output="x.pt", image_size=8, channels=3, class_names=["a", "b"], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]
    )
    module.configure_model()
    image = torch.rand(2, 1, 12, 12) * 2 - 1
    assert torch.allclose(module(image), module.classifier()(image), atol=1e-6)
    assert module.network.training
    assert all(parameter.requires_grad for parameter in module.network.parameters())


def test_a_fast_development_run_writes_nothing(tmp_path):
    fit(ClassifierTraining(output=str(tmp_path / "toy.pt"), **TOY), ToyData(), tmp_path, fast_dev_run=True)
    assert not (tmp_path / "toy.pt").exists()


def test_a_file_of_another_kind_is_not_written_over(tmp_path):
    output = tmp_path / "thesis.pt"
    output.write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis.pt exists and is no classifier file: choose another output, or"):
        fit(ClassifierTraining(output=str(output), **TOY), ToyData(), tmp_path)
    assert output.read_text() == "years of work"
    toy_classifier().save(output)
    before = output.read_bytes()
    fit(ClassifierTraining(output=str(output), **TOY), ToyData(), tmp_path)
    assert output.read_bytes() != before


def test_a_network_is_refused_at_once_where_only_others_are_trusted(tmp_path):
    with only_trusted(["own"]), pytest.raises(ValueError, match="--trusted toy"):
        ClassifierTraining(output="x.pt", **TOY)
    # Built in time, but trained by a command that does not trust it.
    module = ClassifierTraining(output="x.pt", **TOY)
    with only_trusted([]), pytest.raises(ValueError, match="--trusted toy"):
        fit(module, ToyData(), tmp_path)


def test_training_without_validation_is_refused(tmp_path):
    module = ClassifierTraining(output=str(tmp_path / "toy.pt"), **TOY)
    with pytest.raises(ValueError, match="needs validation images, because they choose the epoch"):
        fit(module, ToyData(), tmp_path, limit_val_batches=0)


def test_a_network_for_other_classes_is_refused(tmp_path):
    module = ClassifierTraining(output="x.pt", **TOY)
    with pytest.raises(
        ValueError, match=r"returns \[2, 2\] for two images, but there are 3 classes: .* num_classes: 3"
    ):
        fit(module, ToyData(num_classes=3), tmp_path)


def test_data_that_do_not_say_enough_are_refused(tmp_path):
    data = ToyData()
    module = ClassifierTraining(output="x.pt")
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"class_names was not given and the data \(NoneType\) lack it"):
        trainer.fit(module, data.train_dataloader(), data.val_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet"}, "simple, pooled, resnet18, densenet121 or an import path, got 'resnet'"),
        ({"architecture": "simple", "small_image": True}, "small_image is for resnet18 and densenet121"),
        ({"architecture": "resnet18", "init_args": {"a": 1}}, "init_args are for an architecture given by import path"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierTraining(output="x.pt", **options)
