"""A TorchScript or ``torch.export`` program as a network whose state is the program's own file.

Loading such a program runs its author's code. ``torch.export.load`` evaluates strings of the file as Python and
unpickles objects; ``torch.jit.load`` runs no Python, but the program may act when it is loaded and can read and write
files. So a checkpoint with a program is opened only where the user trusts its author. A user who names the program's
own file trusts it by that.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ExportedNetwork(nn.Module):
    """Runs an exported program; its weights are not among the parameters, because nothing may change them.

    Loading a checkpoint builds it without a program and fills it by ``load_state_dict``.

    Args:
        program: Bytes of a file that ``torch.jit.save`` or ``torch.export.save`` wrote; None leaves it empty.

    Raises:
        ValueError: If the bytes are neither kind of program.
    """

    #: Makes ``resolve_class_path`` refuse this class, under any name, and its subclasses without the user's trust.
    runs_foreign_code: ClassVar[bool] = True

    def __init__(self, program: bytes | None = None) -> None:
        super().__init__()
        self._bytes = b""
        # In a list, so that the program's weights are neither parameters here nor in the state dictionary.
        self._program: list[nn.Module] = []
        if program is not None:
            self._fill(program)

    def forward(self, image: Tensor) -> Any:
        """Returns the program's output for images [B, C, S, S]."""
        if not self._program:
            raise RuntimeError("This network has no program yet: load a state dictionary first.")
        return self._program[0](image)

    def get_extra_state(self) -> Tensor:
        """Returns the bytes of the program's file, [N] uint8: plain data for a state dictionary."""
        return torch.frombuffer(bytearray(self._bytes), dtype=torch.uint8) if self._bytes else torch.empty(0)

    def set_extra_state(self, state: Tensor) -> None:
        """Loads the program from the bytes of ``get_extra_state``; refuses to exchange a loaded program."""
        program = state.to(device="cpu", dtype=torch.uint8).numpy().tobytes()
        if self._bytes and program != self._bytes:
            raise RuntimeError("The exported program in this state dictionary is another one than the one given.")
        if not self._bytes:
            self._fill(program)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Stays in eval mode, because a program cannot change its mode."""
        del mode
        self.training = False
        return self

    def __getstate__(self) -> dict[str, Any]:
        weights = (tensor for program in self._program for tensor in (*program.parameters(), *program.buffers()))
        device = next((weight.device for weight in weights), torch.device("cpu"))
        return {"program": self._bytes, "device": device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A program can be neither pickled nor copied; its file can.
        self.__init__(state["program"] or None)  # type: ignore[misc]
        self.to(state["device"])

    def _apply(self, fn: Any, recurse: bool = True) -> ExportedNetwork:
        # The program is no submodule, so a change of device or precision would miss it.
        for program in self._program:
            program._apply(fn)
        return super()._apply(fn, recurse)

    def _fill(self, program: bytes) -> None:
        loaded = _load(program)
        # A script module has no working `requires_grad_`.
        for weight in loaded.parameters():
            weight.requires_grad_(False)
        self._bytes, self._program = program, [loaded]
        self.train(False)


def _load(program: bytes) -> nn.Module:
    # The names in the archive tell the kinds of programs apart.
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
