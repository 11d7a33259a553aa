"""Writes the atlas of a method's directions beside the explanations, where the report finds it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from cfe_lightning import images
from cfe_lightning.atlas import Atlas, AtlasPair
from cfe_lightning.explaining.folder import ATLAS_PICTURE, ATLAS_SCHEMA
from cfe_lightning.files.atomic import write_json
from cfe_lightning.files.text import significant

#: Sides that a cell of a picture has at least, in pixels; smaller images are enlarged by a whole factor.
SMALLEST_CELL = 48


def write_atlas(atlas: Atlas, output: Path) -> None:
    """Writes ``atlas.json`` and ``atlas/``; an earlier atlas and its pictures give way, other files there stay.

    Args:
        atlas: What to write.
        output: The output folder of an explanation run.
    """
    path, folder = output / "atlas.json", output / "atlas"
    # First of all, and written last: whatever kills this, no numbers stand beside the pictures of others.
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [_write_pair(pair, index, output) for index, pair in enumerate(atlas.pairs)]
    written = {output / direction["file"] for pair in pairs for direction in pair["directions"]}
    for stale in set(folder.iterdir()) - written:
        if ATLAS_PICTURE.fullmatch(stale.name):
            stale.unlink()
    content = {"schema": ATLAS_SCHEMA, "title": atlas.title, "note": atlas.note, "pairs": pairs}
    write_json(path, content, indent=1)


def _write_pair(pair: AtlasPair, index: int, output: Path) -> dict[str, Any]:
    """Writes the pictures of a pair and returns its part of atlas.json."""
    directions = []
    for rank, direction in enumerate(pair.directions):
        # Counted, because class names may hold anything.
        file = f"atlas/{index}-{rank}.png"
        picture, factor = _picture(direction.images)
        images.save_image(picture, output / file)
        rows, columns = direction.images.shape[:2]
        directions.append(
            {
                "name": direction.name,
                "file": file,
                "cell": [picture.shape[2] // columns, picture.shape[1] // rows],
                "enlarged": factor,
                "strengths": [significant(value) for value in direction.strengths.tolist()],
                "probabilities": [[significant(value) for value in row] for row in direction.probabilities.tolist()],
                **{name: None if value is None else significant(value) for name, value in direction.numbers().items()},
            }
        )
    return {
        "source": pair.source,
        "target": pair.target,
        "num_images": pair.num_images,
        "num_kept": pair.num_kept,
        "covered": significant(pair.covered),
        "curve": [[significant(step), significant(share)] for step, share in pair.curve],
        "directions": directions,
    }


def _picture(moved: Tensor) -> tuple[Tensor, int]:
    """Images [N, T, C, H, W] as one picture, [C, N * H * f, T * W * f], and its enlargement f."""
    factor = max(1, math.ceil(SMALLEST_CELL / min(moved.shape[-2:])))
    table = moved.detach().float().cpu().permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return table.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2), factor
