"""Training and explaining throughput of DXAI.

    python benchmarks/throughput.py [--size 32] [--batch 12] [--iterations 20] [--device cpu] [--json FILE]

Training: the iteration as built against the straightforward order of the published code (generator run once for the
critic and once for itself, real images judged twice, encoder run for every style, one image copy per branch, critic
and classifier gradients not switched off), same architecture, weights, batch and R1 interval, taking turns in one
process. ``order`` has the layers as built, ``published`` also up-samples and pools around its convolutions instead of
inside them and keeps the critic in the default memory layout. Explaining: images per second of ``explain`` and the
memory before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.explanation import alternative_class
from cfe_lightning.losses import adversarial_loss, kl_between_logits, r1_penalty
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.dxai_blending import Blend, blend, distance
from cfe_lightning.networks.classifiers import SimpleCnn
from cfe_lightning.networks.discriminators import CriticBlock
from cfe_lightning.networks.multi_branch import ResidualBlock, StyledResidualBlock


class Bench(Dxai):
    """Runs training steps without a Trainer."""

    iteration = 0

    def prepare(self) -> None:
        optimizers = self.configure_optimizers()
        self.optimizers = lambda: optimizers  # type: ignore[method-assign, assignment]
        self.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
        self.log_dict = lambda *_, **__: None  # type: ignore[method-assign]

    @property
    def global_step(self) -> int:
        return 2 * self.iteration


class PlainResidualBlock(ResidualBlock):
    """Convolves at full resolution, then pools."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        shortcut = self.shortcut(x)
        if self.down:
            residual, shortcut = F.avg_pool2d(residual, 2), F.avg_pool2d(shortcut, 2)
        return (self.conv2(F.leaky_relu(self.norm2(residual), 0.2)) + shortcut) * math.sqrt(0.5)


