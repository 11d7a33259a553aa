"""A survey is made once per checkpoint and settings, read ever after, and never in the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy import STYLEX, FixedToyExplainer, ToyData, toy_classifier, toy_trainer

from cfe_lightning import images
from cfe_lightning.cli import evaluate, explain
from cfe_lightning.explainer import load_explainer
from cfe_lightning.explaining.survey import provide_survey, survey_path
from cfe_lightning.methods.stylex import StylEx

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Trains a method that surveys, and returns its checkpoint and a folder of photos."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    trainer = toy_trainer(folder, max_epochs=1)
    trainer.fit(StylEx(toy_classifier(), **STYLEX), ToyData())
    trainer.save_checkpoint(folder / "best.ckpt")
    for index, image in enumerate(ToyData().dataset("test")):  # type: ignore[arg-type, var-annotated]
        if index < 4:
            images.save_image(image["image"], folder / "photos" / f"{index}.png")
    return folder / "best.ckpt", folder / "photos"


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Explains the photos with a copy of the checkpoint; returns the number of searches for directions."""
    searches: list[int] = []
    search = StylEx.search

    def counted(self: StylEx, *arguments: Any, **options: Any) -> Any:
        searches.append(1)
        return search(self, *arguments, **options)

    # A checkpoint of its own, with no survey beside it.
    monkeypatch.setattr(StylEx, "search", counted)
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(trained[0].read_bytes())

    def once(out: str, *more: str) -> int:
        searches.clear()
        arguments = ["--checkpoint", str(checkpoint), "--input", str(trained[1]), "--output", str(tmp_path / out)]
        assert explain.main([*arguments, "--accelerator", "cpu", "--trusted", "toy", *more]) == 0
        return len(searches)

    return once


def manifest(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()[1:]]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows if "name" in row]


def test_directions_are_searched_once(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("first") == 1
    assert "StylEx searches what moves the classifier as a whole, once" in capsys.readouterr().err
    kept = survey_path(tmp_path / "best.ckpt")
    assert kept.name == "best.survey.pt"
    assert {"made_from", "survey"} == torch.load(kept, weights_only=True).keys()
    before = kept.stat().st_mtime_ns
    assert run("second") == 0
    assert "searches" not in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before
    assert manifest(tmp_path / "first") == manifest(tmp_path / "second")
    assert (tmp_path / "second" / "atlas.json").read_text() == (tmp_path / "first" / "atlas.json").read_text()


def test_evaluating_reads_what_explaining_has_kept(run: Any, tmp_path: Path) -> None:
    assert run("first") == 1
    explainer = load_explainer(tmp_path / "best.ckpt", ["toy"])
    explainer.search = lambda *_, **__: pytest.fail("searched again")  # type: ignore[method-assign, assignment]
    provide_survey(explainer, tmp_path / "best.ckpt")
    assert explainer.explain(ToyData().dataset("test")[0]["image"][None]).flipped is not None
    config = {"data": {"class_path": "toy.ToyData", "init_args": {}}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    paths = {"checkpoint": "best.ckpt", "data": "toy.yaml", "output": "table"}
    arguments = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    before = survey_path(tmp_path / "best.ckpt").stat().st_mtime_ns
    assert evaluate.main([*arguments, "--device", "cpu", "--trusted", "toy", "--limit", "4"]) == 0
    assert survey_path(tmp_path / "best.ckpt").stat().st_mtime_ns == before


def test_other_settings_or_another_checkpoint_search_anew(run: Any, tmp_path: Path) -> None:
    assert run("first") == 1
    assert run("stronger", "--set", "degree=30.0") == 1
    checkpoint = tmp_path / "best.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["epoch"] = 7
    torch.save(content, checkpoint)
    assert run("later", "--set", "degree=30.0") == 1


@pytest.mark.parametrize("content", [b"", b"no survey", None])
def test_a_broken_survey_is_made_again(content: bytes | None, run: Any, tmp_path: Path) -> None:
    kept = survey_path(tmp_path / "best.ckpt")
    if content is None:
        torch.save([1, 2], kept)
    else:
        kept.write_bytes(content)
    assert run("out") == 1
    assert run("again") == 0


@pytest.mark.parametrize("survey", [None, 5, [1], {}, {"styles": 3}])
def test_a_survey_of_another_form_is_made_again(survey: Any, run: Any, tmp_path: Path) -> None:
    assert run("out") == 1
    kept = survey_path(tmp_path / "best.ckpt")
    good = torch.load(kept, weights_only=True)
    torch.save({"made_from": good["made_from"], **({} if survey is None else {"survey": survey})}, kept)
    assert run("again") == 1
    assert torch.load(kept, weights_only=True)["survey"].keys() == good["survey"].keys()
    assert run("third") == 0


class Surveying(FixedToyExplainer):
    """Finds out a number, and lets something happen meanwhile."""

    found: Any = None
    meanwhile: Any = None

    def survey(self) -> dict[str, Any]:
        self.meanwhile()
        return self.found

    def adopt(self, survey: dict[str, Any]) -> None:
        self.found = {"number": survey["number"] + 0}


@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("links", [True, False])
def test_shards_that_begin_together_use_the_survey_that_was_there_first(
    links: bool, stale: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"weights")
    if stale:
        torch.save({"made_from": "something else", "survey": {}}, survey_path(checkpoint))
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    first, second = Surveying(toy_classifier()), Surveying(toy_classifier())
    first.found, second.found = {"number": 1}, {"number": 2}
    first.meanwhile = lambda: None
    second.meanwhile = lambda: provide_survey(first, checkpoint)
    provide_survey(second, checkpoint)
    assert first.found == second.found == {"number": 1}
    assert torch.load(survey_path(checkpoint), weights_only=True)["survey"] == {"number": 1}
    assert list(tmp_path.glob(".*")) == []


def test_a_folder_that_cannot_be_written_costs_a_warning(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    survey_path(tmp_path / "best.ckpt").mkdir()  # in the way of the file, for root as well
    with caplog.at_level(logging.WARNING, "cfe_lightning"):
        assert run("out") == 1
    assert "could not be kept" in caplog.text
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_survey_executes_nothing(run: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"made_from": Trap(), "survey": {}}, survey_path(tmp_path / "best.ckpt"))
    assert run("out") == 1
    assert not (tmp_path / "executed").exists()
