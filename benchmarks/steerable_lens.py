"""Benchmarks of Steerable Lens: transforms and rules on a toy, figures on real classifiers, throughput.

    python benchmarks/steerable_lens.py --toy
    python benchmarks/steerable_lens.py --classifier checkpoints/shapes.pt --cue lesion
    python benchmarks/steerable_lens.py --classifier checkpoints/mnist.pt --root FOLDER/mnist --grid out.png
    python benchmarks/steerable_lens.py --classifier checkpoints/shapes.pt --picture out.png
    python benchmarks/steerable_lens.py --throughput

``--toy``: four shapes, a standard network, one trained against L2 attacks, and a judge that gives no gradients. Figures
at an L2 norm of 2 compare methods at equal image change, on [0, 1]. ``--classifier``: correctly classified test images,
explained towards the runner-up. Intervals are 95 % intervals: Wilson for shares, bootstrap for medians and differences.

Shapes: B images, C channels, H, W pixels, S side of square images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier, load_classifier
from cfe_lightning.classifier.networks import PooledCnn
from cfe_lightning.data.base import ImageData
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.images import draw_motion, grid, signed_difference, to_pil, to_unit
from cfe_lightning.methods.steerable_lens import SteerableLens
from cfe_lightning.metrics.robustness import survives
from cfe_lightning.metrics.statistics import wilson

SHAPES = ("disc", "square", "triangle", "cross")
#: Options of every row of the toy table.
TOY: dict[str, dict[str, Any]] = {
    "pixel": {"transform": "pixel"},
    "DFT phase, cartesian": {"transform": "dft"},
    "CSP phase, cartesian, no cap": {"cap": None},
    "CSP phase, cartesian": {},
    "CSP phase, unit": {"phase_rule": "unit"},
    "CSP phase, coordinate": {"phase_rule": "coordinate"},
    "CSP joint, linear amplitude (eps 0)": {"beta": 1.0, "eps": 0.0},
    "CSP joint, log amplitude": {"beta": 1.0, "amplitude_mode": "log"},
    "CSP phase, two-sided synthesis": {"synthesis": "two_sided"},
    "CSP phase, live, 12 steps of L2 0.25": {"live_steps": 12, "alpha_unit": "l2", "largest_alpha": 3.0},
}
#: Options of every row of the tables on real classifiers.
REAL: dict[str, dict[str, Any]] = {
    "pixel": {"transform": "pixel"},
    "DFT phase": {"transform": "dft"},
    "CSP phase": {},
    "CSP joint": {"beta": 1.0},
    "CSP joint, residuals": {"beta": 1.0, "residual_gain": 1.0},
    "CSP phase, live 12": {"live_steps": 12},
}


# Motion.


def warp_energy(image: Tensor, changed: Tensor, *, points: int = 8, gain: bool = False) -> Tensor:
    """Measures the share of a change's energy that the best small warp explains, [B] in [0, 1]; NaN without change.

    The warp is linearised, change = -gradient of the image . displacement, and the displacement is interpolated
    bilinearly between ``points`` x ``points`` values. Even white noise is explained in part, by chance: the share is
    about the number of unknowns over that of values.

    Args:
        image: Images before the change, [B, C, H, W] in [-1, 1].
        changed: Images after the change, [B, C, H, W].
        points: Displacements a side.
        gain: Lets the image also become brighter or darker, smoothly over the same grid.
    """
    basis = torch.eye(points**2, dtype=torch.float64, device=image.device).view(1, -1, points, points)
    basis = F.interpolate(basis, size=image.shape[-2:], mode="bilinear", align_corners=True)[0]
    # Every unknown is a picture of its own: chunks of images that fit into some hundred megabytes.
    at_once = max(1, 2**24 // (3 * points**2 * image[0].numel()))
    chunks = zip(image.double().split(at_once), changed.double().split(at_once), strict=True)
    return torch.cat([_explained_share(before, after - before, basis, gain) for before, after in chunks]).float()


def _explained_share(before: Tensor, change: Tensor, basis: Tensor, gain: bool) -> Tensor:
    # Change of the image by each unknown, [B, U, C * H * W].
    moved = [-torch.gradient(before, dim=dim)[0] for dim in (2, 3)]
    maps = torch.stack([*moved, to_unit(before)] if gain else moved, dim=1)
    design = (maps[:, :, None] * basis[None, None, :, None]).flatten(3).flatten(1, 2)

    # Least squares. A flat image has no warp, so the equations may be singular.
    flat = change.flatten(1)[:, :, None]
    right = design @ flat
    solution = torch.linalg.pinv(design @ design.transpose(1, 2), rtol=1e-10, hermitian=True) @ right
    energy = flat.square().sum(dim=(1, 2))
    return torch.where(energy > 0, ((right * solution).sum(dim=(1, 2)) / energy).clamp(0, 1), torch.nan)


# The toy.


def draw_shapes(count: int, generator: torch.Generator, size: int = 32) -> tuple[Tensor, Tensor]:
    """Draws grey images [B, 1, S, S] in [-1, 1] of four shapes, turned, moved, scaled and noisy, and labels [B]."""
    # Places.
    label = torch.randint(4, (count,), generator=generator)

    def draw(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1)

    axis = torch.arange(size) - (size - 1) / 2
    y, x = axis.view(1, -1, 1) - draw(-4, 4), axis.view(1, 1, -1) - draw(-4, 4)
    turn, radius = draw(0, 2 * torch.pi), draw(6.5, 10.5)
    u, v = turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x

    # Signed distances to the outlines.
    bar = torch.maximum(u.abs() - radius, v.abs() - 0.35 * radius)
    other = torch.maximum(v.abs() - radius, u.abs() - 0.35 * radius)
    sides = [torch.cos(torch.tensor(a)) * u + torch.sin(torch.tensor(a)) * v for a in (0.0, 2.0944, 4.18879)]
    distances = torch.stack(
        [
            (u.square() + v.square()).sqrt() - 0.9 * radius,
            torch.maximum(u.abs(), v.abs()) - 0.8 * radius,
            torch.stack(sides).amax(dim=0) - 0.6 * radius,
            torch.minimum(bar, other),
        ]
    )

    # Contrast and noise.
    inside = torch.sigmoid(-2 * distances[label, torch.arange(count)])
    unit = draw(0.1, 0.3) + draw(0.3, 0.6) * inside
    unit = unit + 0.06 * torch.randn(unit.shape, generator=generator)
    return (unit.clamp(0, 1) * 2 - 1)[:, None], label


class Judge(nn.Sequential):
    """The judge, of another architecture: large filters, average pooling, no batch norm."""

    def __init__(self) -> None:
        # fmt: off
        super().__init__(
            nn.Conv2d(1, 16, 5, padding=2), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 4),
        )
        # fmt: on


def attacked(network: nn.Module, image: Tensor, label: Tensor, norm: float, steps: int) -> Tensor:
    """Attacks images by projected gradient ascent within an L2 ball on [0, 1]; they stay in [-1, 1]."""
    change = torch.zeros_like(image)
    for _ in range(steps):
        change.requires_grad_(True)
        loss = F.cross_entropy(network(image + change), label, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, change)
        step = gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        change = change.detach() + 2 * norm * 2.5 / steps * step
        length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        change = change * (2 * norm / length.clamp_min(1e-12)).clamp(max=1)
        change = (image + change).clamp(-1, 1) - image
    return change.detach() + image


def train(network: nn.Module, iterations: int, seed: int, norm: float | None = None) -> None:
    """Trains with Adam and a falling step size; with ``norm``, against attacks that grow to it in the first half."""
    # Optimiser.
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    # Iterations.
    for iteration in range(iterations):
        image, label = draw_shapes(64, generator)
        if norm is not None:
            network.eval()
            image = attacked(network, image, label, norm * min(1.0, 2 * (iteration + 1) / iterations), steps=4)
        network.train()
        loss = F.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    network.eval()


def toy_classifier(network: nn.Module) -> FrozenClassifier:
    spec = ClassifierSpec(
        class_path="none", init_args={}, head=None, class_names=SHAPES, image_size=32, mean=(0.5,), std=(0.5,)
    )
    return FrozenClassifier(network, spec)


def toy(seeds: list[int], count: int, iterations: int, kinds: list[str], standard_iterations: int) -> None:
    """Measures all rows of ``TOY`` and prints their tables, all seeds together."""
    columns: dict[str, dict[str, dict[str, list[Tensor]]]] = {kind: {} for kind in kinds}
    for seed in seeds:
        # Networks.
        torch.manual_seed(seed)
        drivers = {kind: PooledCnn(4, 1, 8) for kind in kinds}
        other = Judge()
        if "standard" in drivers:
            train(drivers["standard"], standard_iterations, 100 * seed + 1)
        if "robust" in drivers:
            train(drivers["robust"], iterations, 100 * seed + 2, norm=0.8)
        train(other, iterations, 100 * seed + 3)
        judge = toy_classifier(other)

        # Figures.
        image, label = draw_shapes(2 * count, torch.Generator().manual_seed(100 * seed + 4))
        for kind, network in drivers.items():
            classifier = toy_classifier(network)
            with torch.no_grad():
                right = classifier(image).argmax(dim=1) == label
                judged = judge(image).argmax(dim=1) == label
            held = classifier(attacked(network, image, label, 0.8, steps=20)).argmax(dim=1) == label
            print(
                f"seed {seed} {kind}: accuracy {right.float().mean():.3f}, judge {judged.float().mean():.3f}, "
                f"under attack of L2 0.8 {held.float().mean():.3f}",
                flush=True,
            )
            chosen = torch.nonzero(right & judged).squeeze(1)[:count]
            source, target = image[chosen], (label[chosen] + 1) % 4
            for name, options in TOY.items():
                row = columns[kind].setdefault(name, {})
                for key, value in toy_figures(classifier, judge, source, target, options).items():
                    row.setdefault(key, []).append(value)
    for kind, rows in columns.items():
        print_toy(kind, {name: {key: torch.cat(values) for key, values in row.items()} for name, row in rows.items()})


def print_toy(kind: str, rows: dict[str, dict[str, Tensor]]) -> None:
    """Prints the table of one kind of network, and the paired differences that show whether an order is real."""
    # Table.
    print(f"\n{kind}, n = {len(rows['pixel']['flipped'])}\n")
    print("| method | flips | L2 at the flip | p_t at L2 2 | judge at L2 2 | L2 2 attained | E warp | + gain |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        flips = row["l2"][row["flipped"]]
        cells = [share(row["flipped"]), f"{flips.median():.2f}", median(row["p"]), share(row["judged"])]
        cells += [f"{row['attained'].float().mean():.2f}", *(f"{row[key].nanmean():.2f}" for key in ("warp", "gain"))]
        print(f"| {name} | {' | '.join(cells)} |")

    # Differences.
    print("\npaired differences (first minus second, mean and 95 %)")
    reference = "CSP phase, cartesian"
    first = rows[reference]
    for other in ("pixel", "DFT phase, cartesian", "CSP phase, cartesian, no cap", "CSP joint, log amplitude"):
        cells = [f"{key} {difference(first[key], rows[other][key])}" for key in ("flipped", "p", "judged", "warp")]
        print(f"{reference} - {other}: {'; '.join(cells)}")


def toy_figures(
    classifier: FrozenClassifier, judge: FrozenClassifier, image: Tensor, target: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Measures the figures of one row of the toy table for every image, [B] each."""
    # Decision, and an L2 norm of 2.
    found = SteerableLens(classifier, **options).explain(image, target)
    budget = SteerableLens(classifier, budget=2.0, **(options | {"bisections": 12})).explain(image, target)

    # The direction itself: a change of L2 1 to first order.
    lens = SteerableLens(classifier, **(options | {"alpha_unit": "l2", "live_steps": 1, "largest_alpha": 48.0}))
    course, _ = lens.course(image, target)
    small = lens.extrapolator.frames(course, torch.ones(len(image), 1)).image[:, 0]

    # Judge.
    assert found.flipped is not None
    assert budget.counterfactual is not None
    assert budget.counterfactual_logits is not None
    with torch.no_grad():
        judged = judge(budget.counterfactual).argmax(dim=1) == target
    p = budget.counterfactual_logits.softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    return {
        "flipped": found.flipped,
        "l2": found.scores["l2_norm"],
        "p": p,
        "judged": judged,
        "attained": budget.scores["reached"].bool(),
        "warp": warp_energy(image, small),
        "gain": warp_energy(image, small, gain=True),
    }


