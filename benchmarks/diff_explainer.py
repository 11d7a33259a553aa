"""The figures of DiffExplainer on built-in shapes or a folder of images: the tables of docs/measured/diff_explainer.md.

    python benchmarks/diff_explainer.py agent --checkpoint L1.ckpt MSE.ckpt KL.ckpt --cue lesion
    python benchmarks/diff_explainer.py edits --checkpoint best.ckpt --root FOLDER/malaria
    python benchmarks/diff_explainer.py reconstruction | samplers | undecided | draw ...

``agent``: agent against classifier. ``edits``: both directions of the search among images whose reconstruction is
decided as the image, beside random directions and an agent of shuffled features as far away. ``reconstruction``: PSNR,
SSIM and decisions against the diffusion steps. ``samplers``: speed against quality of whole explanations.
``undecided``: images that the classifier is not sure of, driven to a confident decision on either side. In a folder,
those that it is least sure of; it is sure of all built-in shapes, so their cue is faded until it is not.
Settings are compared with ``--split val``; the figures are those of ``--split test``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cfe_lightning import images, load_explainer
from cfe_lightning.data.base import ImageData
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.decisions import kl_between_logits
from cfe_lightning.methods.diff_explainer import DiffExplainer
from cfe_lightning.methods.diff_explainer.agent import agreement, fit_ridge, travelled, unit_step
from cfe_lightning.metrics.reconstruction import psnr, ssim

#: The confidence that undecided images are driven to.
SURE = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("agent", "edits", "reconstruction", "samplers", "undecided", "draw"))
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True)
    parser.add_argument("--cue", default="lesion", help="of the built-in shapes")
    parser.add_argument("--root", help="folder of images instead, split as for the training")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="compare settings on val")
    parser.add_argument("--count", type=int, default=256, help="images, from all over the split")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, help="picture of draw")
    options = parser.parse_args()
    for checkpoint in options.checkpoint:
        model = load_explainer(checkpoint)
        assert isinstance(model, DiffExplainer), "this benchmark is about DiffExplainer"
        print(f"{checkpoint}, {options.split} split", flush=True)
        with torch.no_grad():
            globals()[options.table](model, _data(model, options), options)


def _data(model: DiffExplainer, options: argparse.Namespace) -> ImageData:
    names = list(model.classifier.class_names)
    if options.root is None:
        return SyntheticShapes(cue=options.cue, image_size=model.image_size, channels=model.channels)
    return ImageFolder(root=options.root, image_size=model.image_size, channels=model.channels, class_names=names)


def _batches(data: ImageData, options: argparse.Namespace) -> Iterator[Tensor]:
    """The first images of the split, whose classes take turns."""
    dataset = data.dataset(options.split)
    indices = iter(range(min(options.count, len(dataset))))
    while chosen := list(islice(indices, options.batch_size)):
        yield torch.stack([dataset[index]["image"] for index in chosen])


def _print(values: dict[str, float | Tensor], prefix: str = "") -> None:
    print(prefix + ", ".join(f"{name} {float(value):.4g}" for name, value in values.items()), flush=True)


def agent(model: DiffExplainer, data: ImageData, options: argparse.Namespace) -> None:
    """Agent against classifier, and how much of the features it explains."""
    wanted, said = [], []
    for image in _batches(data, options):
        wanted.append(model.classifier(image).double())
        said.append(model.agent_logits(model.encode(image).mean(dim=1)))
    values = agreement(torch.cat(said), torch.cat(wanted))
    _print(values | {"n": torch.tensor(sum(map(len, said)))}, f"{model.alignment}: ")


def edits(model: DiffExplainer, data: ImageData, options: argparse.Namespace) -> None:
    """Flip rate, monotony and size of the edits in each direction; and the controls, equally far away."""
    shuffled = _shuffled_agent(model, data)
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, list[Tensor]] = {}
    seconds = 0.0
    for image in _batches(data, options):
        begin = time.perf_counter()
        explanation = model.explain(image)
        seconds += time.perf_counter() - begin
        source, target = explanation.logits.argmax(dim=1), explanation.target
        assert explanation.steps is not None
        said = _confidences(model, explanation.steps, target)
        reconstruction, scores = explanation.steps[:, 0], explanation.scores
        kept = scores["reconstruction_kept"].bool()
        measured = {
            "source": source,
            "target": target,
            "kept": kept,
            "faithful": scores["faithful"],
            "flipped": explanation.counterfactual_logits.argmax(dim=1) == target,
            "mono": (said.diff(dim=1) >= -1e-6).float().mean(dim=1),
            "regress": (said.cummax(dim=1).values - said).amax(dim=1),
            "deviations": scores["standard_deviations"],
            "gap": scores["agent_gap"],
            "psnr": psnr(image, reconstruction),
            "ssim": ssim(image, reconstruction),
            "change": (explanation.counterfactual - reconstruction).abs().mean(dim=(1, 2, 3)) / 2,
            "visible": ((explanation.counterfactual - reconstruction).abs().mean(dim=1) / 2 > 0.02)
            .float()
            .mean(dim=(1, 2)),
        }
        # Controls: as many standard deviations of the data, in another direction, to either side.
        located = model.locate(image)
        far = scores["standard_deviations"].double()
        chance = torch.randn(located.code.shape[0], located.code.shape[2], generator=generator).double()
        wrong = unit_step(shuffled[target] - shuffled[source], model.step_matrix)
        for name, step in {"random": chance, "shuffled": wrong}.items():
            step = step / travelled(step, model.code_covariance)[:, None] * far[:, None]
            picture = model.render(located, step[:, None])[:, 0]
            measured[f"flipped, {name}"] = model.classifier(picture).argmax(dim=1) == target
        for name, value in measured.items():
            columns.setdefault(name, []).append(value.float())
    table = {name: torch.cat(values) for name, values in columns.items()}
    total = len(table["kept"])
    _print(
        {"n": total, "reconstruction kept": table["kept"].mean(), "faithful": table["faithful"].mean()}
        | {name: table[name].mean() for name in ("psnr", "ssim")}
        | {"s/image": seconds / total}
    )
    names = model.classifier.class_names
    kept = table["kept"].bool()
    pairs = sorted({(int(s), int(t)) for s, t in zip(table["source"], table["target"], strict=True)})
    shown = [name for name in table if name.startswith("flipped")] + ["mono", "regress", "deviations", "gap"]
    for s, t in [*pairs, (-1, -1)]:
        rows = kept if s < 0 else kept & (table["source"] == s) & (table["target"] == t)
        values = {name: table[name][rows].mean() for name in [*shown, "change", "visible"]}
        title = "all" if s < 0 else f"{names[s]} -> {names[t]}"
        _print({"n": int(rows.sum())} | values, f"  {title}: ")


def _confidences(model: DiffExplainer, steps: Tensor, target: Tensor) -> Tensor:
    """The classifier's probability of the targets [B] at steps [B, T, C, H, W], [B, T]."""
    rows = torch.arange(len(target))
    return torch.stack([model.classifier(step).softmax(dim=1)[rows, target] for step in steps.unbind(dim=1)], dim=1)


