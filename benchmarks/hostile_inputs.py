"""Hands hostile images, tables, configs, checkpoints and folders to the commands and writes what they say of each.

    python benchmarks/hostile_inputs.py [--only TEXT] [--output docs/measured/hostile_inputs.md]

Every case runs the real command in a process of its own, with little memory and time. It fails if anything of the input
is executed, a file appears outside the output, a traceback is shown, the program calls itself at fault, or the command
succeeds although nothing of the input can be used.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
# Before torch is imported, because its own setting does not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

from hostile_case import Case, Place, write_base
from hostile_checkpoints import checkpoint_cases, output_cases
from hostile_configs import config_cases
from hostile_files import command_cases, frames_cases, image_cases, table_cases

from cfe_lightning.cli import evaluate, explain, train

COMMANDS = {"explain": explain.main, "train": train.main, "evaluate": evaluate.main}
SECONDS = 60
MEMORY = 4 << 30
#: What a command may write in its folder.
OUTPUTS = ("out", "checkpoints")


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: The case.
        code: The exit code; below zero the signal that ended the process.
        sentence: What the user reads.
        faults: What must not be; empty if all is well.
        seconds: How long it took.
    """

    case: Case
    code: int
    sentence: str
    faults: list[str]
    seconds: float


def all_cases() -> list[Case]:
    """Every case, by heading."""
    found = [*image_cases(), *frames_cases(), *table_cases(), *config_cases(), *command_cases()]
    found += [*checkpoint_cases(), *output_cases()]
    order = list(dict.fromkeys(case.kind for case in found))
    return sorted(found, key=lambda case: order.index(case.kind))


def run(case: Case, root: Path) -> Outcome:
    """Runs one case in a folder of its own below ``root``, which holds ``base``."""
    folder = Path(tempfile.mkdtemp(dir=root / "cases"))
    place = Place(here=folder / "here", base=root / "base")
    place.here.mkdir()
    arguments = case.prepare(place)
    before = set(_files(folder)) | set(_files(place.base))
    started = time.perf_counter()
    process = os.fork()
    if process == 0:
        _be_the_user(case, place, arguments)
    _, status = os.waitpid(process, 0)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    out, err = ((folder / name).read_text(errors="backslashreplace") for name in ("stdout", "stderr"))
    new = set(_files(folder)) | set(_files(place.base))
    sentence = _sentence(case, code, place, err)
    faults = list(_faults(case, code, sentence, out + err, place))
    written = [path for path, _ in new - before if not _allowed(path, place)]
    faults += [f"wrote {path.relative_to(root)}" for path in written[:3]]
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, code, _without_places(sentence, folder, root), faults, seconds)


