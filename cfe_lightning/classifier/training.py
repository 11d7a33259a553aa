"""Training one of our own classifiers, up to the one file that everything else starts from.

Source: DXAI, sections 2.4 and 6. The epoch is chosen on a validation split of its own, never on test images (7, 3).
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from cfe_lightning.classifier.file import build_network, is_classifier_file
from cfe_lightning.classifier.frozen import FrozenClassifier, prepare
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import probe_image, trace_layers
from cfe_lightning.compute.processes import broadcast_buffers, log_training
from cfe_lightning.files.trust import resolve_class_path

_OURS = "cfe_lightning.classifier.networks"


class ClassifierTraining(pl.LightningModule):
    """Trains a classifier and, at the end, writes the epoch of the best validation accuracy as a classifier file.

    Args:
        output: The file to write, for example ``checkpoints/shapes.pt``; ``load_classifier`` reads it. An earlier
            classifier file of that name is replaced, any other file is not.
        architecture: ``simple`` (two convolutions, DXAI's table 7), ``pooled`` (five, and a feature map), ``resnet18``,
            ``densenet121``, or the import path of an ``nn.Module`` class of your own or of a ``torchvision.models``
            builder; in ``train.py`` a package of your own also needs ``--trusted``.
        small_image: For ``resnet18`` and ``densenet121``: a first layer that keeps the resolution of small images.
        init_args: Arguments for an architecture given by import path, with its number of classes.
        image_size: Side of the square images the network sees; None takes the data's.
        channels: 1 for grey, 3 for RGB; None takes the data's.
        class_names: Names in logit order; None takes the data's.
        learning_rate: Step size of AdamW.
        weight_decay: Of AdamW.
        label_smoothing: Probability that the loss spreads over all classes.
        noise: Standard deviation of Gaussian noise on training images, on the scale of [-1, 1]. At 0.2 to 0.3 decisions
            rest on what survives a blur, too, and so do explanations.
        mean: One number per channel on the [0, 1] scale, subtracted from the image; None is 0.5 everywhere.
        std: As ``mean``; the image is divided by it.

    Raises:
        ValueError: If the architecture is unknown or its options contradict each other; when fitting, if the data do
            not say what was left None, if there is no validation split, if the network does not fit the classes, or if
            another kind of file is in the place of ``output``.
    """

    def __init__(
        self,
        *,
        output: str,
        architecture: Literal["simple", "pooled", "resnet18", "densenet121"] | str = "simple",
        small_image: bool = False,
        init_args: dict[str, Any] | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        class_names: list[str] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        noise: float = 0.0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if architecture not in ("simple", "pooled", "resnet18", "densenet121") and "." not in architecture:
            raise ValueError(
                f"architecture must be simple, pooled, resnet18, densenet121 or an import path, got {architecture!r}."
            )
        if small_image and architecture not in ("resnet18", "densenet121"):
            raise ValueError(f"small_image is for resnet18 and densenet121, but architecture is {architecture!r}.")
        if init_args and "." not in architecture:
            raise ValueError(f"init_args are for an architecture given by import path, not for {architecture!r}.")
        if "." in architecture:
            # Here already, and not only where it is built: processes that are spawned know nothing of `only_trusted`.
            resolve_class_path(architecture, trusted=[architecture.partition(".")[0]])
        self.save_hyperparameters()
        self.output = output
        self.architecture = architecture
        self.small_image = small_image
        self.init_args = init_args or {}
        self.image_size = image_size
        self.channels = channels
        self.class_names = class_names
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.noise = noise
        self.given_mean = mean
        self.given_std = std
        self.spec: ClassifierSpec | None = None
        self.network: nn.Module = nn.Identity()
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.register_buffer("std", torch.empty(0), persistent=False)
        self.accuracy = MeanMetric()
        self.loss = MeanMetric()
        self.best: dict[str, Any] | None = None
        # For DDP: every weight of our own networks has a gradient, in each batch; batch statistics are sent before a
        # validation instead of in each iteration.
        self.ddp_options = {"find_unused_parameters": "." in architecture, "broadcast_buffers": False}

    def configure_model(self) -> None:
        """Builds the network once the data have said how many classes there are."""
        if self.spec is not None:
            return
        class_names = tuple(self._given_or_from_data("class_names", self.class_names))
        channels = self._given_or_from_data("channels", self.channels)
        image_size = self._given_or_from_data("image_size", self.image_size)
        class_path, init_args = self._network_arguments(len(class_names), channels, image_size)
        spec = ClassifierSpec(
            class_path=class_path,
            init_args=init_args,
            head=None,
            class_names=class_names,
            image_size=image_size,
            mean=tuple(self.given_mean or [0.5] * channels),
            std=tuple(self.given_std or [0.5] * channels),
        )
        self.network = build_network(spec, trusted=[class_path.partition(".")[0]])
        self.network.eval()
        with torch.no_grad():
            shape = list(self.network(probe_image(self.network, channels, image_size)).shape)
        self.network.train()
        if shape != [2, len(class_names)]:
            raise ValueError(
                f"{class_path} returns {shape} for two images, but there are {len(class_names)} classes: give it their "
                f"number in init_args, for example num_classes: {len(class_names)}."
            )
        self.mean = torch.tensor(spec.mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(spec.std, dtype=torch.float32).view(1, -1, 1, 1)
        self.spec = spec

    def on_fit_start(self) -> None:
        """Refuses to train where nothing would tell the best epoch, or where another kind of file would be lost."""
        if not self.trainer.enable_validation:
            raise ValueError("Training a classifier needs validation images, because they choose the epoch to keep.")
        output = Path(self.output)
        if self.trainer.is_global_zero and os.path.lexists(output) and not is_classifier_file(output):
            raise ValueError(
                f"The classifier would be written over {output}, which is no classifier file: choose another output, "
                "or remove that file."
            )

    def forward(self, image: Tensor) -> Tensor:
        """Logits, [B, C, H, W] in [-1, 1] -> [B, K]."""
        assert self.spec is not None, "configure_model has not run"
        return self.network(prepare(image, self.spec, self.mean, self.std))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        image = batch["image"]
        if self.noise:
            # Drawn pixel by pixel whatever the layout of the images, which `randn_like` would follow.
            image = image + self.noise * torch.randn(image.shape, device=image.device, dtype=image.dtype)
        logits = self(image)
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        correct = (logits.detach().argmax(dim=1) == batch["label"]).float().mean()
        log_training(self, {"loss": loss, "accuracy": correct}, len(logits), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Has all processes measure, and keep, the same batch statistics."""
        broadcast_buffers(self.network)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collects accuracy and loss over all images of all processes."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Keeps the weights if this epoch is the best; of equal accuracies the one with the lower loss is."""
        accuracy, loss = self._measured()
        if self.trainer.sanity_checking:
            return
        self.log_dict({"val/accuracy": accuracy, "val/loss": loss}, prog_bar=True, sync_dist=True)
        if self.best is None or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            state = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            self.best = {"accuracy": accuracy, "loss": loss, "epoch": self.current_epoch, "state_dict": state}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As ``validation_step``, on images that chose nothing."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Logs ``test/accuracy`` and ``test/loss``, which Lightning also prints."""
        accuracy, loss = self._measured()
        self.log_dict({"test/accuracy": accuracy, "test/loss": loss}, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the best epoch so far, so that a resumed run cannot forget it."""
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of ``on_save_checkpoint``."""
        self.best = checkpoint["best"]

    def on_fit_end(self) -> None:
        """Goes back to the best epoch and writes it."""
        if self.best is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.network.load_state_dict(self.best["state_dict"])
        if self.trainer.is_global_zero:
            self.classifier().save(self.output)
        rank_zero_info(
            f"Wrote {self.output}: validation accuracy {self.best['accuracy']:.4f}, epoch {self.best['epoch'] + 1}."
        )

    def classifier(self) -> FrozenClassifier:
        """The network as it is now, frozen, with its head and feature map found by tracing."""
        assert self.spec is not None, "configure_model has not run"
        network = copy.deepcopy(self.network)
        layers = trace_layers(network, self.spec.channels, self.spec.image_size)
        return FrozenClassifier(network, self.spec.with_layers(layers))

    def _measure(self, batch: dict[str, Any]) -> None:
        logits = self(batch["image"])
        self.accuracy.update((logits.argmax(dim=1) == batch["label"]).float())
        self.loss.update(F.cross_entropy(logits, batch["label"], reduction="none"))

    def _measured(self) -> tuple[float, float]:
        """Accuracy and loss over all processes, so that all of them agree on the best epoch."""
        measured = float(self.accuracy.compute()), float(self.loss.compute())
        self.accuracy.reset()
        self.loss.reset()
        return measured

    def _network_arguments(self, num_classes: int, channels: int, image_size: int) -> tuple[str, dict[str, Any]]:
        match self.architecture:
            case "simple":
                arguments = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
                return f"{_OURS}.SimpleCnn", arguments
            case "pooled":
                return f"{_OURS}.PooledCnn", {"num_classes": num_classes, "channels": channels}
            case "resnet18" | "densenet121":
                kind = "ResNet18" if self.architecture == "resnet18" else "DenseNet121"
                arguments = {"num_classes": num_classes, "channels": channels, "small_image": self.small_image}
                return f"{_OURS}.{kind}", arguments
            case class_path:
                return class_path, self.init_args

    def _given_or_from_data(self, name: str, given: Any) -> Any:
        if given is not None:
            return given
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        found = getattr(data, name, None)
        if found is None:
            raise ValueError(f"{name} was not given and the data ({type(data).__name__}) do not say it: set {name}.")
        return found
