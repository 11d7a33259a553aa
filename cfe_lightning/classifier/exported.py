"""A TorchScript or ``torch.export`` program as a network whose state is the program's own file.

Loading such a program is running code of whoever made it. ``torch.export.load`` evaluates strings of the file as Python
and unpickles objects; ``torch.jit.load`` runs no Python, but the program may define what happens when it is loaded and
can read and write files. So a checkpoint with a program is opened only where the user trusts its author; who names the
program's file has said so.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ExportedNetwork(nn.Module):
    """Runs an exported program; its weights are not among the parameters, because nothing may change them.

    Built without a program (as a checkpoint does), it is filled by ``load_state_dict``.

    Args:
        program: The bytes of the file that ``torch.jit.save`` or ``torch.export.save`` wrote.

    Raises:
        ValueError: If the bytes are neither kind of program.
    """

    #: Asks ``resolve_class_path`` to refuse files with this class unless the user trusts their author.
    runs_foreign_code: ClassVar[bool] = True

    def __init__(self, program: bytes | None = None) -> None:
        super().__init__()
        self._bytes = b""
        # In a list, so that the program's weights are neither parameters here nor in the state dictionary.
        self._program: list[nn.Module] = []
        if program is not None:
            self._fill(program)

    def forward(self, image: Tensor) -> Any:
        """What the program returns for images [B, C, S, S]."""
        if not self._program:
            raise RuntimeError("This network has no program yet: load a state dictionary first.")
        return self._program[0](image)

    def get_extra_state(self) -> Tensor:
        """The program's file as bytes, [N] uint8: plain data in a state dictionary."""
        return torch.frombuffer(bytearray(self._bytes), dtype=torch.uint8) if self._bytes else torch.empty(0)

    def set_extra_state(self, state: Tensor) -> None:
        """Builds the program from ``get_extra_state``'s bytes, unless it is there already."""
        program = state.to(device="cpu", dtype=torch.uint8).numpy().tobytes()
        if self._bytes and program != self._bytes:
            raise RuntimeError("The exported program in this state dictionary is another one than the one given.")
        if not self._bytes:
            self._fill(program)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """A program stays as it was exported."""
        del mode
        self.training = False
        return self

    def __getstate__(self) -> dict[str, Any]:
        device = next((weight.device for weight in self._weights()), torch.device("cpu"))
        return {"program": self._bytes, "device": device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A program can be neither pickled nor copied; its file can.
        self.__init__(state["program"] or None)  # type: ignore[misc]
        self.to(state["device"])

    def _apply(self, fn: Any, recurse: bool = True) -> ExportedNetwork:
        for program in self._program:
            program._apply(fn)
        return super()._apply(fn, recurse)

    def _weights(self) -> list[Tensor]:
        return [tensor for program in self._program for tensor in (*program.parameters(), *program.buffers())]

    def _fill(self, program: bytes) -> None:
        loaded = _load(program)
        for weight in loaded.parameters():
            weight.requires_grad_(False)
        self._bytes = program
        self._program = [loaded]
        self.train(False)


def _load(program: bytes) -> nn.Module:
    try:
        names = zipfile.ZipFile(io.BytesIO(program)).namelist()
    except zipfile.BadZipFile as error:
        raise ValueError("this is no file of torch.jit.save or torch.export.save") from error
    if any("/data/aotinductor/" in name for name in names):
        raise ValueError("this file holds compiled native code; write the program with torch.export.save instead")
    if any(name.endswith(("/models/model.json", "serialized_exported_program.json")) for name in names):
        return torch.export.load(io.BytesIO(program)).module()
    if any("/code/" in name for name in names):
        return torch.jit.load(io.BytesIO(program), map_location="cpu").eval()
    raise ValueError(
        "this is a pickled object or state dictionary and no program; name its class with wrap_classifier instead"
    )
