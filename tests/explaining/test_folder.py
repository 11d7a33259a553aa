import csv
import json
import os
from pathlib import Path

import pytest
from explained import failure, row

from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.names import image_folder
from cfe_lightning.files.atomic import atomic_write

HEADER = {"checkpoint_sha256": "aa", "classes": ["cat", "dog"], "input": "/photos", "target": None}


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    output = OutputFolder(tmp_path / "out")
    output.prepare(HEADER)
    return output


def test_rows_are_merged_by_name_in_the_order_of_the_input(folder: OutputFolder):
    folder.append(0, [row("b.png"), row("a.b/x.png")])
    folder.append(1, [row("a/x.png"), failure("c.png")])
    folder.append(1, [row("b.png", l1=0.5)])
    folder.merge()
    assert [(found.name, found.status) for found in folder.rows()] == [
        ("a/x.png", "ok"),
        ("a.b/x.png", "ok"),
        ("b.png", "ok"),
        ("c.png", "failed"),
    ]
    assert next(found for found in folder.rows() if found.name == "b.png").l1 == 0.5
    assert sorted(os.listdir(folder.path)) == ["manifest.jsonl"]
    folder.append(0, [row("c.png")])
    folder.merge()
    assert [found.status for found in folder.rows()] == ["ok"] * 4


@pytest.mark.parametrize("kept", [1, 30, 400, 700, 900])
def test_a_torn_batch_counts_as_not_done(folder: OutputFolder, kept: int):
    folder.append(0, [row("a.png")])
    path = folder.path / "manifest.0.jsonl"
    whole = path.read_bytes()
    folder.append(0, [row("b.png"), row("c.png")])
    torn = path.read_bytes()[: len(whole) + kept]
    assert len(torn) == len(whole) + kept
    path.write_bytes(torn)
    folder.prepare(HEADER)
    assert [found.name for found in folder.rows()] == ["a.png"]
    folder.append(0, [row("b.png"), row("c.png")])
    folder.merge()
    assert [found.name for found in folder.rows()] == ["a.png", "b.png", "c.png"]


def test_another_run_is_refused_naming_what_differs(folder: OutputFolder):
    folder.prepare(HEADER)
    with pytest.raises(ValueError, match=r"made otherwise \(target was 'None' and is now 'dog'\).*--overwrite"):
        folder.prepare(HEADER | {"target": "dog"})
    with pytest.raises(ValueError, match=r"checkpoint_sha256 was 'aa' and is now 'bb', input was '/photos'"):
        folder.prepare(HEADER | {"checkpoint_sha256": "bb", "input": "/other"})


def test_overwriting_removes_what_runs_wrote_and_nothing_else(folder: OutputFolder):
    written = folder.path / "images" / "a" / "x.png"
    written.mkdir(parents=True)
    for name in ("image.png", "part_distinct.png", ".image.png.77.part", "mine.txt"):
        (written / name).write_bytes(b"x")
    other = folder.path / "images" / "b" / "y.png"
    other.mkdir(parents=True)
    (other / "steps.png").write_bytes(b"x")
    (folder.path / "notes.md").write_text("mine")

    # A finished run and one in progress.
    (folder.path / ".manifest.csv.part").write_text("torn")
    folder.append(0, [row("a/x.png")])
    folder.merge()
    folder.write_table()
    folder.append(3, [row("b/y.png")])

    # Start again.
    folder.prepare(HEADER | {"target": "dog"}, overwrite=True)
    assert list(folder.rows()) == []
    header = folder.header()
    assert header is not None
    assert header["target"] == "dog"
    left = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())
    assert left == ["images/a/x.png/mine.txt", "manifest.jsonl", "notes.md"]


