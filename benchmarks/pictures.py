"""Draws the picture of the README from the runs of ``benchmarks/dxai.py --set lesion texture colour``.

python benchmarks/pictures.py --bench checkpoints/bench --output docs/images/dxai_shapes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from cfe_lightning import images, load_explainer
from cfe_lightning.data.synthetic import SyntheticShapes

TITLES = ("image", "without distinct", "distinct part", "counterfactual", "true difference")
ENLARGE, TILE = 3, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("checkpoints/bench"))
    parser.add_argument("--run", default="paper_0")
    parser.add_argument("--output", type=Path, default=Path("docs/images/dxai_shapes.png"))
    options = parser.parse_args()
    blocks = []
    for cue in ("lesion", "texture", "colour"):
        explainer = load_explainer(options.bench / cue / options.run / "last.ckpt")
        data = SyntheticShapes(cue=cue).dataset("test")
        samples = [data[index] for index in (0, 1, 2, 5)]
        image = torch.stack([sample["image"] for sample in samples])
        truth = image - torch.stack([sample["counterfactual"] for sample in samples])
        explanation = explainer.explain(image)
        distinct = explanation.parts["distinct"]
        columns = [image, image - distinct, distinct * 2, explanation.counterfactual, truth * 2]
        columns = [c.repeat_interleave(ENLARGE, dim=2).repeat_interleave(ENLARGE, dim=3) for c in columns]
        blocks.append(images.to_pil(images.grid(columns)))
    header, gap = 20, 14
    width = sum(block.width for block in blocks) + gap * (len(blocks) - 1)
    picture = Image.new("RGB", (width, blocks[0].height + header), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    left = 0
    for block in blocks:
        picture.paste(block, (left, header))
        for index, title in enumerate(TITLES):
            draw.text((left + 4 + index * (ENLARGE * TILE + 4), 4), title, fill="black", font=font)
        left += block.width + gap
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
