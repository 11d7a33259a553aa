"""Writes a set of generated patients for DiffExplainer on several slices: built-in shapes as slices, and their CSV.

    python benchmarks/patients.py --output FOLDER --patients 500

Every patient has five to eight slices, all with or all without the lesion, below ``FOLDER/<split>/<patient>``; the
table ``FOLDER/slices.csv`` has the columns patient, path, slice, label and split.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from cfe_lightning.data.base import Split
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.images import save_image

#: Patients of every ten; no patient is in two splits.
SPLITS: tuple[Split, ...] = ("train",) * 7 + ("val",) + ("test",) * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=500)
    parser.add_argument("--image-size", type=int, default=32)
    options = parser.parse_args()
    count = 8 * options.patients
    data = SyntheticShapes(image_size=options.image_size, num_train=count, num_val=count, num_test=count)
    rows = []
    for patient in range(options.patients):
        split = SPLITS[patient // 2 % len(SPLITS)]
        label, name = patient % 2, f"p{patient:04d}"
        for number in range(5 + patient % 4):
            path = f"{split}/{name}/{number}.png"
            image = data.dataset(split).render(8 * patient + number, label)
            save_image(image, options.output / path)
            rows.append((name, path, number, data.class_names[label], split))
    with (options.output / "slices.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("patient", "path", "slice", "label", "split"), *rows])
    print(f"{options.patients} patients, {len(rows)} slices: {options.output / 'slices.csv'}")


if __name__ == "__main__":
    main()