def _shuffled_agent(model: DiffExplainer, data: ImageData, count: int = 2048) -> Tensor:
    """Codes to logits [K, D] of an agent that learnt other images' features."""
    dataset = data.dataset("train")
    codes, features = [], []
    for start in range(0, min(count, len(dataset)), 64):
        chosen = range(start, min(start + 64, len(dataset)))
        image = torch.stack([dataset[index]["image"] for index in chosen])
        codes.append(model.encode(image).mean(dim=1))
        features.append(model.classifier.features(image) if model.reads_features else model.classifier(image))
    code = (torch.cat(codes).double() - model.code_mean) / model.code_spread
    order = torch.randperm(len(code), generator=torch.Generator().manual_seed(0))
    weight, _ = fit_ridge(code, torch.cat(features)[order], model.ridge_penalty)
    return model.head_weight @ (weight / model.code_spread)


def reconstruction(model: DiffExplainer, data: ImageData, options: argparse.Namespace) -> None:
    """PSNR, SSIM and decisions against steps and refinements; ``code`` starts from a random noise map."""
    image = torch.cat(list(_batches(data, options)))
    logits = model.classifier(image)
    code = model.autoencoder.encode(image)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for num_steps, refinements in [(10, 5), (20, 0), (20, 1), (20, 2), (20, 5), (50, 0), (50, 2), (100, 0), (250, 0)]:
        begin = time.perf_counter()
        noise_map, residual = model.autoencoder.invert(image, code, num_steps, refinements)
        inverting = time.perf_counter() - begin
        picture = model.autoencoder.decode(noise_map, code, num_steps)
        said = model.classifier(picture)
        values = {
            "PSNR": psnr(image, picture).mean(),
            "PSNR of saved pixels": psnr(images.saved(image), images.saved(picture)).mean(),
            "SSIM": ssim(image, picture).mean(),
            "decided alike": (said.argmax(dim=1) == logits.argmax(dim=1)).float().mean(),
            "KL": kl_between_logits(logits, said),
            "residual": residual.mean(),
            "inversions/s": len(image) / inverting,
        }
        _print(values, f"  {num_steps} steps, {refinements} refinements: ")
    _print({"PSNR": psnr(image, model.autoencoder.decode(noise, code, 20)).mean(), "n": len(image)}, "  code alone: ")


