"""Measures StylEx: reconstruction, agreement, coverage of EigenFind and AttFind, and the cost of both searches.

    python benchmarks/stylex.py --checkpoint checkpoints/stylex_synthetic/best.ckpt
    python benchmarks/stylex.py --checkpoint checkpoints/stylex_folder/best.ckpt --root FOLDER/smiles --search
    python benchmarks/stylex.py --timing 64 256

Without ``--root`` the data are the built-in shapes. Directions come from the reference in the checkpoint (validation
images), coverage from images of the split, up to ``--images`` of each class; images whose reconstruction is classified
differently do not count. L1 is on [-1, 1]. ``--search`` compares EigenFind and AttFind (Lang et al., "Explaining in
Style", arXiv 2104.13369) on the same images, and both with a plain loop over images, directions and signs on a subset.
``--timing`` times untrained networks with the published channels.

Shapes: n images, Q directions, M styles of all convolutions, K classes. Signs of AttFind stand in the order (towards
the maximum, towards the minimum).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from contenders import untrained_classifier
from torch import Tensor
from torch.utils.data import DataLoader

from cfe_lightning import load_explainer
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.data.base import ImageData
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.decisions import kl_between_logits
from cfe_lightning.images import grid, signed_difference, to_pil
from cfe_lightning.methods.stylex import StylEx
from cfe_lightning.methods.stylex.generator import Entering, Styles, Synthesis
from cfe_lightning.methods.stylex.ranking import effects, rank_directions
from cfe_lightning.methods.stylex.reference import first_of_each_class
from cfe_lightning.methods.stylex.search import Directions

#: Directions and steps of the table of coverage: space, unit, degree.
SETTINGS = (
    *(("pca_w", "sigma", degree) for degree in (0.0, 1.0, 2.0, 4.0)),
    *((space, "sigma", degree) for space in ("pca_s", "sefa_w") for degree in (2.0, 4.0)),
    ("sefa_w", "abs", 10.0),
)

# AttFind


def coordinate_shifts(flat: Tensor, low: Tensor, high: Tensor, share: float = 1.0) -> Tensor:
    """Returns the shifts of each style to its largest and to its smallest value, [n, M] -> [n, 2, M].

    Args:
        flat: Styles of the images, [n, M].
        low: Smallest value of each style over the reference, [M].
        high: Largest value of each style over the reference, [M].
        share: Length of the shift: 1 ends at the extreme; the authors of CheXplaining in Style extrapolate with 2.5.
    """
    return torch.stack([high - flat, low - flat], dim=1) * share


@torch.no_grad()
def coordinate_table(
    synthesis: Synthesis,
    classifier: FrozenClassifier,
    styles: Styles,
    shifts: Tensor,
    batch_size: int | None = None,
    images_at_once: int = 8,
) -> Tensor:
    """Measures the classifier's logits of every image with one style changed, [n, 2, M, K].

    Synthesis starts at the changed convolution, whose inputs are kept for each image.

    Args:
        synthesis: Synthesis of the generator.
        classifier: The explained classifier.
        styles: Styles of the n images.
        shifts: Shifts of every style, [n, 2, M].
        batch_size: Edits per pass; None takes ``pictures_at_once``.
        images_at_once: Number of images whose features are held at a time.
    """
    # Two slots for every doubling of the sides, from 4 x 4 pixels on.
    batch_size = batch_size or pictures_at_once(2 ** (synthesis.num_slots + 2), shifts.device)
    logits = []
    for index in torch.arange(len(shifts), device=shifts.device).split(images_at_once):
        mine, shift = rows_of(styles, index), shifts[index]
        _, entering = synthesis.trace(mine)
        layers = zip(entering, shift.split(synthesis.layer_sizes, dim=2), strict=True)
        tables = [
            _layer_table(synthesis, classifier, mine, layer, entered, amount, batch_size)
            for layer, (entered, amount) in enumerate(layers)
        ]
        logits.append(torch.cat(tables, dim=2))
    return torch.cat(logits)


def _layer_table(
    synthesis: Synthesis,
    classifier: FrozenClassifier,
    styles: Styles,
    layer: int,
    entering: Entering,
    shift: Tensor,
    batch_size: int,
) -> Tensor:
    """Measures the part of ``coordinate_table`` for one convolution, shifts [n, 2, c] -> [n, 2, c, K]."""
    width = shift.shape[2]
    amounts = shift.flatten()
    logits = []
    for part in torch.arange(len(amounts), device=shift.device).split(batch_size):
        # Indexing copies, so the images' own styles stay as they are.
        rows, channel = part // (2 * width), part % width
        changed = rows_of(styles, rows)
        changed.conv[layer][torch.arange(len(part), device=part.device), channel] += amounts[part]
        pictures = synthesis.synthesize_from(layer, rows_of(entering, rows), changed)
        logits.append(classifier(pictures.clamp(-1, 1).contiguous(memory_format=torch.channels_last)))
    return torch.cat(logits).unflatten(0, shift.shape)


# Tables


def data_of(model: StylEx, root: str | None) -> ImageData:
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
    """Loads all images of the split with their latents and logits."""
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
    rendered = torch.cat([model.classifier(chunk) for chunk in picture.split(100)])
    same = rendered.argmax(dim=1) == seen["logits"].argmax(dim=1)
    return {
        "n": len(picture),
        "classifier accuracy": float((seen["logits"].argmax(dim=1) == seen["label"]).float().mean()),
        "L1": float((picture - seen["image"]).abs().mean()),
        "agreement": float(same.float().mean()),
        "KL": float(kl_between_logits(seen["logits"], rendered)),
    }


@torch.no_grad()
def candidates(model: StylEx) -> Directions:
    """Finds the candidate directions from the reference in the checkpoint."""
    latent, logits = model.starting_points()
    return model.latent_search.directions(model.generator, latent, model.label(logits))


@torch.no_grad()
def coverage(model: StylEx, seen: dict[str, Tensor], k: int, per_class: int) -> None:
    """Prints a table of directions and steps: explained share from class 0 and from class 1, and the best one's cost.

    The cost is the mean change of a pixel against the reconstruction, and of the critic's logit (less is less real).
    """
    # Images.
    chosen = first_of_each_class(seen["logits"].argmax(dim=1), per_class)
    latent, logits = seen["latent"][chosen], seen["logits"][chosen]
    print(f"{'space':8} {'step':>9} {'sigma':>7} {'0 to 1':>8} {'1 to 0':>8} {'first':>12} {'L1':>7} {'critic':>7}")
    for space, unit, degree in SETTINGS:
        # Coverage.
        search = model.latent_search
        search.search_space, search.degree_unit, search.degree = space, unit, degree
        result = model.measure(candidates(model), latent, logits)
        ranks = [result.ranking(source, 1 - source, k) for source in (0, 1)]
        first = " ".join(f"{int(r.direction[0])}{'+-'[int(r.sign[0]) < 0]}" if len(r.direction) else "-" for r in ranks)

        # Cost of the first direction.
        moved, realism = [], []
        for source, rank in enumerate(ranks):
            mine = result.images(source)[:100]
            if len(rank.direction) and len(mine):
                step = int(rank.sign[0]) * result.steps[rank.direction[0]] * result.vectors[rank.direction[0]]
                change = torch.stack([torch.zeros_like(step), step]).expand(len(mine), -1, -1)
                label = model.label(logits[mine])
                pictures = model.render(latent[mine], label, change)
                moved.append(float((pictures[:, 1] - pictures[:, 0]).abs().mean()))
                start, end = (model.critic(picture, label) for picture in pictures.unbind(dim=1))
                realism.append(float((end - start).mean()))

        # Row of the table.
        sigma = float((result.steps / result.spread.clamp_min(1e-9)).median())
        print(
            f"{space:8} {degree:5.1f} {unit[:3]} {sigma:7.1f} {ranks[0].covered:8.3f} {ranks[1].covered:8.3f} "
            f"{first:>12} {sum(moved) / max(1, len(moved)):7.3f} {sum(realism) / max(1, len(realism)):7.2f}"
        )


@torch.no_grad()
def extremes(model: StylEx) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest value of every style over the reference, [M] each."""
    latent, logits = model.starting_points()
    flat = model.generator.synthesis.flatten_styles(model.generator.styles(latent, model.label(logits)))
    return flat.amin(dim=0), flat.amax(dim=0)


