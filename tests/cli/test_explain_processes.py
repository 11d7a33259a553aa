"""The real command in processes of its own: killed, and divided among two."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import toy
from cases import pooled_classifier

from cfe_lightning import images
from cfe_lightning.methods.stylex import StylEx

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 60

# Importing torch takes seconds, so one process does it and forks itself for every run that is to be killed.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import toy, cfe_lightning.explaining.writer, cfe_lightning.data.stream, cfe_lightning.report.page
from cfe_lightning.cli.explain import main

arguments, out, batches = sys.argv[2:], Path(sys.argv[1]), 0
for kill_after in (1, 7, 5, None):
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    part = out / "manifest.0.jsonl"
    while kill_after is not None and (not part.exists() or part.read_bytes().count(b'"end"') < kill_after):
        time.sleep(0.001)
    if kill_after is not None:
        time.sleep(random.Random(kill_after).random() / 50)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    for index, image in enumerate(toy.toy_images(NUM_IMAGES, 3)):
        images.save_image(image, folder / "photos" / f"{index % 3}" / f"{index:02d}.png")
    (folder / "photos" / "1" / "broken.png").write_bytes(b"broken")
    checkpoint = toy.toy_checkpoint(folder / "best.ckpt", num_classes=3)
    where = ["--checkpoint", str(checkpoint), "--input", str(folder / "photos")]
    return [*where, "--trusted", "toy", "--accelerator", "cpu", "--batch-size", "2"]


def execute(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def content(out: Path) -> dict[str, Any]:
    with (out / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    pictures = [path for path in (out / "images").rglob("*") if path.is_file()]
    files = {str(path.relative_to(out)): path.read_bytes() for path in pictures}
    return {"rows": rows, **files}


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes leave behind that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = execute("explain.py", *inputs, "--output", str(out), "--devices", "2")
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        *("global", "global.json", "images", "manifest.csv", "manifest.jsonl", "report.html", "summary.json"),
    ]
    return content(out)


def test_two_processes_write_every_name_once(whole: dict[str, Any]):
    names = [row["name"] for row in whole["rows"]]
    assert len(names) == len(set(names)) == NUM_IMAGES + 1
    assert [row["name"] for row in whole["rows"] if row["status"] == "failed"] == ["1/broken.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_three_times_the_command_ends_as_if_nothing_had_happened(
    inputs: list[str], whole: dict[str, Any], tmp_path: Path
):
    out = tmp_path / "out"
    done = execute("-c", KILLER, str(out), *inputs, "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["9", "9", "9"]
    assert done.stdout.split()[-1] == "-3"
    assert content(out) == whole


def saved_stylex(folder: Path) -> Path:
    """A checkpoint of an untrained StylEx that can search directions, one of which depends on chance."""
    torch.manual_seed(0)
    # The released code draws new noise for every picture.
    explainer = StylEx(pooled_classifier(3), **toy.STYLEX, profile="paper_code").eval()
    with torch.no_grad():
        image = toy.toy_images(12, 3)
        explainer.reference.collect(explainer.encode(image), explainer.classifier(image), None)
        explainer.reference.keep(lambda mine: mine)
    return toy.save_checkpoint(explainer, folder / "best.ckpt")


def written_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_chance_and_a_survey_are_the_same_for_one_and_two_processes(tmp_path: Path):
    photos = tmp_path / "photos"
    for index, image in enumerate(toy.toy_images(11, 3)):
        images.save_image(image, photos / f"{index:02d}.png")
    pooled_classifier(3).save(tmp_path / "classifier.pt")
    common = ["--input", str(photos), "--accelerator", "cpu", "--batch-size", "2", "--trusted", "toy"]
    drawn = ["--method", "gradient_shap", "--classifier", str(tmp_path / "classifier.pt")]
    groups = []
    for method in ("stylex", "drawn"):
        for devices in (1, 2):
            folder = tmp_path / f"{method}{devices}"
            folder.mkdir()
            how = ["--checkpoint", str(saved_stylex(folder))] if method == "stylex" else drawn
            arguments = [*how, *common, "--output", "out", "--devices", str(devices)]
            groups.append(forked.Run(folder=str(folder), devices=devices, arguments=arguments))
    forked.execute("cfe_lightning.cli.explain", [groups[:2], groups[2:]])
    for method in ("stylex", "drawn"):
        one, two = tmp_path / f"{method}1", tmp_path / f"{method}2"
        assert (one / "out" / "report.html").is_file(), (one / "0.log").read_text()
        assert content(one / "out") == content(two / "out")
        # Nothing is left of the second process's own rows; table, survey and report are there once.
        assert written_under(one).keys() == written_under(two).keys() - {"1.log"}
        # Who makes the survey says so, and who writes the report.
        assert "report" in (two / "0.log").read_text()
        assert "report" not in (two / "1.log").read_text()
    searched = [(tmp_path / "stylex2" / f"{rank}.log").read_text().count("searches") for rank in (0, 1)]
    assert searched == [1, 0]
    assert (tmp_path / "stylex2" / "best.survey.pt").is_file()
