"""CelebA: 202,599 aligned faces with 40 yes-or-no attributes, any of which can be the class.

The files have torchvision's layout but are read without its checksums, so a subset or a re-encoded copy works too.
"""

import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import torchvision.datasets

from cfe_lightning.data.base import Split, check_groups, did_you_mean
from cfe_lightning.data.files import FileData, ImageFiles, LabelledFile
from cfe_lightning.files.text import one_line
from cfe_lightning.images import find_images

_log = logging.getLogger(__name__)
_SPLITS: dict[str, Split] = {"0": "train", "1": "val", "2": "test"}


class CelebA(FileData):
    """CelebA with one attribute as the class and the official split.

    ``root/celeba`` holds ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt``, ``list_eval_partition.txt`` and, for the
    check of identities, ``identity_CelebA.txt``; the tables may also be ``.csv`` with a header. At 256 pixels the whole
    set takes 159 GB in a ``cache_folder``.

    Args:
        root: Folder above ``celeba``.
        attribute: Attribute that is the class: ``Smiling`` gives the classes ``not Smiling`` and ``Smiling``.
        images: Another folder of the aligned images. They are matched by file name without the ending; images missing
            there are left out. None takes ``img_align_celeba``.
        crop: Side in pixels of the square cut from the middle (of 218 x 178) before resizing; None cuts nothing.
        check_identities: Reads the table of identities and stops if a person is in two splits.
        download: Downloads the set through torchvision if its tables are missing.
        loading: Options of ``FileData`` and ``ImageData``.

    Raises:
        FileNotFoundError: If a file or folder is missing; the message names it.
        ValueError: If the attribute is unknown, a table is not CelebA's, or a person is in two splits.
    """

    def __init__(
        self,
        *,
        root: str,
        attribute: str,
        images: str | None = None,
        crop: int | None = 178,
        check_identities: bool = False,
        download: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if crop is not None and crop < 1:
            raise ValueError(f"crop is a number of pixels, or null for the whole picture, got {crop}.")
        self.folder = Path(root) / "celeba"
        self.class_names = (f"not {attribute}", attribute)
        if download and not (self.folder / "list_attr_celeba.txt").is_file():
            _download(Path(root))
        # Files of every split, in the order of their names.
        folder = self.folder / "img_align_celeba" if images is None else Path(images)
        splits = self._read(folder, attribute, check_identities)
        self._datasets = {split: self.image_files(files, crop=crop, alternate=False) for split, files in splits.items()}

    def dataset(self, split: Split) -> ImageFiles:
        """Returns the files of one official split."""
        if not self._datasets[split].files:
            raise ValueError(f"None of the images of CelebA's {split} split is in the folder of images.")
        return self._datasets[split]

    def _read(self, folder: Path, attribute: str, check_identities: bool) -> dict[Split, list[LabelledFile]]:
        """Returns the existing images of every split."""
        labels = _read_attribute(_table(self.folder, "list_attr_celeba"), attribute)
        partition_file = _table(self.folder, "list_eval_partition")
        partition = {name: split for name, split in _pairs(partition_file).items() if split in _SPLITS}
        identities = _pairs(_table(self.folder, "identity_CelebA")) if check_identities else {}
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder} with CelebA's aligned images: unpack img_align_celeba.zip there, set "
                "images=<folder>, or set download=true."
            )

        # Images.
        splits: dict[Split, list[LabelledFile]] = {split: [] for split in get_args(Split)}
        for name in find_images(folder):
            key = PurePosixPath(name).stem
            if key in labels and key in partition:
                file = LabelledFile(folder / name, name, labels[key], identities.get(key, key))
                splits[_SPLITS[partition[key]]].append(file)

        # Missing images and identities in two splits.
        found = sum(len(files) for files in splits.values())
        if found == 0:
            raise ValueError(f"{folder} holds none of the images that {partition_file} names, such as 000001.jpg.")
        if found < len(labels):
            _log.warning("%s has %d of the %d images of CelebA; the others are left out.", folder, found, len(labels))
        check_groups({split: [file.group for file in files] for split, files in splits.items()})
        return splits


def _table(folder: Path, stem: str) -> Path:
    for ending in (".txt", ".csv"):
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    raise FileNotFoundError(
        f"CelebA's table {stem}.txt (or .csv) is not in {folder}: put it there, set root to the folder above "
        "'celeba', or set download=true."
    )


def _rows(table: Path) -> Iterator[list[str]]:
    """Yields the fields of every non-empty line: separated by commas in a .csv, by blanks in a .txt."""
    with table.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            fields = line.strip().split("," if table.suffix == ".csv" else None)
            if fields and fields != [""]:
                yield fields


def _pairs(table: Path) -> dict[str, str]:
    """Returns the second column by the file name, without its ending, in the first."""
    return {PurePosixPath(row[0]).stem: row[1] for row in _rows(table) if len(row) == 2}


def _read_attribute(table: Path, attribute: str) -> dict[str, int]:
    """Returns 0 or 1 for every image, by file name without its ending."""
    rows = _rows(table)
    header = next(rows, [])
    if len(header) == 1:
        header = next(rows, [])  # torchvision's table starts with the number of images
    # The .csv names also the first column, the .txt does not.
    attributes = header[1:] if table.suffix == ".csv" else header
    if attribute not in attributes:
        hint = did_you_mean(attribute, attributes, f"it has {', '.join(attributes)}.")
        raise ValueError(f"CelebA has no attribute {attribute!r}: {hint}")

    # Rows.
    column = attributes.index(attribute) + 1
    labels = {}
    for row in rows:
        if len(row) != len(attributes) + 1 or row[column] not in ("1", "-1", "0"):
            raise ValueError(
                f"{table} is not CelebA's table: the row of {row[0]!r} does not hold a 1 or -1 for each of the "
                f"{len(attributes)} attributes."
            )
        labels[PurePosixPath(row[0]).stem] = int(row[column] == "1")
    return labels


def _download(root: Path) -> None:
    """Downloads the set through torchvision; raises a ValueError with the way by hand if that fails."""
    try:
        torchvision.datasets.CelebA(str(root), download=True)
    except Exception as error:
        raise ValueError(
            f"CelebA could not be downloaded ({one_line(error)}): fetch img_align_celeba.zip and the tables by hand, "
            f"unpack them into {root / 'celeba'}, and leave download=false."
        ) from error