@torch.no_grad()
def attfind(model: StylEx, latent: Tensor, logits: Tensor, share: float) -> tuple[Tensor, float]:
    """Returns the whole table of AttFind and its seconds; extremes come from the reference."""
    generator, (low, high) = model.generator, extremes(model)
    begin = time.perf_counter()
    styles = generator.styles(latent, model.label(logits))
    shifts = coordinate_shifts(generator.synthesis.flatten_styles(styles), low, high, share)
    table = coordinate_table(generator.synthesis, model.classifier, styles, shifts)
    return table, time.perf_counter() - begin


@torch.no_grad()
def loops(
    model: StylEx, latent: Tensor, logits: Tensor, table: Tensor, shifts_share: float, images: int
) -> dict[str, Any]:
    """Searches a few images by plain loops: one picture at a time, from the latent on."""
    # EigenFind.
    generator, classifier, label = model.generator, model.classifier, model.label(logits)
    directions = candidates(model)
    result = model.measure(directions, latent[:images], logits[:images])
    begin, worst = time.perf_counter(), 0.0
    for image in range(images):
        for direction in range(len(directions.vectors)):
            for place, sign in enumerate((1, -1)):
                w = latent[image : image + 1] + sign * result.steps[direction] * directions.vectors[direction]
                after = classifier(generator(w, label[image : image + 1]).clamp(-1, 1))[0]
                worst = max(worst, float((after - result.table[image, direction, place]).abs().max()))
    eigen = time.perf_counter() - begin

    # AttFind.
    low, high = extremes(model)
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
                after = classifier(picture.clamp(-1, 1))[0]
                worst_styles = max(worst_styles, float((after - table[image, place, coordinate]).abs().max()))
    return {
        "EigenFind loop, s per image": eigen / images,
        "AttFind loop, s per image": (time.perf_counter() - begin) / images,
        "EigenFind, largest difference of logits": worst,
        "AttFind, largest difference of logits": worst_styles,
    }


