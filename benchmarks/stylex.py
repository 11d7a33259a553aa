"""StylEx: reconstruction, agreement, coverage of EigenFind and AttFind, and what the searches cost.

    python benchmarks/stylex.py --checkpoint checkpoints/stylex_synthetic/best.ckpt
    python benchmarks/stylex.py --checkpoint checkpoints/stylex_folder/best.ckpt --root FOLDER/smiles --search
    python benchmarks/stylex.py --timing 64 256

Without ``--root`` the built-in shapes. Directions come from the reference in the checkpoint (validation images),
coverage from images of the split, up to ``--images`` of each class; only those count whose reconstruction is decided as
the image. L1 on [-1, 1]. ``--search`` compares EigenFind and AttFind on the same images, and both with a plain loop
over images, directions and signs on a subset. ``--timing`` times untrained networks with the published channels.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders import untrained_classifier
from torch import Tensor
from torch.utils.data import DataLoader

from cfe_lightning import load_explainer
from cfe_lightning.data.base import ImageData
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.decisions import kl_between_logits
from cfe_lightning.images import grid, signed_difference, to_pil
from cfe_lightning.methods.stylex import StylEx
from cfe_lightning.methods.stylex.ranking import effects, rank_directions
from cfe_lightning.methods.stylex.reference import first_of_each_class
from cfe_lightning.methods.stylex.search import coordinate_shifts, coordinate_table

SETTINGS = (
    *(("pca_w", "sigma", degree) for degree in (0.0, 1.0, 2.0, 4.0)),
    *((space, "sigma", degree) for space in ("pca_s", "sefa_w") for degree in (2.0, 4.0)),
    ("sefa_w", "abs", 10.0),
)


def data_of(model: StylEx, root: str | None, split: str) -> ImageData:
    if root is None:
        data: ImageData = SyntheticShapes(image_size=model.image_size, batch_size=100, num_test=600)
    else:
        names = list(model.classifier.class_names)
        data = ImageFolder(
            root=root, image_size=model.image_size, channels=model.channels, class_names=names, batch_size=100
        )
    data.prepare_data()
    data.setup("test")
    return data


@torch.no_grad()
def encoded(model: StylEx, data: ImageData, split: str) -> dict[str, Tensor]:
    """All images of the split with their latents and logits."""
    parts: dict[str, list[Tensor]] = {"image": [], "label": []}
    for batch in DataLoader(data.dataset(split), batch_size=100):  # type: ignore[arg-type]
        for name in parts:
            parts[name].append(batch[name])
    seen = {name: torch.cat(values) for name, values in parts.items()}
    chunks = seen["image"].split(100)
    seen["latent"] = torch.cat([model.encoder(chunk) for chunk in chunks])
    seen["logits"] = torch.cat([model.classifier(chunk) for chunk in chunks])
    return seen


@torch.no_grad()
def reconstruction(model: StylEx, seen: dict[str, Tensor]) -> dict[str, float]:
    picture = model.reconstruct(seen["latent"], model.label(seen["logits"]))
    said = torch.cat([model.classifier(chunk) for chunk in picture.split(100)])
    same = said.argmax(dim=1) == seen["logits"].argmax(dim=1)
    return {
        "n": len(picture),
        "classifier accuracy": float((seen["logits"].argmax(dim=1) == seen["label"]).float().mean()),
        "L1": float((picture - seen["image"]).abs().mean()),
        "agreement": float(same.float().mean()),
        "KL": float(kl_between_logits(seen["logits"], said)),
    }


@torch.no_grad()
def coverage(model: StylEx, seen: dict[str, Tensor], k: int, per_class: int) -> None:
    """A table of directions and steps: explained share from class 0 and from class 1, and what the best one costs.

    The cost is the mean change of a pixel against the reconstruction, and of the critic's logit (less is less real).
    """
    chosen = first_of_each_class(seen["logits"].argmax(dim=1), per_class)
    latent, logits = seen["latent"][chosen], seen["logits"][chosen]
    reference = model.starting_points()
    print(f"{'space':8} {'step':>9} {'sigma':>7} {'0 to 1':>8} {'1 to 0':>8} {'first':>12} {'L1':>7} {'critic':>7}")
    for space, unit, degree in SETTINGS:
        model.search_space, model.degree_unit, model.degree = space, unit, degree
        directions = model.directions(reference[0], model.label(reference[1]))
        result = model.measure(directions, latent, logits)
        ranks = [result.ranking(source, 1 - source, k) for source in (0, 1)]
        first = " ".join(f"{int(r.direction[0])}{'+-'[int(r.sign[0]) < 0]}" if len(r.direction) else "-" for r in ranks)
        moved, realism = [], []
        for source, rank in enumerate(ranks):
            mine = result.images(source)[:100]
            if len(rank.direction) and len(mine):
                way = int(rank.sign[0]) * result.steps[rank.direction[0]] * result.vectors[rank.direction[0]]
                change = torch.stack([torch.zeros_like(way), way]).expand(len(mine), -1, -1)
                pictures = model.render(latent[mine], model.label(logits[mine]), change)
                moved.append(float((pictures[:, 1] - pictures[:, 0]).abs().mean()))
                label = model.label(logits[mine])
                start, end = (model.critic(picture, label) for picture in pictures.unbind(dim=1))
                realism.append(float((end - start).mean()))
        sigma = float((result.steps / result.spread.clamp_min(1e-9)).median())
        print(
            f"{space:8} {degree:5.1f} {unit[:3]} {sigma:7.1f} {ranks[0].covered:8.3f} {ranks[1].covered:8.3f} "
            f"{first:>12} {sum(moved) / max(1, len(moved)):7.3f} {sum(realism) / max(1, len(realism)):7.2f}"
        )


@torch.no_grad()
def attfind(model: StylEx, latent: Tensor, logits: Tensor, share: float) -> tuple[Tensor, float]:
    """The whole table of AttFind and its seconds; extremes come from the reference."""
    generator = model.generator
    reference = model.starting_points()
    low_high = generator.synthesis.flatten_styles(generator.styles(reference[0], model.label(reference[1])))
    begin = time.perf_counter()
    styles = generator.styles(latent, model.label(logits))
    flat = generator.synthesis.flatten_styles(styles)
    shifts = coordinate_shifts(flat, low_high.amin(dim=0), low_high.amax(dim=0), share)
    table = coordinate_table(generator.synthesis, model.classifier, styles, shifts)
    return table, time.perf_counter() - begin


@torch.no_grad()
def loops(
    model: StylEx, latent: Tensor, logits: Tensor, table: Tensor, shifts_share: float, images: int
) -> dict[str, Any]:
    """The plain way on a few images: one picture at a time, from the latent on."""
    generator, classifier, label = model.generator, model.classifier, model.label(logits)
    reference = model.starting_points()
    directions = model.directions(reference[0], model.label(reference[1]))
    result = model.measure(directions, latent[:images], logits[:images])
    begin, worst = time.perf_counter(), 0.0
    for image in range(images):
        for direction in range(len(directions.vectors)):
            for place, sign in enumerate((1, -1)):
                w = latent[image : image + 1] + sign * result.steps[direction] * directions.vectors[direction]
                said = classifier(generator(w, label[image : image + 1]).clamp(-1, 1))[0]
                worst = max(worst, float((said - result.table[image, direction, place]).abs().max()))
    eigen = time.perf_counter() - begin
    flat_reference = generator.synthesis.flatten_styles(generator.styles(reference[0], model.label(reference[1])))
    low, high = flat_reference.amin(dim=0), flat_reference.amax(dim=0)
    begin, worst_styles = time.perf_counter(), 0.0
    for image in range(images):
        styles = generator.styles(latent[image : image + 1], label[image : image + 1])
        flat = generator.synthesis.flatten_styles(styles)
        shifts = coordinate_shifts(flat, low, high, shifts_share)
        for coordinate in range(flat.shape[1]):
            for place in range(2):
                moved = flat.clone()
                moved[0, coordinate] += shifts[0, place, coordinate]
                picture = generator.synthesis(generator.synthesis.replace_styles(styles, moved))
                said = classifier(picture.clamp(-1, 1))[0]
                worst_styles = max(worst_styles, float((said - table[image, place, coordinate]).abs().max()))
    return {
        "EigenFind loop, s per image": eigen / images,
        "AttFind loop, s per image": (time.perf_counter() - begin) / images,
        "EigenFind, largest difference of logits": worst,
        "AttFind, largest difference of logits": worst_styles,
    }


def search(model: StylEx, seen: dict[str, Tensor], k: int, share: float, per_class: int, looped: int) -> None:
    """EigenFind and AttFind on the same images."""
    chosen = first_of_each_class(seen["logits"].argmax(dim=1), per_class)
    latent, logits = seen["latent"][chosen], seen["logits"][chosen]
    model.search_directions = k
    reference = model.starting_points()
    directions = model.directions(reference[0], model.label(reference[1]))
    model.measure(directions, latent[:8], logits[:8])
    result = model.measure(directions, latent, logits)
    table, seconds = attfind(model, latent, logits, share)
    coordinates = replace(result, table=table.transpose(1, 2))
    print(f"{len(latent)} images; EigenFind: {k} directions, {result.forward_passes} pictures, {result.seconds:.1f} s")
    print(f"AttFind: {table.shape[2]} styles, {table.shape[:3].numel()} pictures, {seconds:.1f} s")
    print(
        f"AttFind / EigenFind: {table.shape[:3].numel() / result.forward_passes:.1f} times the pictures, "
        f"{seconds / result.seconds:.1f} times the seconds"
    )
    for source in (0, 1):
        found = result.ranking(source, 1 - source, k)
        mine = result.images(source)
        score, flips = effects(coordinates.table[mine], coordinates.before[mine], 1 - source)
        top = rank_directions(score, flips, k, reaverage=True, both_signs=True)
        anyone = float(flips.flatten(1).any(dim=1).float().mean())
        print(
            f"{source} to {1 - source}, n = {len(mine)}: EigenFind {found.covered:.3f}; AttFind, best {k} "
            f"{top.covered:.3f}, any style {anyone:.3f}"
        )
    slow = loops(model, latent, logits, table, share, looped)
    for name, value in slow.items():
        print(f"{name}: {value:.3g}")
    eigen, styles = result.seconds / len(latent), seconds / len(latent)
    print(f"EigenFind {slow['EigenFind loop, s per image'] / eigen:.1f} times faster than the loop")
    print(f"AttFind {slow['AttFind loop, s per image'] / styles:.1f} times faster than the loop")


@torch.no_grad()
def timing(sizes: list[int], images: int, k: int, base: int, max_width: int) -> None:
    """Untrained networks: seconds of both searches over the same images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in sizes:
        shape: dict[str, Any] = {"image_size": size, "base": base, "max_width": max_width}
        model = StylEx(
            untrained_classifier("DenseNet121", size),
            reference_size=images,
            search_space="sefa_w",
            search_directions=k,
            **shape,
        )
        model = model.to(device).eval()
        latent, logits = model.starting_points()
        directions = model.directions(latent, model.label(logits))
        model.measure(directions, latent[:2], logits[:2], 64)
        result = model.measure(directions, latent, logits, 64)
        table, seconds = attfind(model, latent, logits, 1.0)
        print(
            f"{size} px, {device}, {len(latent)} images: EigenFind {result.forward_passes} pictures, "
            f"{result.seconds:.1f} s; AttFind {table.shape[2]} styles, {table.shape[:3].numel()} pictures, "
            f"{seconds:.1f} s; {seconds / result.seconds:.0f} times the seconds"
        )


