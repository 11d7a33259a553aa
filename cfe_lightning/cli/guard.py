"""The one exit of every command: any failure becomes one sentence and an exit code; imports nothing heavy."""

import argparse
import errno
import re
import signal
import sys
import traceback
from collections.abc import Callable

from cfe_lightning.compute.signals import StopRequested, StopSignals, name_of

#: Exit codes: the input made the command impossible; the program itself has a fault.
NOTHING_DONE = 2
FAULT = 1
_LONGEST = 1200
#: Errors of a disk, which may arrive wrapped in another exception.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_ALLOCATOR = re.compile(r"\[enforce fail at [^\]]*\] err == 0\. |\. Error code 12.*", re.DOTALL)
_WORKER = re.compile(r"Caught (\w+) in (?:DataLoader worker process|pin memory thread)")


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds the option that shows the traceback of an error."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def guarded(command: Callable[[], int], *, debug: bool, kept: str) -> int:
    """Runs a command; an exception or a signal that asks for the end becomes one sentence on stderr.

    Args:
        command: The work, which returns the exit code.
        debug: Shows the traceback before the sentence.
        kept: The results that survive a system fault and how to continue, as the end of a sentence.

    Returns:
        The command's own exit code, ``NOTHING_DONE``, ``FAULT``, or 128 + the signal.
    """
    kept = plain(kept)  # it may name a file
    try:
        with StopSignals():
            return command()
    except (KeyboardInterrupt, StopRequested) as stop:
        number = stop.number if isinstance(stop, StopRequested) else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {name_of(number)}"
        sys.stderr.write(f"\ninterrupted{by}: {kept}\n")
        return 128 + number
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        sentence, code = explain_error(error, kept)
        sys.stderr.write(f"error: {sentence}\n")
        return code


def explain_error(error: Exception, kept: str) -> tuple[str, int]:
    """Returns the sentence that a user reads about an exception, and the exit code.

    Args:
        error: The exception; messages of ``ValueError`` and ``OSError`` are written for users.
        kept: The results that survive a system fault and how to continue, as the end of a sentence.
    """
    # The operating system.
    system = _system_error(error)
    if system is not None:
        where = "" if system.filename is None else f": {system.filename}"
        return plain(f"{system.strerror}{where} ({kept})"), NOTHING_DONE
    reason = _without_worker(str(error))
    if "PytorchStreamWriter failed writing" in reason:
        return f"A file could not be written to its end, the disk is full or gone ({kept})", NOTHING_DONE
    # Memory.
    if _is_out_of_memory(error):
        told = f" ({plain(_ALLOCATOR.sub('', reason))[:200]})" if reason else ""
        advice = f"choose smaller batches or images, or a machine with more of it ({kept})"
        return f"Memory ran out{told}: {advice}.", NOTHING_DONE
    # Sentences for users.
    if isinstance(error, (ValueError, OSError)):
        return plain(reason or type(error).__name__), NOTHING_DONE
    if reason.startswith("DataLoader worker"):
        sentence = "A process that reads images was killed, often for want of memory: lower num_workers"
        return f"{sentence} ({kept}).", NOTHING_DONE
    if isinstance(error, ModuleNotFoundError):
        return plain(f"{reason}: install it, for example with `pip install {error.name}`."), NOTHING_DONE
    # Anything else.
    fault = f"This is a fault of the program, {type(error).__name__}: {reason or 'without a message'} ({kept})"
    return plain(f"{fault}; please report it with what the same command prints with --debug."), FAULT


def plain(text: str) -> str:
    """Puts text on one line, cuts endless text, and shows control characters of terminals as escapes."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-290:]}"


def _system_error(error: BaseException) -> OSError | None:
    """Finds the operating system's error: the exception itself, or the cause of a failed write by PyTorch."""
    if isinstance(error, OSError):
        return error if error.strerror else None
    if isinstance(error, ValueError):  # a sentence of ours, whatever it was made from
        return None
    cause = error.__cause__ or error.__context__
    found = None if cause is None else _system_error(cause)
    return found if found is not None and found.errno in _DISK else None


def _without_worker(message: str) -> str:
    """Strips the traceback that PyTorch adds to the message of a failed loader process."""
    caught = _WORKER.match(message)
    if caught is None:
        return message
    # The last line of a traceback names the kind of error; what follows is its message.
    *_, said = re.split(rf"^(?:[\w.]+\.)?{caught[1]}(?:: |$)", message, flags=re.MULTILINE)
    return said


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or "Storage size calculation overflowed" in str(error):  # no machine has so much
        return True
    if "torch" not in sys.modules:
        return False
    from cfe_lightning.compute.memory import is_out_of_memory

    return is_out_of_memory(error)
