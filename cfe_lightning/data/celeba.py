"""CelebA: 202,599 aligned faces with 40 yes-or-no attributes, any of which can be the class.

The files are those of torchvision's layout, read without its checksums, so a subset or a re-encoded copy works too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import get_args

import torchvision.datasets

from cfe_lightning.data.base import ImageData, Split, check_groups, nearest_names
from cfe_lightning.data.cache import ImageCache
from cfe_lightning.data.files import ImageFiles, LabelledFile, drop_unreadable
from cfe_lightning.files.text import one_line
from cfe_lightning.images import find_images

_log = logging.getLogger(__name__)
_SPLITS: dict[str, Split] = {"0": "train", "1": "val", "2": "test"}


class CelebA(ImageData):
    """CelebA with one attribute as the class and the official split.

    ``root/celeba`` holds ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt``, ``list_eval_partition.txt`` and, if
    identities are to be checked, ``identity_CelebA.txt``; the tables may also be ``.csv`` with a header.

    Args:
        root: The folder above ``celeba``.
        attribute: The class, for example ``Smiling``; the classes are ``not Smiling`` and ``Smiling``.
        image_size: Side of the square images, in pixels.
        channels: 1 for grey, 3 for RGB.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        images: A folder with the aligned images, if it is another one; matched by file name without the ending, and
            images that it lacks are left out.
        crop: Side of the square cut from the middle of the picture (218 x 178) before resizing; None resizes it whole.
        check_identities: Read the table of identities and stop if a person is in two splits.
        download: Fetch the set through torchvision if its tables are missing.
        skip_unreadable: See ``ImageFolder``.
        cache: See ``ImageFolder``.
        cache_folder: See ``ImageFolder``; 159 GB for the whole set at 256 pixels.
        balanced: See ``ImageData``.
        horizontal_flip: See ``ImageData``.
        vertical_flip: See ``ImageData``.
        quarter_turns: See ``ImageData``.

    Raises:
        FileNotFoundError: Naming the file or folder that is missing.
        ValueError: If there is no such attribute, a table is not CelebA's, or a person is in two splits.
    """

    def __init__(
        self,
        *,
        root: str,
        attribute: str,
        image_size: int,
        channels: int = 3,
        batch_size: int = 32,
        num_workers: int = 0,
        images: str | None = None,
        crop: int | None = 178,
        check_identities: bool = False,
        download: bool = False,
        skip_unreadable: bool = False,
        cache: bool = True,
        cache_folder: str | None = None,
        balanced: bool = False,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        quarter_turns: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            batch_size=batch_size,
            num_workers=num_workers,
            balanced=balanced,
            horizontal_flip=horizontal_flip,
            vertical_flip=vertical_flip,
            quarter_turns=quarter_turns,
        )
        if crop is not None and crop < 1:
            raise ValueError(f"crop is a number of pixels, or null for the whole picture, got {crop}.")
        self.folder = Path(root) / "celeba"
        self.class_names = (f"not {attribute}", attribute)
        if download and not (self.folder / "list_attr_celeba.txt").is_file():
            _download(Path(root))
        folder = self.folder / "img_align_celeba" if images is None else Path(images)
        splits = self._read(folder, attribute, check_identities)
        self.image_cache = None if cache_folder is None else ImageCache(Path(cache_folder))
        self._datasets: dict[Split, ImageFiles] = {}
        for split, files in splits.items():
            self._datasets[split] = ImageFiles(
                drop_unreadable(files, channels) if skip_unreadable else files,
                image_size=image_size,
                channels=channels,
                crop=crop,
                num_copies=max(num_workers, 1) if cache else 0,
                image_cache=self.image_cache,
            )

    def dataset(self, split: Split) -> ImageFiles:
        """The files of one official split.

        Raises:
            ValueError: If none of its images is there.
        """
        if not self._datasets[split].files:
            raise ValueError(f"None of the images of CelebA's {split} split is in the folder of images.")
        return self._datasets[split]

    def _read(self, folder: Path, attribute: str, check_identities: bool) -> dict[Split, list[LabelledFile]]:
        labels = _read_attribute(_table(self.folder, "list_attr_celeba"), attribute)
        partition_file = _table(self.folder, "list_eval_partition")
        partition = {name: split for name, split in _pairs(partition_file).items() if split in _SPLITS}
        identities = _pairs(_table(self.folder, "identity_CelebA")) if check_identities else {}
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder} with CelebA's aligned images: unpack img_align_celeba.zip there, set "
                "images=<folder>, or set download=true."
            )
        splits: dict[Split, list[LabelledFile]] = {split: [] for split in get_args(Split)}
        for name in find_images(folder):
            key = PurePosixPath(name).stem
            if key in labels and key in partition:
                file = LabelledFile(folder / name, name, labels[key], identities.get(key, key))
                splits[_SPLITS[partition[key]]].append(file)
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
    """The fields of every line but empty ones: separated by commas in a .csv, by blanks in a .txt."""
    with table.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            fields = line.strip().split("," if table.suffix == ".csv" else None)
            if fields and fields != [""]:
                yield fields


def _pairs(table: Path) -> dict[str, str]:
    """The second column by the file name, without its ending, in the first."""
    return {PurePosixPath(row[0]).stem: row[1] for row in _rows(table) if len(row) == 2}


def _read_attribute(table: Path, attribute: str) -> dict[str, int]:
    """0 or 1 for every image, by file name without its ending."""
    rows = _rows(table)
    header = next(rows, [])
    if len(header) == 1:
        header = next(rows, [])  # torchvision's table starts with the number of images
    # The .csv names the first column too, the .txt does not.
    attributes = header[1:] if table.suffix == ".csv" else header
    if attribute not in attributes:
        near = nearest_names(attribute, attributes, 3)
        raise ValueError(
            f"CelebA has no attribute {attribute!r}: "
            + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(attributes)}.")
        )
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
    try:
        torchvision.datasets.CelebA(str(root), download=True)
    except Exception as error:
        reason = one_line(error)
        raise ValueError(
            f"CelebA could not be downloaded ({reason}): fetch img_align_celeba.zip and the tables by hand, unpack "
            f"them into {root / 'celeba'}, and leave download=false."
        ) from error