def draw(model: StylEx, seen: dict[str, Tensor], path: Path, rows: int = 8) -> None:
    """Image, reconstruction, the best direction from -4 to 4 deviations, counterfactual, what was redrawn."""
    image = seen["image"][:rows]
    explanation = model.explain(image)
    parts, steps = explanation.parts, explanation.steps
    assert explanation.counterfactual is not None
    assert steps is not None
    columns = [
        *(image, *steps[:, :: max(1, steps.shape[1] // 4)].unbind(dim=1), explanation.counterfactual),
        signed_difference(parts["redrawn"]),
    ]
    columns = [column.expand(-1, 3, -1, -1) for column in columns]
    enlarge = max(1, 96 // image.shape[3])
    columns = [column.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3) for column in columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(grid(columns)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[])
    parser.add_argument("--root", help="folder of images, split as for the training; default: the built-in shapes")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="compare settings on val")
    parser.add_argument("--kept", type=int, default=8, help="directions kept, k")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--share", type=float, default=1.0, help="of the way to a style's extreme; the authors: 2.5")
    parser.add_argument("--images", type=int, default=300, help="per class; altogether of --timing")
    parser.add_argument("--looped", type=int, default=4, help="images of the plain loop")
    parser.add_argument("--grid", type=Path, help="also draw examples of the first checkpoint into this file")
    parser.add_argument("--timing", type=int, nargs="+", metavar="SIZE", default=[])
    parser.add_argument("--base", type=int, default=32768, help="channels of --timing, see StylEx")
    parser.add_argument("--max-width", type=int, default=512)
    options = parser.parse_args()
    timing(options.timing, options.images, options.kept, options.base, options.max_width)
    for checkpoint in options.checkpoint:
        model = load_explainer(checkpoint)
        assert isinstance(model, StylEx), "this benchmark is about StylEx"
        seen = encoded(model, data_of(model, options.root, options.split), options.split)
        row = reconstruction(model, seen)
        print(f"{checkpoint}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if options.grid and checkpoint == options.checkpoint[0]:
            draw(model, seen, options.grid)
        if options.search:
            search(model, seen, options.kept, options.share, options.images, options.looped)
        else:
            coverage(model, seen, options.kept, options.images)


if __name__ == "__main__":
    main()
