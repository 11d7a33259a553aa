"""Does an explanation belong to its classifier? The matrix of DXAI's table 3 on one image folder.

    python benchmarks/cross_classifier.py --set mnist --root FOLDER --output checkpoints/cross

One DXAI per classifier (``simple``, ``resnet18``), each judged by both: DXAI AUC (label mode) of the row's distinct
part under the column's classifier, on the same test images. A row should be lowest on its own classifier. What is
already there is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dxai import OBJECTIVES, ROOT, SETS, evaluate, train_classifier, train_dxai

ARCHITECTURES = ("resnet18", "simple")


def matrix(options: argparse.Namespace) -> list[str]:
    """Trains what is missing, judges every pair and returns the rows of a Markdown table."""
    task = SETS[options.set].below(options.root)
    output = {name: options.output / options.set / name for name in ARCHITECTURES}
    classifiers = {n: train_classifier(task, output[n], "--model.architecture", n) for n in ARCHITECTURES}
    rows = []
    for name in ARCHITECTURES:
        checkpoint = train_dxai(task, output[name], "paper", classifiers[name], 0, OBJECTIVES["paper"])
        cells = []
        for judge in ARCHITECTURES:
            target = output[name] / f"judged_by_{judge}"
            (row,) = evaluate([checkpoint], target, options.limit, "--classifier", str(classifiers[judge]))
            cells.append(f"{row['metrics']['dxai_auc_label']['value']:.3f}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="mnist")
    parser.add_argument("--root", default="data", help="folder of the unpacked real data sets")
    parser.add_argument("--limit", type=int, default=200, help="test images")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "cross")
    options = parser.parse_args()
    table = [
        "| trained with | " + " | ".join(f"judged by {name}" for name in ARCHITECTURES) + " |",
        "| --- " * (len(ARCHITECTURES) + 1) + "|",
        *matrix(options),
    ]
    print("\n".join(table))


if __name__ == "__main__":
    main()
