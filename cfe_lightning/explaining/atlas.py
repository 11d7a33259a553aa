"""Writes the atlas of a method's directions beside the explanations, where the report finds it."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from cfe_lightning import images
from cfe_lightning.atlas import Atlas, AtlasPair
from cfe_lightning.explaining.names import ATLAS
from cfe_lightning.explaining.values import plain
from cfe_lightning.files.atomic import write_json

#: Smallest sides of a cell of a picture, in pixels; smaller images are enlarged by a whole factor.
SMALLEST_CELL = 48


def write_atlas(atlas: Atlas, output: Path) -> None:
    """Writes ``atlas.json`` and ``atlas/`` of an output folder in place of an earlier atlas; other files there stay."""
    # The numbers go first and come last: a kill never leaves numbers beside the pictures of others.
    ATLAS.remove(output)
    (output / ATLAS.name).mkdir(parents=True, exist_ok=True)
    pairs = [_write_pair(pair, index, output) for index, pair in enumerate(atlas.pairs)]
    content = {"schema": ATLAS.schema, "title": atlas.title, "note": atlas.note, "pairs": plain(pairs)}
    write_json(output / ATLAS.file, content, indent=1)


def _write_pair(pair: AtlasPair, index: int, output: Path) -> dict[str, Any]:
    """Writes the pictures of a pair and returns its part of atlas.json."""
    directions = []
    for rank, direction in enumerate(pair.directions):
        # Numbered, because class names may hold anything.
        file = f"{ATLAS.name}/{index}-{rank}.png"
        picture, factor = _picture(direction.images)
        images.save_image(picture, output / file)
        rows, columns = direction.images.shape[:2]
        cell = [picture.shape[2] // columns, picture.shape[1] // rows]
        drawn = {"name": direction.name, "file": file, "cell": cell, "enlarged": factor}
        judged = {"strengths": direction.strengths, "probabilities": direction.probabilities}
        directions.append(drawn | judged | direction.numbers())
    names = ("source", "target", "num_images", "num_kept", "covered", "curve")
    return {name: getattr(pair, name) for name in names} | {"directions": directions}


def _picture(moved: Tensor) -> tuple[Tensor, int]:
    """Lays images [N, T, C, H, W] out as one picture, [C, N * H * f, T * W * f], and returns its enlargement f, too."""
    factor = max(1, math.ceil(SMALLEST_CELL / min(moved.shape[-2:])))
    table = moved.detach().float().cpu().permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return table.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2), factor