@pytest.mark.parametrize("name", ["manifest.csv", "images", "report.html", "manifest.jsonl"])
def test_files_of_others_are_never_touched(tmp_path: Path, name: str):
    (tmp_path / name).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"holds {name} that no run of explain.py left there: give another --out"):
            OutputFolder(tmp_path).prepare(HEADER, overwrite)
    assert (tmp_path / name).read_text() == "precious"
    with pytest.raises(ValueError, match="is a file: give a folder"):
        OutputFolder(tmp_path / name).prepare(HEADER)


def test_the_table_survives_any_name(folder: OutputFolder):
    names = ['quote".png', "line\nbreak\r.png", "comma,;.png", "=1+1.png", "\u2028.png", " space .png"]
    folder.append(0, [*(row(name) for name in names), failure("\udcff.png")])
    folder.merge()
    folder.write_table()
    with (folder.path / "manifest.csv").open(newline="", encoding="utf-8") as file:
        table = {line["name"]: line for line in csv.DictReader(file)}
    assert set(table) == {*names, "\\udcff.png"}

    # Explained.
    plain = table["=1+1.png"]
    assert plain["flipped"] == "true"
    assert plain["image"] == image_folder("=1+1.png") + "/image.png"
    assert (plain["part_distinct"], plain["gain_distinct"]) == (
        plain["image"].replace("image.", "part_distinct."),
        "4.0",
    )
    assert plain["score_change"] == "0.25"

    # Failed.
    broken = table["\\udcff.png"]
    assert (broken["status"], broken["error"], broken["flipped"], broken["image"]) == (
        "failed",
        "The file is empty.",
        "",
        "",
    )


def test_the_summary_tells_run_facts_and_statistics(folder: OutputFolder):
    folder.append(0, [row("a.png")])
    folder.merge()
    folder.write_summary(n_planned=3, device="cpu")
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["checkpoint_sha256"] == "aa"
    assert (summary["n_planned"], summary["n_done"], summary["device"]) == (3, 1, "cpu")


@pytest.mark.parametrize(("name", "file"), [("images", "image.png"), ("atlas", "0-1.png"), ("global", "0-change.png")])
def test_overwriting_removes_a_link_and_nothing_of_what_it_leads_to(folder: OutputFolder, name: str, file: str):
    outside = folder.path.parent / "outside"
    outside.mkdir()
    (outside / file).write_bytes(b"precious")
    (folder.path / name).symlink_to(outside)
    folder.prepare(HEADER, overwrite=True)
    assert not os.path.lexists(folder.path / name)
    assert (outside / file).read_bytes() == b"precious"


def test_a_file_that_could_not_be_finished_leaves_the_earlier_one(tmp_path: Path):
    def stopped() -> None:
        with atomic_write(tmp_path / "x.txt") as file:
            file.write("half")
            raise KeyboardInterrupt

    with atomic_write(tmp_path / "x.txt") as file:
        file.write("whole \udcff\n")
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / "x.txt").read_bytes() == b"whole \\udcff\n"


def test_parts_are_removed_once_the_disk_has_their_rows(folder: OutputFolder, monkeypatch: pytest.MonkeyPatch):
    folder.append(0, [row("a.png")])
    synced = []

    def fsync(number: int) -> None:
        synced.append((os.fstat(number).st_size, len(list(folder.path.glob("manifest.0*.jsonl")))))

    monkeypatch.setattr(os, "fsync", fsync)
    folder.merge()
    assert synced == [(folder.manifest_path.stat().st_size, 1)]
    assert not list(folder.path.glob("manifest.0*.jsonl"))


def test_merged_rows_are_closed_in_parts_so_that_readers_hold_few(tmp_path: Path):
    folder = OutputFolder(tmp_path)
    folder.prepare({"classes": []})
    folder.append(0, [failure(f"{index:04d}.png") for index in range(600)])
    folder.merge()
    closed = [json.loads(line)["end"] for line in folder.manifest_path.read_text().splitlines() if '"end"' in line]
    assert closed == [256, 256, 88]
    assert [row.name for row in folder.rows()] == [f"{index:04d}.png" for index in range(600)]