def search(model: StylEx, seen: dict[str, Tensor], k: int, share: float, per_class: int, looped: int) -> None:
    """Compares EigenFind and AttFind on the same images."""
    # Both searches; the first pass warms up.
    chosen = first_of_each_class(seen["logits"].argmax(dim=1), per_class)
    latent, logits = seen["latent"][chosen], seen["logits"][chosen]
    model.latent_search.search_directions = k
    directions = candidates(model)
    model.measure(directions, latent[:8], logits[:8])
    result = model.measure(directions, latent, logits)
    table, seconds = attfind(model, latent, logits, share)
    print(f"{len(latent)} images; EigenFind: {k} directions, {result.forward_passes} pictures, {result.seconds:.1f} s")
    print(f"AttFind: {table.shape[2]} styles, {table.shape[:3].numel()} pictures, {seconds:.1f} s")
    print(
        f"AttFind / EigenFind: {table.shape[:3].numel() / result.forward_passes:.1f} times the pictures, "
        f"{seconds / result.seconds:.1f} times the seconds"
    )

    # Coverage.
    for source in (0, 1):
        found = result.ranking(source, 1 - source, k)
        mine = result.images(source)
        score, flips = effects(table.transpose(1, 2)[mine], result.before[mine], 1 - source)
        top = rank_directions(score, flips, k, reaverage=True, both_signs=True)
        anyone = float(flips.flatten(1).any(dim=1).float().mean())
        print(
            f"{source} to {1 - source}, n = {len(mine)}: EigenFind {found.covered:.3f}; AttFind, best {k} "
            f"{top.covered:.3f}, any style {anyone:.3f}"
        )

    # Plain loops.
    slow = loops(model, latent, logits, table, share, looped)
    for name, value in slow.items():
        print(f"{name}: {value:.3g}")
    eigen, styles = result.seconds / len(latent), seconds / len(latent)
    print(f"EigenFind {slow['EigenFind loop, s per image'] / eigen:.1f} times faster than the loop")
    print(f"AttFind {slow['AttFind loop, s per image'] / styles:.1f} times faster than the loop")


@torch.no_grad()
def timing(sizes: list[int], images: int, k: int, base: int, max_width: int) -> None:
    """Times both searches of untrained networks over the same images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in sizes:
        # Networks.
        classifier = untrained_classifier("DenseNet121", size)
        shape: dict[str, Any] = {"image_size": size, "base": base, "max_width": max_width, "reference_size": images}
        model = StylEx(classifier, search_space="sefa_w", search_directions=k, **shape).to(device).eval()

        # Searches; the first pass warms up.
        latent, logits = model.starting_points()
        directions = candidates(model)
        model.measure(directions, latent[:2], logits[:2], 64)
        result = model.measure(directions, latent, logits, 64)
        table, seconds = attfind(model, latent, logits, 1.0)
        print(
            f"{size} px, {device}, {len(latent)} images: EigenFind {result.forward_passes} pictures, "
            f"{result.seconds:.1f} s; AttFind {table.shape[2]} styles, {table.shape[:3].numel()} pictures, "
            f"{seconds:.1f} s; {seconds / result.seconds:.0f} times the seconds"
        )


def draw(model: StylEx, seen: dict[str, Tensor], path: Path, rows: int = 8) -> None:
    """Draws image, reconstruction, steps along the best direction, counterfactual, and the redrawn part."""
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
    # Options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[])
    parser.add_argument("--root", help="folder of images, split as in training; default: the built-in shapes")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="use val to compare settings")
    parser.add_argument("--kept", type=int, default=8, help="directions kept, k")
    parser.add_argument("--search", action="store_true", help="compare EigenFind with AttFind and plain loops")
    parser.add_argument("--share", type=float, default=1.0, help="AttFind's shift; 1 is to the extreme, published: 2.5")
    parser.add_argument("--images", type=int, default=300, help="images per class; with --timing, all images")
    parser.add_argument("--looped", type=int, default=4, help="images of the plain loops")
    parser.add_argument("--grid", type=Path, help="file for examples of the first checkpoint")
    parser.add_argument("--timing", type=int, nargs="+", metavar="SIZE", default=[], help="sizes to time, in pixels")
    parser.add_argument("--base", type=int, default=32768, help="base / r channels at resolution r with --timing")
    parser.add_argument("--max-width", type=int, default=512, help="upper limit of the channels with --timing")
    options = parser.parse_args()

    # Measurements.
    timing(options.timing, options.images, options.kept, options.base, options.max_width)
    for checkpoint in options.checkpoint:
        model = load_explainer(checkpoint)
        assert isinstance(model, StylEx), "this benchmark is about StylEx"
        seen = encoded(model, data_of(model, options.root), options.split)
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
