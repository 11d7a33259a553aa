"""explain.py on files that break programs, and killed at random moments.

    python benchmarks/robustness.py --checkpoint checkpoints/dxai_synthetic/best.ckpt [--files 200] [--kills 3]

Writes a hostile folder (truncated, wrongly named, CMYK, 16-bit, palette, animated, 1x1, 20000x1, rotated, empty files,
symlink loops, names with quotes, newlines and markup) to a temporary place, explains it once without a disturbance, and
once more with SIGKILL at random moments, and compares what is left. Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hostile import write_hostile_folder  # noqa: E402


def content(out: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """The manifest without seconds, and every picture."""
    with (out / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    pictures = [path for path in (out / "images").rglob("*") if path.is_file()]
    return rows, {str(path.relative_to(out)): path.read_bytes() for path in pictures}


def _kept(out: Path) -> set[str]:
    """Names of the rows in the journals of an output folder; the last line of one may be cut off."""
    names = set()
    for journal in out.glob("manifest*.jsonl"):
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                names.add(json.loads(line).get("name"))
            except json.JSONDecodeError:
                continue
    return names - {None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        good, bad = write_hostile_folder(folder / "in", options.files)

        def command(out: Path) -> list[str]:
            where = ("--checkpoint", options.checkpoint, "--input", str(folder / "in"), "--output", str(out))
            return [sys.executable, str(ROOT / "explain.py"), *where, "--batch-size", "2"]

        def start(out: Path) -> subprocess.Popen[bytes]:
            return subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        begin = time.perf_counter()
        code = start(folder / "whole").wait()
        seconds = time.perf_counter() - begin
        rows, pictures = content(folder / "whole")
        states = collections.Counter(row["status"] for row in rows)
        print(f"{len(good) + len(bad)} files, {len(good)} readable: {dict(states)}, exit code {code}, {seconds:.1f} s")
        # A table in UTF-8 spells bytes that are no text.
        wanted = {name.encode("utf-8", "backslashreplace").decode() for name in good | bad}
        given = sorted(row["name"] for row in rows)
        complete = given == sorted(wanted)
        print("every name has one row" if complete else f"NAMES DIFFER: {set(given) ^ wanted}")

        for _ in range(options.kills):
            before = _kept(folder / "killed")
            process = start(folder / "killed")
            # Importing takes most of the time: the clock starts with the first new rows.
            while process.poll() is None and len(_kept(folder / "killed")) <= len(before):
                time.sleep(0.01)
            moment = draw.uniform(0, 1.5)
            time.sleep(moment)
            alive = process.poll() is None
            process.kill()
            process.wait()
            kept = len(_kept(folder / "killed"))
            print(f"killed {moment:.2f} s after its first rows ({'running' if alive else 'DONE'}), {kept} rows kept")
        code = start(folder / "killed").wait()
        same = content(folder / "killed") == (rows, pictures)
        print(f"run to the end, exit code {code}: {'identical' if same else 'DIFFERENT'} to the undisturbed run")
    return 0 if complete and same else 1


if __name__ == "__main__":
    sys.exit(main())
