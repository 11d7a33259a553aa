"""The smallest complete method, classifier and data, with which everything else is tested.

The classifier is exact by construction: class k is the image with its k-th vertical stripe (of K) the brightest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.data.base import ImageData, Sample, Split
from cfe_lightning.decisions import runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation

#: A StylEx of a few thousand parameters.
STYLEX: dict[str, Any] = {
    "base": 64,
    "max_width": 8,
    "z_dim": 8,
    "w_dim": 8,
    "mapping_layers": 2,
    "path_interval": 2,
    "r1_interval": 2,
    "reference_size": 16,
    "search_images": 4,
    "search_directions": 3,
    "kept_directions": 6,
    "degree": 20.0,
    "num_steps": 3,
    "shown_directions": 2,
}


class ToyNetwork(nn.Module):
    """Mean brightness of K vertical stripes, [B, C, H, W] -> [B, K]; a batch norm shows whether eval mode was kept."""

    def __init__(self, channels: int = 3, num_classes: int = 2) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, 1, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.pool = nn.AdaptiveAvgPool2d((1, num_classes))
        self.fc = nn.Linear(num_classes, num_classes, bias=False)
        nn.init.constant_(self.mix.weight, 1 / channels)
        nn.init.eye_(self.fc.weight)
        self.fc.weight.data.mul_(8)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.pool(self.norm(self.mix(image))).flatten(1))


class ToyExplainer(ExplainerModule):
    """Learns one additive image per class (first optimiser) against a linear critic (second optimiser).

    ``distinct`` is the image of the predicted class, the counterfactual exchanges it for that of the target.
    """

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        amplitude: float = 0.8,
        learning_rate: float = 0.1,
        num_steps: int = 3,
        adversarial_weight: float = 0.1,
    ) -> None:
        super().__init__(classifier)
        self.automatic_optimization = False
        self.amplitude = amplitude
        self.learning_rate = learning_rate
        self.num_steps = num_steps
        self.adversarial_weight = adversarial_weight
        shape = (classifier.num_classes, self.channels, self.image_size, self.image_size)
        self.class_images = nn.Parameter(torch.zeros(shape))
        self.critic = nn.Linear(self.channels * self.image_size**2, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        return torch.tanh(self.class_images[source]) * self.amplitude + image * 0

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        # Exchange the class images.
        logits = self.classifier(image)
        target = runner_up(logits) if target is None else target
        distinct = self.distinct(image, logits.argmax(dim=1))
        counterfactual = (image - distinct + self.distinct(image, target)).clamp(-1, 1)

        # Remove the own one step by step.
        strengths = torch.linspace(0, 1, self.num_steps, device=image.device).expand(len(image), -1)
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=(counterfactual - image).abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=self.classifier(counterfactual),
            steps=(image[:, None] - strengths[..., None, None, None] * distinct[:, None]).clamp(-1, 1),
            strengths=strengths,
            parts={
                "reconstruction": image.clone(),
                "agnostic": image - distinct,
                "distinct": distinct,
                "residual": torch.zeros_like(image),
            },
            scores={"change": (counterfactual - image).abs().mean(dim=(1, 2, 3))},
        )

    def training_step(self, batch: Sample, batch_idx: int) -> None:
        # Generator step.
        generator_optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc, union-attr]
        image = batch["image"]
        self.seen += len(image)
        # The random target makes a resumed run differ from a straight one if any random state is lost.
        target = torch.randint(self.classifier.num_classes, (len(image),), device=image.device)
        terms = self._generator_loss(image, target)
        generator_optimizer.zero_grad()
        self.manual_backward(sum(terms.values()))
        generator_optimizer.step()

        # Critic step.
        fake = self.explain(image, target).counterfactual
        assert fake is not None
        critic_loss = (
            F.softplus(-self.critic(image.flatten(1))) + F.softplus(self.critic(fake.detach().flatten(1)))
        ).mean()
        critic_optimizer.zero_grad()
        self.manual_backward(critic_loss)
        critic_optimizer.step()
        self.log_dict({f"train/{name}": value for name, value in (terms | {"critic": critic_loss}).items()})

    def _generator_loss(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        explanation = self.explain(image, target)
        assert explanation.counterfactual is not None
        assert explanation.counterfactual_logits is not None
        return {
            "class": F.cross_entropy(explanation.counterfactual_logits, target),
            "adversarial": -self.critic(explanation.counterfactual.flatten(1)).mean() * self.adversarial_weight,
            "proximity": (explanation.counterfactual - image).abs().mean(),
        }

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        explanation = self.explain(batch["image"])
        assert explanation.counterfactual_logits is not None
        loss = F.cross_entropy(explanation.counterfactual_logits, explanation.target)
        self.log("val/loss", loss, batch_size=len(explanation), sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam([self.class_images], lr=self.learning_rate),
            torch.optim.Adam(self.critic.parameters(), lr=self.learning_rate / 10),
        ]


class FixedToyExplainer(ToyExplainer):
    """A ``ToyExplainer`` with nothing to train: the class images are the stripes themselves."""

    needs_training = False

    def __init__(self, classifier: FrozenClassifier, *, amplitude: float = 0.8) -> None:
        super().__init__(classifier, amplitude=amplitude)
        for index in range(classifier.num_classes):
            stripe = slice(*_stripe(index, classifier.num_classes, self.image_size))
            self.class_images.data[index, :, :, stripe] = 3.0
        self.requires_grad_(False)


class ToyData(ImageData):
    """Noise with one bright stripe, drawn from (split, index); the label is the stripe."""

    def __init__(
        self,
        *,
        image_size: int = 16,
        channels: int = 3,
        batch_size: int = 4,
        num_workers: int = 0,
        num_classes: int = 2,
        num_images: int = 16,
        horizontal_flip: bool = False,
        balanced: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            batch_size=batch_size,
            num_workers=num_workers,
            horizontal_flip=horizontal_flip,
            balanced=balanced,
        )
        self.class_names = toy_class_names(num_classes)
        self.num_images = num_images

    def dataset(self, split: Split) -> Dataset[Sample]:
        return ToyDataset(split, self.num_images, self.image_size, self.channels, len(self.class_names))


class ToyDataset(Dataset[Sample]):
    """The samples of one split of ``ToyData``."""

    def __init__(self, split: Split, num_images: int, image_size: int, channels: int, num_classes: int) -> None:
        self.split = split
        self.shape = (num_images, channels, image_size, image_size)
        self.labels = torch.arange(num_images) % num_classes
        generator = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
        self.images = torch.rand(self.shape, generator=generator) * 0.8 - 0.9
        for index, label in enumerate(self.labels.tolist()):
            self.images[index, :, :, slice(*_stripe(label, num_classes, image_size))] += 0.6

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"image": self.images[index], "label": self.labels[index], "name": f"{self.split}/{index:04d}"}


def _stripe(index: int, num_classes: int, image_size: int) -> tuple[int, int]:
    return index * image_size // num_classes, (index + 1) * image_size // num_classes


def toy_class_names(num_classes: int) -> tuple[str, ...]:
    return tuple(f"stripe {index}" for index in range(num_classes))


def toy_classifier(num_classes: int = 2, image_size: int = 16, channels: int = 3) -> FrozenClassifier:
    """Builds an exact classifier of ``ToyData``."""
    spec = ClassifierSpec(
        class_path="toy.ToyNetwork",
        init_args={"channels": channels, "num_classes": num_classes},
        head="fc",
        feature_map="norm",
        class_names=toy_class_names(num_classes),
        image_size=image_size,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    return FrozenClassifier(ToyNetwork(channels, num_classes), spec)


def toy_images(num_images: int = 4, num_classes: int = 2, image_size: int = 16, channels: int = 3) -> Tensor:
    """Returns validation images of ``ToyData``, [num_images, C, H, W] in [-1, 1]; image i is of class i % K."""
    return ToyDataset("val", num_images, image_size, channels, num_classes).images


def toy_trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **arguments: Any) -> pl.Trainer:
    """Builds a quiet trainer on the CPU that writes nothing by itself."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "inference_mode": False,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))


def save_checkpoint(explainer: ExplainerModule, path: Path) -> Path:
    """Writes an untrained explainer as ``train.py`` would; read it with ``trusted=["toy"]``."""
    trainer = toy_trainer(path.parent)
    trainer.strategy.connect(explainer)
    trainer.save_checkpoint(path)
    return path


def toy_checkpoint(path: Path, num_classes: int = 2, image_size: int = 16, channels: int = 3) -> Path:
    """Writes a checkpoint of a working explainer (``FixedToyExplainer``: every counterfactual flips)."""
    return save_checkpoint(FixedToyExplainer(toy_classifier(num_classes, image_size, channels)), path)