class PlainStyledResidualBlock(StyledResidualBlock):
    """Up-samples, then convolves at full resolution."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        residual, shortcut = F.leaky_relu(self.norm1(x, style), 0.2), x
        if self.up:
            residual = F.interpolate(residual, scale_factor=2.0, mode="nearest")
            shortcut = F.interpolate(shortcut, scale_factor=2.0, mode="nearest")
        residual = self.conv2(F.leaky_relu(self.norm2(self.conv1(residual), style), 0.2))
        return (residual + self.shortcut(shortcut)) * math.sqrt(0.5)


class PlainCriticBlock(CriticBlock):
    """Convolves at full resolution, then pools."""

    def forward(self, x: Tensor) -> Tensor:
        residual = F.avg_pool2d(self.conv1(F.leaky_relu(x, 0.2)), 2)
        residual = self.conv2(F.leaky_relu(residual, 0.2))
        return (residual + F.avg_pool2d(self.shortcut(x), 2)) * math.sqrt(0.5)


PLAIN = {
    ResidualBlock: PlainResidualBlock,
    StyledResidualBlock: PlainStyledResidualBlock,
    CriticBlock: PlainCriticBlock,
}


class Order(Bench):
    """The same iteration in the order of the published code."""

    def _generate(self, image: Tensor, label: Tensor, alternative: Tensor, latent: Tensor, alpha: Tensor) -> Blend:
        styles = self.mapping(latent, torch.cat([label, alternative]))
        doubled = torch.cat([image, image])
        generator = self.generator
        copies = doubled.repeat(1, generator.num_branches, 1, 1)
        if generator.stem_affine is not None:
            copies = F.leaky_relu(generator.stem_affine(copies), 0.2)
        h = generator.stem(copies)
        maps = []
        for stage in generator.encoder:
            h = stage(h)
            maps.append(h)
        maps.append(generator.encoder_bottleneck(h))
        own, other = generator.decode(maps, styles, doubled).chunk(2)
        return blend(own, other, alpha)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        image, label = batch["image"], batch["label"]
        alternative = alternative_class(label, self.classifier.num_classes)
        latent = torch.randn(2 * len(image), self.mapping.latent_dim, device=image.device)
        alpha = torch.rand(len(image), self.generator.num_branches - 1, 1, 1, 1, device=image.device)
        targets = torch.cat([label, alternative])
        generator_optimizer, critic_optimizer = self.optimizers()

        doubled = torch.cat([image, image]).requires_grad_(True)
        judged = self.critic(doubled)
        real = self._judgement(judged, torch.cat([label, label]))
        with torch.no_grad():
            rendered = self._generate(image, label, alternative, latent, alpha)
            teacher = self.classifier(doubled)
        fake = self._judgement(self.critic(torch.cat([rendered.own, rendered.alternative])), targets)
        loss = adversarial_loss(real, real=True) + adversarial_loss(fake, real=False)
        loss = loss + kl_between_logits(teacher, judged)
        if self.iteration % self.r1_interval == 0:
            loss = loss + self.weights.r1_weight * self.r1_interval * r1_penalty(real, doubled)
        generator_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        rendered = self._generate(image, label, alternative, latent, alpha)
        both = torch.cat([rendered.own, rendered.alternative])
        adversarial = adversarial_loss(self._judgement(self.critic(both), targets), real=True)
        class_term = F.cross_entropy(self.classifier(both), targets)
        magnitude = rendered.distinct.abs()
        chosen = magnitude > magnitude.mean(dim=(2, 3), keepdim=True)
        masked = distance(rendered.own[chosen], image[chosen])
        weights = self.weights
        loss = (
            weights.adversarial_weight * adversarial
            + weights.class_weight * class_term
            + weights.reconstruction_weight * distance(torch.cat([image, image]), both)
            + weights.masked_weight * masked
        )
        generator_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()


class Published(Order):
    """The order and the layers of the published code."""

    def prepare(self) -> None:
        super().prepare()
        self.critic.to(memory_format=torch.contiguous_format)
        for module in self.modules():
            module.__class__ = PLAIN.get(type(module), type(module))


def classifier(size: int, device: str) -> FrozenClassifier:
    """An untrained classifier of two classes: its weights do not matter for time."""
    arguments = {"num_classes": 2, "channels": 3, "image_size": size}
    spec = ClassifierSpec(
        class_path="cfe_lightning.networks.classifiers.SimpleCnn",
        init_args=arguments,
        head=None,
        class_names=("a", "b"),
        image_size=size,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return FrozenClassifier(SimpleCnn(**arguments), spec).to(device)


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training(size: int, batch: int, iterations: int, device: str, architecture: dict) -> dict[str, float]:
    """Mean seconds per iteration of every kind, taking turns, and the speed-ups over the straightforward ones."""
    models = {}
    for name, kind in (("as built", Bench), ("order", Order), ("published", Published)):
        torch.manual_seed(0)
        model = kind(classifier(size, device), **architecture).to(device)
        model.prepare()
        if kind is not Bench:
            # The published code leaves the classifier's weights requiring gradients that nobody uses.
            model.classifier.network.requires_grad_(True)
        models[name] = model
    image = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    data = {"image": image, "label": torch.randint(2, (batch,), device=device)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for block in range(iterations + 2):
        for name, model in models.items():
            synchronise(device)
            start = time.perf_counter()
            model.training_step(data, 0)
            synchronise(device)
            model.iteration += 1
            if block >= 2:
                seconds[name].append(time.perf_counter() - start)
    result = {f"{name} [s]": statistics.mean(values) for name, values in seconds.items()}
    for name in ("order", "published"):
        result[f"speed-up over {name}"] = result[f"{name} [s]"] / result["as built [s]"]
        ratios = [b / a for a, b in zip(seconds["as built"], seconds[name], strict=True)]
        result[f"median over {name}"] = statistics.median(ratios)
    return result


def explaining(size: int, batch: int, count: int, device: str, architecture: dict) -> dict[str, float]:
    """Images per second of ``explain`` without reading and writing files, and peak memory early and late."""
    model = Dxai(classifier(size, device), **architecture).to(device).eval()
    image = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    for _ in range(2):
        model.explain(image)
    early = peak_mib(device)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(count // batch):
        model.explain(image)
    synchronise(device)
    rate = count // batch * batch / (time.perf_counter() - start)
    return {"images/s": rate, "peak after warm-up [MiB]": early, "peak at the end [MiB]": peak_mib(device)}


SMALL = {
    "num_branches": 3,
    "branch_width": 8,
    "max_branch_width": 24,
    "min_resolution": 8,
    "blocks_per_stage": 1,
    "style_dim": 16,
    "latent_dim": 8,
    "mapping_width": 64,
    "mapping_shared": 2,
    "mapping_unshared": 1,
    "critic_width": 24,
    "critic_max_width": 64,
}
#: The published generator; at 32 and 64 px a critic of its published width would be all that is measured.
PUBLISHED = {"num_branches": 5, "branch_width": 7, "stem_norm": "instance", "head_norm": "instance", "critic_width": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    for label, architecture in (("small", SMALL), ("published", PUBLISHED)):
        for interval in (1, 4):
            arguments = (options.size, options.batch, options.iterations, options.device)
            rows[f"{label}, R1 every {interval}"] = training(*arguments, {**architecture, "r1_interval": interval})
    print("| architecture | as built | order | published | speed-up over order | over published |")
    print("| --- " * 6 + "|")
    for label, row in rows.items():
        times = " | ".join(f"{row[f'{name} [s]']:.3f} s" for name in ("as built", "order", "published"))
        gains = (
            f"{row[f'speed-up over {name}']:.2f} (median {row[f'median over {name}']:.2f})"
            for name in ("order", "published")
        )
        print(f"| {label} | {times} | " + " | ".join(gains) + " |")
    print(f"\npeak memory {peak_mib(options.device):.0f} MiB\n")
    rows["explain"] = explaining(64, 32, 1000, options.device, SMALL)
    print("explain at 64 px: " + ", ".join(f"{name} {value:.0f}" for name, value in rows["explain"].items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