# Real classifiers.


def real(classifier: FrozenClassifier, data: ImageData, split: str, count: int, path: Path | None) -> None:
    """Prints the figures of every row of ``REAL``, and draws examples into ``path``."""
    # Correctly classified images.
    data.prepare_data()
    data.setup("test")
    dataset = data.dataset(split)  # type: ignore[arg-type]
    picks = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: 2 * count].tolist()  # type: ignore[arg-type]
    samples = [dataset[index] for index in picks]
    image = torch.stack([sample["image"] for sample in samples])
    label = torch.tensor([sample["label"] for sample in samples])
    with torch.no_grad():
        logits = torch.cat([classifier(part) for part in image.split(64)])
    right = logits.argmax(dim=1) == label
    print(f"accuracy {right.float().mean():.3f} on {len(right)} images; n = {min(count, int(right.sum()))} explained\n")
    image, source = image[right][:count], label[right][:count]

    # Table.
    heads = ("flip", "saved", "robust", "robust, magnified", "L2", "alpha", "E warp", "+ gain", "fine", "falls", "s")
    print(f"| method | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    pictures = [image[:12]]
    for name, options in REAL.items():
        lens = SteerableLens(classifier, **options)
        begin = time.perf_counter()
        answers = [lens.explain(part) for part in image.split(32)]
        seconds = (time.perf_counter() - begin) / len(image)
        changed = torch.cat([one.counterfactual for one in answers if one.counterfactual is not None])
        target = torch.cat([one.target for one in answers])
        flipped = torch.cat([one.flipped for one in answers if one.flipped is not None])
        scores = {key: torch.cat([one.scores[key] for one in answers]) for key in answers[0].scores}
        magnified = torch.cat([one.parts["magnified"] for one in answers])
        robust, weakest = robust_flip(classifier, image, changed, source, target)
        _, magnified_weakest = robust_flip(classifier, image, magnified, source, target)
        where = flipped if bool(flipped.any()) else ~flipped
        cells = [
            share(flipped),
            f"{robust['quant8']:.2f}",
            weakest,
            magnified_weakest,
            f"{scores['l2_norm'][where].median():.2f}",
            f"{scores['alpha'][where].median():.3f}",
            *(f"{warp_energy(image[where], changed[where], gain=gain).nanmean():.2f}" for gain in (False, True)),
            f"{scores['fine'][where].mean():.2f}",
            f"{scores['nonmonotone'].mean():.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.3f} |", flush=True)
        pictures += [changed[:12], signed_difference((changed - image)[:12] / 2), magnified[:12]]

    # Examples.
    if path is not None:
        enlarge = max(1, 96 // image.shape[3])
        pictures = [one.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3) for one in pictures]
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(grid(pictures)).save(path)


def robust_flip(
    classifier: FrozenClassifier, image: Tensor, changed: Tensor, source: Tensor, target: Tensor
) -> tuple[dict[str, float], str]:
    """Returns the share of flips that survive each transformation, and the smallest as text with its denominator."""
    parts = zip(image.split(64), changed.split(64), source.split(64), target.split(64), strict=True)
    outcomes = [survives(classifier, *part) for part in parts]
    counts = {key: [int(sum(o[key][i].sum() for o in outcomes)) for i in (0, 1)] for key in outcomes[0]}
    rates = {key: flipped / max(kept, 1) for key, (kept, flipped) in counts.items()}
    weakest = min(rates, key=lambda key: rates[key])
    return rates, f"{rates[weakest]:.2f} ({weakest}, {counts[weakest][0]})"


def draw(classifier: FrozenClassifier, cue: str, path: Path) -> None:
    """Draws the picture of the documentation: phases alone, with their motion, and amplitudes too, for both classes."""
    # Explanations.
    data = SyntheticShapes(cue=cue, image_size=classifier.spec.image_size)  # type: ignore[arg-type]
    dataset = data.dataset("test")
    image = torch.stack([dataset[index]["image"] for index in (1, 3, 5, 0, 2, 4)])
    phase, joint = (SteerableLens(classifier, beta=beta).explain(image) for beta in (0.0, 1.0))

    # Columns.
    assert phase.motion is not None
    columns = {"image": image}
    for name, found in (("phase", phase), ("joint", joint)):
        assert found.counterfactual is not None
        columns[f"{name}: nearest"] = found.counterfactual
        columns[f"{name}: change"] = signed_difference((found.counterfactual - image) / 2)
        columns[f"{name}: magnified"] = found.parts["magnified"]
    columns["phase: motion"] = draw_motion(image, phase.motion)
    order = ["image", *(name for name in columns if name.startswith("phase")), *(n for n in columns if "joint" in n)]

    # Picture with headings.
    side = 160
    factor = side // image.shape[3]
    enlarged = [
        c if c.shape[3] == side else c.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        for c in (columns[name] for name in order)
    ]
    block = to_pil(grid(enlarged))
    picture = Image.new("RGB", (block.width, block.height + 24), "white")
    picture.paste(block, (0, 24))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    for index, name in enumerate(order):
        pen.text((4 + index * (side + 4), 5), name, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


# Throughput.


def throughput(batch_size: int, repeats: int) -> None:
    """Times 224-pixel RGB images with a random ResNet-18, 12 strengths and 7 bisections per image."""
    # Classifier and images.
    torch.manual_seed(0)
    spec = ClassifierSpec(
        class_path="torchvision.models.resnet18",
        init_args={"num_classes": 10},
        head="fc",
        class_names=tuple("abcdefghij"),
        image_size=224,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    classifier = FrozenClassifier(resnet18(num_classes=10), spec)
    image = F.interpolate(torch.randn(batch_size, 3, 28, 28), size=224, mode="bicubic").clamp(-3, 3) / 3
    # Every image meets this L2 norm between two strengths, so all are bisected.
    lens = SteerableLens(classifier, budget=30.0)

    # Time inside the classifier.
    counted = {"seconds": 0.0, "pictures": 0}
    plain, gradients = classifier.forward, torch.autograd.grad

    def timed_forward(pictures: Tensor) -> Tensor:
        begin = time.perf_counter()
        logits = plain(pictures)
        counted["seconds"] += time.perf_counter() - begin
        counted["pictures"] += len(pictures)
        return logits

    def timed_gradient(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        found = gradients(*arguments, **options)
        counted["seconds"] += time.perf_counter() - begin
        return found

    classifier.forward = timed_forward  # type: ignore[method-assign]
    torch.autograd.grad = timed_gradient  # type: ignore[assignment]

    # Repetitions, after one to warm up.
    lens.explain(image)
    for _ in range(repeats):
        counted.update(seconds=0.0, pictures=0)
        begin = time.perf_counter()
        explanation = lens.explain(image)
        seconds = time.perf_counter() - begin
        print(
            f"{batch_size / seconds:.2f} images/s, {counted['pictures'] / batch_size:.1f} pictures judged for each, "
            f"share outside the classifier {1 - counted['seconds'] / seconds:.3f}, "
            f"bisected {int(explanation.scores['reached'].sum())} of {batch_size}"
        )


# Numbers as text.


def share(hits: Tensor) -> str:
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{hits.float().mean():.2f} ({low:.2f} to {high:.2f})"


def resampled(values: Tensor, seed: int = 0) -> Tensor:
    index = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(seed))
    return values[index]


def median(values: Tensor) -> str:
    low, high = resampled(values.float()).median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{values.median():.2f} ({low:.2f} to {high:.2f})"


def difference(first: Tensor, second: Tensor) -> str:
    values = (first.float() - second.float()).nan_to_num()
    low, high = resampled(values).mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="compare transforms and rules on the toy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the toy")
    parser.add_argument("--iterations", type=int, default=1200, help="training iterations of the toy's networks")
    parser.add_argument("--standard-iterations", type=int, help="iterations of the standard network, if others")
    parser.add_argument("--drivers", nargs="+", choices=("standard", "robust"), default=["standard", "robust"])
    parser.add_argument("--images", type=int, default=400, help="explained images, for the toy per seed")
    parser.add_argument("--classifier", type=Path, help="file of a real classifier")
    parser.add_argument("--cue", choices=("lesion", "colour", "texture"), help="cue of the built-in shapes")
    parser.add_argument("--root", help="folder of images in place of the built-in shapes, split as in training")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="use val to compare settings")
    parser.add_argument("--grid", type=Path, help="also draw examples into this file")
    parser.add_argument("--picture", type=Path, help="only draw the documentation's picture from the built-in shapes")
    parser.add_argument("--throughput", action="store_true", help="measure images per second")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the throughput")
    options = parser.parse_args()

    # The toy.
    if options.toy:
        standard = options.standard_iterations or options.iterations
        toy(options.seeds, options.images, options.iterations, options.drivers, standard)

    # A real classifier.
    if options.classifier:
        classifier = load_classifier(str(options.classifier))
        if options.picture:
            draw(classifier, options.cue or "lesion", options.picture)
            return
        size, channels = classifier.spec.image_size, classifier.spec.channels
        if options.root:
            names = list(classifier.class_names)
            data: ImageData = ImageFolder(
                root=options.root, image_size=size, channels=channels, class_names=names, batch_size=64
            )
        else:
            data = SyntheticShapes(cue=options.cue or "lesion", image_size=size, batch_size=64, num_test=2000)
        real(classifier, data, options.split, options.images, options.grid)

    # Throughput.
    if options.throughput:
        throughput(options.batch_size, repeats=3)


if __name__ == "__main__":
    main()