def _be_the_user(case: Case, place: Place, arguments: list[str]) -> None:
    """What the child does: the real ``main`` from another folder; never returns."""
    code = 99
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(place.here.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
        os.chdir(place.here)
        sys.path.insert(0, str(place.here))  # as PYTHONPATH is, for those who bring a class of their own
        sys.argv = ["command"]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(SECONDS)
        try:
            code = COMMANDS[case.command](arguments)
        except SystemExit as end:  # of argparse
            code = end.code if isinstance(end.code, int) else 98
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 97
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            yield path, path.lstat().st_mtime_ns


def _allowed(path: Path, place: Place) -> bool:
    if path.parent == place.here.parent and path.name in ("stdout", "stderr"):
        return True
    within = path.is_relative_to(place.here)
    return within and (path.relative_to(place.here).parts[0] in OUTPUTS or "__pycache__" in path.parts)


def _sentence(case: Case, code: int, place: Place, err: str) -> str:
    """The last thing said; of a run that explained some images, what its manifest says of the first that failed."""
    said = [line for line in err.splitlines() if "error: " in line]
    if said:
        return said[-1].partition("error: ")[2]
    table = place.here / "out" / "manifest.csv"
    if code == explain.FAILED_ROWS and table.is_file():
        with table.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
            errors = [row["error"] for row in csv.DictReader(file) if row["error"]]
        if errors:
            return errors[0]
        verdicts = place.here / "out" / "verification.json"
        if verdicts.is_file():
            import json

            problems = json.loads(verdicts.read_text())["problems"]
            return "; ".join(next(iter(problems.values()), []))
    return ""


def _faults(case: Case, code: int, sentence: str, said: str, place: Place) -> Iterator[str]:
    if place.canary.exists():
        yield "something was executed"
    if "Traceback (most recent call last)" in said:
        yield "a traceback was shown"
    if code < 0 or code > 90:
        yield f"the process ended with {code}"
    if "fault of the program" in said:
        yield "the program calls itself at fault"
    if code == 0 and not case.harmless:
        yield "it succeeded"
    pages = [page.read_text(encoding="utf-8") for page in (place.here / "out").glob("*.html")]
    if any("<script>alert(1)" in page for page in pages):
        yield "a page would run a script"
    if code not in (0, 130) and not sentence:
        yield "no sentence"


def _without_places(sentence: str, folder: Path, root: Path) -> str:
    """The sentence without the machine's paths."""
    for path, name in ((folder / "here", "."), (folder, ".."), (root / "base", "base"), (root, "...")):
        sentence = sentence.replace(str(path), name)
    sentence = sentence.replace(str(Path(__file__).resolve().parents[1]), "<checkout>").replace("../../../base", "base")
    return re.sub(r"[A-Za-z/._-]*site-packages", "<packages>", sentence)


def write_table(outcomes: list[Outcome], path: Path) -> None:
    """Writes the list of cases with exit code and sentence as Markdown."""
    lines = [
        "# Hostile inputs",
        "",
        f"This page lists {len(outcomes)} broken, strange or hostile inputs of `train.py`, `explain.py` and "
        "`cfe-evaluate`, with the answer to each. `python benchmarks/hostile_inputs.py` writes it. Every case ran in "
        f"a process of its own with {MEMORY >> 30} GB of memory beyond what the program itself needs. "
        f"Nothing of any input was executed and nothing was written outside the output folder in "
        f"{sum(not outcome.faults for outcome in outcomes)} of {len(outcomes)} cases. Exit codes: 0 done (the input is "
        "strange, but nothing is wrong with it), 2 nothing could be done, 3 some rows failed or were not confirmed.",
    ]
    kind = None
    for outcome in outcomes:
        if outcome.case.kind != kind:
            kind = outcome.case.kind
            lines += ["", f"## {kind}", "", "| Input | Exit code | Sentence |", "|---|---|---|"]
        lines.append(f"| {_cell(outcome.case.name)} | {outcome.code} | {_cell(_short(outcome.sentence))} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _short(sentence: str, most: int = 400) -> str:
    return sentence if len(sentence) <= most else f"{sentence[: most - 80]} ... {sentence[-70:]}"


def _cell(text: str) -> str:
    for letter, escape in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`")):
        text = text.replace(letter, escape)
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "docs" / "measured" / "hostile_inputs.md"
    )
    options = parser.parse_args()
    cases = [case for case in all_cases() if options.only in f"{case.kind} {case.name}"]
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        (root / "cases").mkdir()
        _write_base_elsewhere(root / "base")
        for case in cases:
            outcome = run(case, root)
            outcomes.append(outcome)
            mark = f"FAILED ({'; '.join(outcome.faults)})" if outcome.faults else "ok"
            print(
                f"{outcome.seconds:5.1f} s  {outcome.code:3d}  {mark}  {case.kind}: {case.name}: {outcome.sentence}"[
                    :700
                ]
            )
    if not options.only:
        write_table(outcomes, options.output)
    bad = [outcome for outcome in outcomes if outcome.faults]
    print(f"{len(outcomes)} cases, {len(bad)} failed, {sum(outcome.seconds for outcome in outcomes):.0f} s")
    return 1 if bad else 0


def _write_base_elsewhere(base: Path) -> None:
    """In a process of its own, so that every case starts from the same fresh program."""
    base.mkdir()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            write_base(base)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert status == 0, "the good files could not be written"


if __name__ == "__main__":
    sys.exit(main())