def samplers(model: DiffExplainer, data: ImageData, options: argparse.Namespace) -> None:
    """Whole explanations per second, reconstruction and flips against sampler and steps."""
    image = torch.cat(list(_batches(data, options)))
    model.explain(image[:2])
    own = model.refinements
    for sampler in ("ddim", "dpm"):
        for num_steps in (250, 100, 50, 20, 10):
            model.sampler = sampler
            model.diffusion_steps = model.decoding_steps = num_steps
            # Fine grids are inverted as published, coarse ones refined.
            model.refinements = own if num_steps <= 50 else 0
            begin = time.perf_counter()
            explanation = model.explain(image)
            seconds = time.perf_counter() - begin
            assert explanation.steps is not None
            first = explanation.steps[:, 0]
            kept = explanation.scores["reconstruction_kept"].bool()
            flipped = explanation.counterfactual_logits.argmax(dim=1) == explanation.target
            values = {
                "refinements": model.refinements,
                "images/s": len(image) / seconds,
                "PSNR": psnr(image, first).mean(),
                "PSNR of saved pixels": psnr(images.saved(image), images.saved(first)).mean(),
                "kept": kept.float().mean(),
                "flipped": flipped[kept].float().mean(),
                "deviations": explanation.scores["standard_deviations"].mean(),
                "n": len(image),
            }
            _print(values, f"  {sampler} {num_steps}: ")


def undecided(model: DiffExplainer, data: ImageData, options: argparse.Namespace) -> None:
    """The 32 images that the classifier is least sure of, driven to be ``SURE`` of either of their first classes."""
    image = torch.cat(list(_batches(data, options)))
    if isinstance(data, SyntheticShapes):
        image = _faded(model, data, image[:32], options)
    first, second = model.classifier(image).softmax(dim=1).topk(2, dim=1)[0].unbind(dim=1)
    image = image[(first - second).argsort()[:32]]
    sides = model.classifier(image).topk(2, dim=1).indices
    model.confidence = SURE
    reached = []
    for side in (0, 1):
        target = sides[:, side]
        explanation = model.explain(image, target)
        rows = torch.arange(len(target))
        after = explanation.counterfactual_logits.softmax(dim=1)[rows, target]
        reached.append(after >= SURE - 1e-6)
        values = {
            "before": explanation.logits.softmax(dim=1)[rows, target].mean(),
            "after": after.mean(),
            "reached": reached[-1].float().mean(),
            "deviations": explanation.scores["standard_deviations"].mean(),
            "kept": explanation.scores["reconstruction_kept"].mean(),
        }
        _print(values | {"n": len(target)}, f"  to the {('likelier', 'less likely')[side]} class: ")
    _print({"both sides": (reached[0] & reached[1]).float().mean()}, "  ")


def _faded(model: DiffExplainer, data: SyntheticShapes, image: Tensor, options: argparse.Namespace) -> Tensor:
    """Images whose cue is weakened, against the same scene of the other class, until the classifier cannot decide."""
    shapes = data.dataset(options.split)
    other = torch.stack([shapes[index]["counterfactual"] for index in range(len(image))])
    predicted = model.classifier(image).argmax(dim=1, keepdim=True)
    low, high = torch.zeros(len(image)), torch.ones(len(image))
    for _ in range(20):
        share = ((low + high) / 2)[:, None, None, None]
        mixed = (1 - share) * image + share * other
        kept = model.classifier(mixed).softmax(dim=1).gather(1, predicted)[:, 0] > 0.5
        low, high = torch.where(kept, share[:, 0, 0, 0], low), torch.where(kept, high, share[:, 0, 0, 0])
    return mixed


def draw(model: DiffExplainer, data: ImageData, options: argparse.Namespace) -> None:
    """Image, reconstruction, counterfactual, difference in red and blue, opposite, the exact answer if there is one."""
    options.count = options.batch_size = min(options.count, 12)
    image = next(_batches(data, options))
    explanation = model.explain(image)
    parts = explanation.parts
    assert explanation.counterfactual is not None
    columns = [image, parts["reconstruction"], explanation.counterfactual, images.signed_difference(parts["redrawn"])]
    columns.append(parts["opposite"])
    if isinstance(data, SyntheticShapes):
        shapes = data.dataset(options.split)
        truth = [shapes.render(index, int(explanation.target[index])) for index in range(len(image))]
        columns.append(torch.stack(truth))
    enlarge = max(1, 96 // image.shape[3])
    columns = [column.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3) for column in columns]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    images.to_pil(images.grid(columns)).save(options.output)


if __name__ == "__main__":
    main()
