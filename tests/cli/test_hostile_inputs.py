"""A few inputs of ``benchmarks/hostile_inputs.py``: refused in a sentence, nothing executed, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_case import Case, Place, write_base
from hostile_checkpoints import checkpoint_cases, output_cases
from hostile_configs import config_cases
from hostile_files import command_cases

from cfe_lightning.cli import evaluate, explain, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "explain": explain.main,
    "train": train.main,
    "evaluate": evaluate.main,
}
#: One of every kind of door, with a part of the sentence.
CHOSEN = {
    "explainer: a payload beside the rest": "holds more than plain data and tensors",
    "explainer: a newer version": "newer than this",
    "explainer: billion laughs": "refer to one another",
    "explainer: weights of 4 TB in a few bytes": "claims a tensor",
    "explainer: a tensor that grows while it is read": "not an array of numbers",
    "explainer: an archive that unpacks to 100 MB": "it unpacks to",
    "explainer: DXAI with 10^9 branches": "asks for a network of more than",
    "explainer: its classifier has a class of a module beside it": "--trusted evil",
    "classifier: a width of 10^5": "asks for a network of more than",
    "classifier: weights of torchvision from the internet": "which would download",
    "explainer: its classifier has weights of torchvision from the internet": "which would download",
    "classifier: images of 10^9 pixels a side": "not between 1 and",
    "classifier: an explainer's checkpoint": "it is the checkpoint of an explainer",
    "resumed: another method": "but this config trains toy.ToyExplainer",
    "resumed: without optimizer_states": "optimizer_states): give the last.ckpt",
    "resumed: random states of another form": "cannot be resumed, a part of it is not what train.py wrote",
    "resumed: checkpoints of others to be removed": "callbacks): give the last.ckpt",
    "resumed: checkpoints to be removed by a protocol": "callbacks): give the last.ckpt",
    "resumed: arguments that are a list": "hyper_parameters): give the last.ckpt",
    "resumed: weights by number": "state_dict): give the last.ckpt",
    "resumed: averaged weights that are a list": "state_dict): give the last.ckpt",
    "evaluate with billion laughs": "repeat so much",
    "train with a tab": "indented by blanks",
    "evaluate with a name twice": "is there twice, in line 1, column 1 and in line 2",
    "tag python/object/apply": "is no plain value",
    "callback of a module beside it": "add --trusted evil",
    "torch.os.system as a function": "nothing of it is needed here",
    "wrap_classifier of a module beside it": "--trusted evil",
    "load_classifier that trusts a module beside it": "--trusted evil",
    "an exported program": "--trusted exported_program",
    "the network of a classifier that is trained": "--trusted evil",
    "data of a module beside it": "add --trusted evil",
    "a checkpoint called ../../x": "is a path, but a name is needed",
    "train.py with a run that leaves the folder": "is no name of a folder",
    "explain.py with an argument that is a bomb": "takes",
    "verified: a picture out of the folder": "",
    "verified: a manifest that is torn": "rows are lost",
    "verified: a curve of another form": "holds a line that explain.py did not write",
    "verified: a row that is a number": "holds a line that explain.py did not write",
    "gone on with: pictures that lie elsewhere": "is a link, so results would be written elsewhere",
    "evaluated into: table.md is a link": "out/table.md is a link, so results would be written elsewhere",
    "evaluated into: unfinished/000000 is a link": "out/unfinished/000000 is a link, so results would be written",
    "trained into: samples is a link": "checkpoints/run/samples is a link, so results would be written elsewhere",
}


def cases() -> Iterator[object]:
    for case in (*config_cases(), *command_cases(), *checkpoint_cases(), *output_cases()):
        if case.name in CHOSEN:
            yield pytest.param(case, id=f"{case.command}, {case.name}")


def test_all_that_are_chosen_exist() -> None:
    assert {case.values[0].name for case in cases()} == CHOSEN.keys()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "base"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command"])
        write_base(folder)
    return folder


@pytest.mark.parametrize("case", cases())
def test_a_hostile_input_is_refused(
    case: Case, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(here=base.parent / "cases" / tmp_path.name / "here", base=base)
    place.here.mkdir(parents=True)
    monkeypatch.chdir(place.here)
    monkeypatch.syspath_prepend(str(place.here))
    monkeypatch.setattr(sys, "argv", ["command"])
    arguments = case.prepare(place)
    before = files(place)
    capsys.readouterr()
    code = COMMANDS[case.command](arguments)
    printed, said = capsys.readouterr()
    assert code == (explain.FAILED_ROWS if "a picture out" in case.name else 2)
    assert "Traceback" not in said + printed
    assert "fault of the program" not in said
    assert CHOSEN[case.name] in said
    assert not place.canary.exists()
    assert "evil" not in sys.modules
    assert files(place) == before


def files(place: Place) -> set[Path]:
    """All there is beside what a command may write."""
    found = place.here.parent.rglob("*")
    return {path for path in found if not {"out", "checkpoints"} & set(path.relative_to(place.here.parent).parts)}
