"""Trains a classifier and writes it as the file that every explanation starts from.

A validation split of its own chooses the epoch, never the test images.
"""

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
from cfe_lightning.classifier.outputs import logits_of
from cfe_lightning.classifier.spec import ClassifierSpec
from cfe_lightning.classifier.tracing import probe_image, trace_layers
from cfe_lightning.compute.processes import broadcast_buffers, log_training
from cfe_lightning.files.trust import resolve_class_path

#: Classes of the networks that are named by one word; any other architecture is an import path.
_OURS = {"simple": "SimpleCnn", "pooled": "PooledCnn", "resnet18": "ResNet18", "densenet121": "DenseNet121"}
#: Those of them that take ``small_image``.
_SMALL_STEM = ("resnet18", "densenet121")


class ClassifierTraining(pl.LightningModule):
    """Trains a classifier and, at the end, writes the epoch of the best validation accuracy as a classifier file.

    Args:
        output: Classifier file to write, for example ``checkpoints/shapes.pt``, for ``load_classifier``. An earlier
            classifier file of that name is replaced, any other file is not.
        architecture: ``simple`` (two convolutions), ``pooled`` (five, and a feature map), ``resnet18``,
            ``densenet121``, or the import path of an ``nn.Module`` class of your own or of a ``torchvision.models``
            builder; in ``train.py`` a package of your own also needs ``--trusted``.
        small_image: Gives ``resnet18`` and ``densenet121`` a first layer that keeps the resolution of small images.
        init_args: Arguments, with the number of classes, for an architecture given by import path.
        image_size: Side of the network's square input images in pixels; None takes the size of the data's images.
        channels: Number of image channels, 1 for grey and 3 for RGB; None takes the data's number.
        class_names: Class names in logit order; None takes the data's names in the order of the labels.
        learning_rate: Step size of AdamW.
        weight_decay: Weight decay of AdamW.
        label_smoothing: Share of the target probability that the loss spreads evenly over all classes, in [0, 1].
        noise: Standard deviation of Gaussian noise on training images, on the [-1, 1] scale. At 0.2 to 0.3 decisions,
            and so explanations, also rest on image content that survives a blur.
        mean: Mean per channel on the [0, 1] scale, subtracted from the image; None is 0.5 everywhere.
        std: Standard deviation per channel on the [0, 1] scale, by which the image is divided; None is 0.5 everywhere.

    Raises:
        ValueError: If the architecture is unknown or its options contradict each other. When fitting: if the data lack
            a value that was left None, if there is no validation split, if the network does not fit the classes, or if
            ``output`` is a file of another kind.
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
        if architecture not in _OURS and "." not in architecture:
            raise ValueError(f"architecture must be {', '.join(_OURS)} or an import path, got {architecture!r}.")
        if small_image and architecture not in _SMALL_STEM:
            raise ValueError(f"small_image is for resnet18 and densenet121, but architecture is {architecture!r}.")
        if init_args and "." not in architecture:
            raise ValueError(f"init_args are for an architecture given by import path, not for {architecture!r}.")
        if "." in architecture:
            # Checked here and not only when it is built, because spawned processes do not know `only_trusted`.
            resolve_class_path(architecture, trusted=[architecture.partition(".")[0]])

        # Options.
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

        # Network, which ``configure_model`` builds, and measurements.
        self.spec: ClassifierSpec | None = None
        self.network: nn.Module = nn.Identity()
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.register_buffer("std", torch.empty(0), persistent=False)
        self.accuracy = MeanMetric()
        self.loss = MeanMetric()
        self.best: dict[str, Any] | None = None
        # For DDP: every weight of our own networks has a gradient in each batch. Batch statistics are sent before a
        # validation instead of in each iteration.
        self.ddp_options = {"find_unused_parameters": "." in architecture, "broadcast_buffers": False}

    def configure_model(self) -> None:
        """Builds the network as soon as the data are known, which may set classes, channels and size."""
        if self.spec is not None:
            return

        # Spec.
        class_names = tuple(self._given_or_from_data("class_names"))
        channels, image_size = self._given_or_from_data("channels"), self._given_or_from_data("image_size")
        class_path, init_args = self._class_and_arguments(len(class_names), channels, image_size)
        mean, std = (tuple(given or [0.5] * channels) for given in (self.given_mean, self.given_std))
        spec = ClassifierSpec(
            class_path=class_path, init_args=init_args, head=None, class_names=class_names, image_size=image_size,
            mean=mean, std=std,
        )  # fmt: skip

        # Network, tried once.
        self.network = build_network(spec, trusted=[class_path.partition(".")[0]])
        self.network.eval()
        with torch.no_grad():
            shape = list(
                logits_of(self.network(probe_image(self.network, channels, image_size)), 2, len(class_names)).shape
            )
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
        """Refuses to train without validation images, or if a file of another kind would be overwritten."""
        if not self.trainer.enable_validation:
            raise ValueError("Training a classifier needs validation images, because they choose the epoch to keep.")
        output = Path(self.output)
        if self.trainer.is_global_zero and os.path.lexists(output) and not is_classifier_file(output):
            raise ValueError(f"{output} exists and is no classifier file: choose another output, or remove that file.")

    def forward(self, image: Tensor) -> Tensor:
        """Returns logits, [B, C, H, W] in [-1, 1] -> [B, K]."""
        assert self.spec is not None, "configure_model has not run"
        prepared = prepare(image, self.spec, self.mean, self.std)
        return logits_of(self.network(prepared), len(prepared), len(self.spec.class_names))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the cross-entropy of one batch."""
        image = batch["image"]
        if self.noise:
            # Drawn in the order of the pixels, whereas `randn_like` would follow the memory layout of the images.
            image = image + self.noise * torch.randn(image.shape, device=image.device, dtype=image.dtype)
        logits = self(image)
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        correct = (logits.detach().argmax(dim=1) == batch["label"]).float().mean()
        log_training(self, {"loss": loss, "accuracy": correct}, len(logits), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Gives all processes the batch statistics of the first, to measure with and to keep."""
        broadcast_buffers(self.network)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collects accuracy and loss over all images of all processes."""
        logits = self(batch["image"])
        self.accuracy.update((logits.argmax(dim=1) == batch["label"]).float())
        self.loss.update(F.cross_entropy(logits, batch["label"], reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Keeps the weights if this epoch is the best; of equal accuracies the lower loss decides."""
        accuracy, loss = self._measured()
        if self.trainer.sanity_checking:
            return
        self.log_dict({"val/accuracy": accuracy, "val/loss": loss}, prog_bar=True, sync_dist=True)
        if self.best is None or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            # A copy on the CPU, because training goes on.
            state = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            self.best = {"accuracy": accuracy, "loss": loss, "epoch": self.current_epoch, "state_dict": state}

    # The same measurements, on images that did not choose the epoch.
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Logs ``test/accuracy`` and ``test/loss``, which Lightning also prints."""
        accuracy, loss = self._measured()
        self.log_dict({"test/accuracy": accuracy, "test/loss": loss}, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns AdamW over all weights."""
        return torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the best epoch so far, so that a resumed run cannot forget it."""
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the best epoch that ``on_save_checkpoint`` stored."""
        self.best = checkpoint["best"]

    def on_fit_end(self) -> None:
        """Restores the best epoch and writes it."""
        if self.best is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.network.load_state_dict(self.best["state_dict"])
        if self.trainer.is_global_zero:
            self.classifier().save(self.output)
        rank_zero_info(
            f"Wrote {self.output}: validation accuracy {self.best['accuracy']:.4f}, epoch {self.best['epoch'] + 1}."
        )

    def classifier(self) -> FrozenClassifier:
        """Returns a frozen copy of the network as it is now, with head and feature map found by tracing."""
        assert self.spec is not None, "configure_model has not run"
        # A copy, because a frozen network cannot be trained on.
        network = copy.deepcopy(self.network)
        layers = trace_layers(network, self.spec.channels, self.spec.image_size)
        return FrozenClassifier(network, self.spec.with_layers(layers))

    def _measured(self) -> tuple[float, float]:
        """Returns accuracy and loss over all processes, so that all of them agree on the best epoch."""
        measured = float(self.accuracy.compute()), float(self.loss.compute())
        self.accuracy.reset()
        self.loss.reset()
        return measured

    def _class_and_arguments(self, num_classes: int, channels: int, image_size: int) -> tuple[str, dict[str, Any]]:
        if self.architecture not in _OURS:
            return self.architecture, self.init_args
        arguments: dict[str, Any] = {"num_classes": num_classes, "channels": channels}
        if self.architecture == "simple":
            arguments["image_size"] = image_size
        if self.architecture in _SMALL_STEM:
            arguments["small_image"] = self.small_image
        return f"cfe_lightning.classifier.networks.{_OURS[self.architecture]}", arguments

    def _given_or_from_data(self, name: str) -> Any:
        """Returns an option of this name, or the data's attribute of this name if the option is None."""
        data = self.trainer.datamodule if getattr(self, name) is None else self  # type: ignore[attr-defined]
        found = getattr(data, name, None)
        if found is None:
            raise ValueError(f"{name} was not given and the data ({type(data).__name__}) lack it: set {name}.")
        return found
