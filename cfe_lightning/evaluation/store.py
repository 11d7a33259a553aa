"""Storage of an unfinished evaluation on disk, batch by batch: the same command resumes from it."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from cfe_lightning.files.tensors import load_plain, save_plain


class EvaluationStore:
    """The finished batches of one evaluation, in a folder whose name identifies the evaluation.

    Args:
        folder: Folder for the results; batches are kept in its subfolder ``unfinished/<key>/`` until these are written.
        key: Digest that is equal only for the same explainers, batches and settings.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._all = folder / "unfinished"
        self.folder = self._all / key
        self._count = 0

    def __len__(self) -> int:
        return next(index for index in count() if not self._path(index).is_file())

    def finished(self) -> Iterator[dict[str, Any]]:
        """Yields the stored batches in the order of ``add``.

        Raises:
            ValueError: If a file cannot be read; the message names it.
        """
        while (path := self._path(self._count)).is_file():
            try:
                state = load_plain(path)
            except ValueError as error:
                raise ValueError(
                    f"{path} of an interrupted evaluation cannot be read ({error}): delete the folder "
                    f"{self.folder} to measure anew."
                ) from error
            self._count += 1
            yield state

    def add(self, state: dict[str, Any]) -> None:
        """Stores one more batch; an incomplete file of a killed run does not count."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_plain(self._path(self._count), state)
        self._count += 1

    def clear(self) -> None:
        """Deletes the batches once the results are written; other interrupted evaluations stay."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self._all.rmdir()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.pt"
