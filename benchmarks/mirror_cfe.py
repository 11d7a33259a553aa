"""Mirror-CFE on pairs of classes of an image folder: the figures of its paper's table.

    python benchmarks/mirror_cfe.py --checkpoint checkpoints/mirror_mnist/best.ckpt --root FOLDER/mnist --steps 50
    python benchmarks/mirror_cfe.py --geometry

Test images that the classifier has right, every pair of the checkpoint in both directions. L1 on [-1, 1]. ``D.Val`` is
the validity after a Gaussian blur (5 x 5, sigma 1); the classifier's accuracy on blurred originals stands beside it.
``--geometry`` times the closed-form swap against L-BFGS on 10,000 features instead.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import gaussian_blur

from cfe_lightning import load_explainer
from cfe_lightning.data.base import Split
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.images import grid, to_pil
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.mirror_cfe.geometry import closed_form_swap, lbfgs_swap, position, reflect, swap_matrix


def figures(model: MirrorCFE, data: ImageFolder, batch_size: int, split: Split) -> dict[str, float]:
    """All figures over the images of all pairs in one split."""
    classifier, images = model.classifier, data.dataset(split)
    sums: dict[str, list[torch.Tensor]] = {}
    seconds = 0.0
    for start in range(0, len(images), batch_size):
        samples = [images[index] for index in range(start, min(start + batch_size, len(images)))]
        image = torch.stack([sample["image"] for sample in samples])
        label = torch.tensor([sample["label"] for sample in samples])
        target = model.partner[label] if bool((model.partner >= 0).any()) else None
        kept = classifier(image).argmax(dim=1) == label
        if target is not None:
            kept = kept & (target >= 0)
            target = target[kept]
        if not bool(kept.any()):
            continue
        image, label = image[kept], label[kept]
        begin = time.perf_counter()
        explanation = model.explain(image, target)
        seconds += time.perf_counter() - begin
        target, steps = explanation.target, explanation.steps
        assert steps is not None
        assert explanation.counterfactual is not None
        assert explanation.intended is not None
        rows = torch.arange(len(image))
        said = torch.stack([classifier(step).softmax(dim=1)[rows, target] for step in steps.unbind(dim=1)], dim=1)
        found = explanation.scores["first_flip"] <= 1

        def valid(picture: torch.Tensor, target: torch.Tensor = target) -> torch.Tensor:
            return (classifier(picture).argmax(dim=1) == target).float()

        def distance(picture: torch.Tensor, image: torch.Tensor = image) -> torch.Tensor:
            return (picture - image).abs().mean(dim=(1, 2, 3))

        blurred = gaussian_blur(image, [5, 5], [1.0, 1.0])
        measured = {
            "Val k=1": valid(steps[:, -1]),
            "D.Val k=1": valid(gaussian_blur(steps[:, -1], [5, 5], [1.0, 1.0])),
            "D.Val 1st": valid(gaussian_blur(explanation.counterfactual, [5, 5], [1.0, 1.0]))[found],
            "blurred originals right": (classifier(blurred).argmax(dim=1) == label).float(),
            "no flip": (~found).float(),
            "k 1st": explanation.scores["first_flip"][found],
            "L1 x_0": distance(steps[:, 0]),
            "L1 1st": distance(explanation.counterfactual)[found],
            "L1 k=1": distance(steps[:, -1]),
            "gap": explanation.scores["confidence_gap"],
            "mono": (said.diff(dim=1) >= -1e-6).float().mean(dim=1),
        }
        for name, value in measured.items():
            sums.setdefault(name, []).append(value)
    result = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
    count = sum(len(value) for value in sums["no flip"])
    return result | {"n": count, "images/s": count / seconds}


def draw(model: MirrorCFE, data: ImageFolder, path: Path, rows: int = 10) -> None:
    """A grid of the first test images that the classifier has right, one after the other from all classes in pairs.

    Columns: image, reconstruction, boundary, first counterfactual, reflection, change from the reconstruction to it.
    """
    images = data.dataset("test")
    chosen: dict[int, list[torch.Tensor]] = {}
    for index in range(len(images)):
        sample = images[index]
        paired = bool((model.partner < 0).all()) or int(model.partner[sample["label"]]) >= 0
        if paired and int(model.classifier(sample["image"][None]).argmax()) == sample["label"]:
            chosen.setdefault(sample["label"], []).append(sample["image"])
    each = -(-rows // len(chosen))
    image = torch.stack([one for label in sorted(chosen) for one in chosen[label][:each]])
    partner = model.partner[model.classifier(image).argmax(dim=1)]
    explanation = model.explain(image, None if bool((partner < 0).any()) else partner)
    parts = explanation.parts
    assert explanation.counterfactual is not None
    change = 2 * (parts["reflection"] - parts["reconstruction"]).abs() - 1
    columns = [
        *(image, parts["reconstruction"], parts["boundary"], explanation.counterfactual, parts["reflection"]),
        change.clamp(max=1),
    ]
    enlarge = max(1, 128 // image.shape[3])
    columns = [column.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3) for column in columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(grid(columns)).save(path)


def geometry(count: int = 10_000, num_classes: int = 10, num_features: int = 64) -> None:
    """Closed form (form A) against L-BFGS from the plain reflection, in float64."""
    torch.manual_seed(0)
    features = torch.rand(count, num_features, dtype=torch.float64)
    weight, bias = torch.randn(num_classes, num_features).double(), torch.randn(num_classes).double()
    source = (features @ weight.T + bias).argmax(dim=1)
    target = (source + torch.randint(1, num_classes, (count,))) % num_classes
    matrix = swap_matrix(weight, "logits")
    reflect(features, weight, bias, source, target, swap="logits", matrix=matrix)
    begin = time.perf_counter()
    for _ in range(10):
        closed = reflect(features, weight, bias, source, target, swap="logits", matrix=matrix).features
    checked = (time.perf_counter() - begin) / 10
    logits = features @ weight.T + bias
    begin = time.perf_counter()
    for _ in range(10):
        closed_form_swap(features, logits, matrix, source, target)
    exact = (time.perf_counter() - begin) / 10
    begin = time.perf_counter()
    start = position(features, weight, bias, source, target)
    iterated = lbfgs_swap(features, lambda z: z @ weight.T + bias, source, target, start=start)
    slow = time.perf_counter() - begin
    print(f"closed form {exact:.4f} s, with status {checked:.4f} s, L-BFGS {slow:.3f} s")
    print(f"times faster: {slow / exact:.0f}, with status {slow / checked:.0f}")
    print(f"largest difference {float((closed - iterated).abs().max()):.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[])
    parser.add_argument("--root", help="folder of images, split as for the training")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="compare settings on val")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--grid", type=Path, help="also draw examples of the first checkpoint into this file")
    parser.add_argument("--geometry", action="store_true")
    options = parser.parse_args()
    if options.geometry:
        geometry()
    for checkpoint in options.checkpoint:
        model = load_explainer(checkpoint)
        assert isinstance(model, MirrorCFE), "this benchmark is about Mirror-CFE"
        model.num_steps = options.steps
        data = ImageFolder(
            root=options.root,
            image_size=model.image_size,
            channels=model.channels,
            class_names=list(model.classifier.class_names),
        )
        data.prepare_data()
        data.setup("test")
        if options.grid and checkpoint == options.checkpoint[0]:
            draw(model, data, options.grid)
        row = figures(model, data, options.batch_size, options.split)
        print(f"{checkpoint}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
