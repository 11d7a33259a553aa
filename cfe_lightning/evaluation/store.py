"""What an evaluation has measured so far, on the disk batch by batch: the same command again goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cfe_lightning.files.tensors import load_plain, save_plain


class EvaluationStore:
    """Finished batches of one evaluation in a folder of their own, of which the name tells what is measured.

    Args:
        folder: Of the results; holds ``unfinished/<key>/`` until they are there.
        key: Equal only for evaluations of the same explainers on the same batches with the same settings.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._all = folder / "unfinished"
        self.folder = self._all / key
        self._count = 0

    def __len__(self) -> int:
        count = 0
        while self._path(count).is_file():
            count += 1
        return count

    def finished(self) -> Iterator[dict[str, Any]]:
        """The batches in their order, as they were given to ``add``.

        Raises:
            ValueError: If a file cannot be read; the sentence names it.
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
        """Keeps one more batch; what a kill tears is not taken for one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_plain(self._path(self._count), state)
        self._count += 1

    def clear(self) -> None:
        """Deletes what is no longer needed once the results are written; other interrupted evaluations stay."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self._all.rmdir()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.pt"
