"""``explain.py``: explains every image of a folder with one checkpoint, or with a method that needs no training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfe_lightning.cli.environment import check_torchvision
from cfe_lightning.cli.guard import add_debug, guarded
from cfe_lightning.explaining.options import ExplainOptions
from cfe_lightning.files.arguments import add_options, options_of

if TYPE_CHECKING:
    from cfe_lightning.classifier import FrozenClassifier
    from cfe_lightning.explainer import ExplainerModule
    from cfe_lightning.explaining.folder import OutputFolder
    from cfe_lightning.explaining.run import ExplainRun

FAILED_ROWS = 3
_SHOWN_PROBLEMS = 20


def parser() -> argparse.ArgumentParser:
    """Builds the command line; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="explain.py",
        description="Explains every image below a folder: what would have to change for it to be another class? "
        "Writes manifest.csv, summary.json, report.html and images/. The same command again does what is missing.",
        epilog="Exit code: 0 every image was explained (every row confirmed), 1 fault of the program, 2 nothing could "
        "be done, 3 some images could not be read or explained, see the manifest (some rows not confirmed), "
        "128 + signal interrupted: 130 Ctrl-C, 143 SIGTERM.",
    )
    add_options(parser, ExplainOptions)
    add_debug(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given = parser().parse_args(arguments)
    return guarded(
        lambda: _explain(options_of(ExplainOptions, given)),
        debug=given.debug,
        kept=f"what is finished at --batch-size {given.batch_size} is kept in {given.verify or given.output}, "
        "the same command again does the rest",
    )


def _explain(options: ExplainOptions) -> int:
    check_torchvision()
    if options.verify is not None:
        return _verify(options.verify, options)
    from cfe_lightning.explaining.run import ExplainRun
    from cfe_lightning.images import can_save_video
    from cfe_lightning.images.medical import check_window

    # Before the explainer is loaded, which takes seconds.
    check_window(options.window)
    if options.animation == "mp4" and not can_save_video():
        raise ValueError("--animation mp4 needs the package av: pip install av, or choose webp or gif.")
    run = ExplainRun(options, _explainer(options))
    run.plan()
    run.explain()
    if not run.is_first:
        return 0
    return _finish(run) if run.shard is None else _finish_shard(run)


def _explainer(options: ExplainOptions) -> ExplainerModule:
    """Loads a trained method from its checkpoint, or builds one without training around a classifier."""
    from cfe_lightning.explainer import load_explainer
    from cfe_lightning.methods.find import build_untrained

    if options.checkpoint is not None:
        return load_explainer(options.checkpoint, options.trusted, dict(options.changes))
    classifier = _classifier(str(options.classifier), options.trusted)
    return build_untrained(str(options.method), classifier, dict(options.changes))


def _classifier(given: str, trusted: Sequence[str]) -> FrozenClassifier:
    """Loads a classifier file, or a network of torchvision; a file of that name comes first."""
    from cfe_lightning.classifier import load_classifier, torchvision_classifier
    from cfe_lightning.classifier.sources import is_torchvision_network

    if is_torchvision_network(given) and not Path(given).exists():
        return torchvision_classifier(given, weights="DEFAULT")
    return load_classifier(given, list(trusted))


def _finish(run: ExplainRun) -> int:
    from cfe_lightning.report.page import write_html

    summary = run.finish()
    report = write_html(run.output.path)
    sys.stdout.write(_table(summary, report) + _advice(run.explainer))
    if summary["n_done"] == 0:
        first = next(run.output.rows())
        raise ValueError(
            f"None of the {len(run.names)} images below {run.options.input} could be explained; {first.name!r} "
            f"failed with: {first.error}"
        )
    return FAILED_ROWS if summary["n_failed"] else 0


def _finish_shard(run: ExplainRun) -> int:
    """Prints what one shard has done; table and report are left to the run that merges them all."""
    assert run.shard is not None, "called for shards only"
    explained, failed = run.counts()
    sys.stdout.write(
        f"shard {run.shard.number} of {run.shard.total}: {explained} explained, {failed} failed; when all shards are "
        "through, the same command without --shard merges them and writes table and report\n" + _advice(run.explainer)
    )
    return FAILED_ROWS if failed else 0


def _advice(explainer: ExplainerModule) -> str:
    fits = explainer.back_off.at_once
    return "" if fits is None else f"memory was short: --batch-size {fits} saves the attempts in vain\n"


def _table(summary: dict[str, Any], report: Path) -> str:
    lines = [("explained", str(summary["n_done"])), ("failed", str(summary["n_failed"]))]
    for title, key in (("flip rate", "flip_rate"), ("flip rate, saved", "flip_rate_saved"), ("mean L1", "l1")):
        measured = summary[key]
        if "value" in measured:
            low, high = measured.get("interval", (None, None))
            interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            lines.append((title, f"{measured['value']:.4f}{interval}"))
    if "median" in summary["s_per_image"]:
        lines.append(("seconds per image", f"{summary['s_per_image']['median']:.3g}"))
    if "warning" in summary:
        lines.append(("warning", summary["warning"]))
    return "".join(f"{title:<18} {value}\n" for title, value in [*lines, ("report", str(report))])


def _verify(folder: Path, options: ExplainOptions) -> int:
    """Confirms the manifest of an earlier run; lists unconfirmed rows and keeps them in verification.json."""
    from tqdm import tqdm

    from cfe_lightning.explaining.folder import OutputFolder
    from cfe_lightning.explaining.verify import verify

    # Refuse unfinished folders.
    output = OutputFolder(folder)
    header = output.header()
    if header is None:
        raise FileNotFoundError(f"{folder} holds no manifest.jsonl: give the --output of explain.py.")
    if parts := output.parts():
        # Not merged here: a run that still writes would lose rows.
        raise ValueError(
            f"{folder} holds rows of a run or shard that has not finished ({parts[0].name}): let it finish, or "
            "give its command again without --shard, then --verify."
        )
    # Confirm row by row.
    classifier = _verifying_classifier(output, options)
    checked = verify(folder, classifier, header.get("num_slices", 1))
    verdicts = dict(tqdm(checked, desc="verifying", unit="image", disable=None))
    problems = {name: found for name, found in verdicts.items() if found}
    confirmed, fingerprint = len(verdicts) - len(problems), classifier.fingerprint()
    counts = {"checked": len(verdicts), "confirmed": confirmed, "classifier_fingerprint": fingerprint}
    output.write_verification({**counts, "problems": problems})
    # Print the first problems.
    for name, found in islice(problems.items(), _SHOWN_PROBLEMS):
        sys.stdout.write(f"{name}: {'; '.join(found)}\n")
    if len(problems) > _SHOWN_PROBLEMS:
        sys.stdout.write(f"... and {len(problems) - _SHOWN_PROBLEMS} more, see verification.json\n")
    sys.stdout.write(f"{confirmed} of {len(verdicts)} rows confirmed\n")
    return FAILED_ROWS if problems else 0


def _verifying_classifier(output: OutputFolder, options: ExplainOptions) -> FrozenClassifier:
    """Loads the classifier that an output folder is about, from where it was or where the options say.

    Raises:
        ValueError: If nothing says which classifier it was, or another one is given.
    """
    from cfe_lightning.explainer import load_explainer, sha256_of

    # Where the classifier is.
    summary, header = output.summary(), output.header() or {}
    checkpoint, classifier = options.checkpoint, options.classifier
    if checkpoint is None and classifier is None:
        checkpoint = Path(summary["checkpoint"]) if "checkpoint" in summary else None
        classifier = summary.get("classifier")
    # Load it.
    if checkpoint is not None:
        if "checkpoint_sha256" in header and sha256_of(checkpoint) != header["checkpoint_sha256"]:
            raise ValueError(f"{checkpoint} is not the checkpoint that made {output.path}: give that one.")
        found = load_explainer(checkpoint, options.trusted).classifier
    elif classifier is not None:
        found = _classifier(classifier, options.trusted)
    else:
        raise ValueError(f"{output.path} does not say which classifier it is about: give --checkpoint or --classifier.")
    # Is it the same?
    expected = summary.get("classifier_fingerprint", header.get("classifier_sha256"))
    if expected is not None and found.fingerprint() != expected:
        raise ValueError(
            f"{checkpoint or classifier} holds another classifier than the one that {output.path} is about: give "
            "that one with --checkpoint or --classifier."
        )
    return found
