import csv
import json
import os
from pathlib import Path

import pytest

from cfe_lightning.explaining.folder import OutputFolder, Row, image_folder, part_file, summarise
from cfe_lightning.files.atomic import atomic_write

HEADER = {"checkpoint_sha256": "aa", "classes": ["cat", "dog"], "input": "/photos", "target": None}


def row(name: str, **changes: object) -> Row:
    done: Row = {
        **{"name": name, "source": [1, 2], "status": "ok", "predicted": "cat", "target": "dog", "note": None},
        **{"p_predicted_before": 0.9, "p_predicted_after": 0.2, "p_target_before": 0.1, "p_target_after": 0.8},
        **{"flipped": True, "flipped_saved": True, "l1": 0.02, "seconds": 0.5, "folder": image_folder(name)},
        **{"files": {"image": "image.png", "part_distinct": "part_distinct.png"}, "gains": {"distinct": 4.0}},
        **{"scores": {"change": 0.25}, "difference_scale": 0.3},
    }
    return done | changes


def failure(name: str) -> Row:
    return {"name": name, "source": [0, 0], "status": "failed", "error": "The file is empty."}


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    output = OutputFolder(tmp_path / "out")
    output.prepare(HEADER)
    return output


def test_plain_names_mirror_the_input_tree():
    assert image_folder("a/x.png") == "images/a/x.png"
    assert image_folder("scan 1/slice-007.tif") == "images/scan 1/slice-007.tif"


STRANGE = [
    *("A/x.png", "a/X.png", "a/x.PNG", "../x.png", "a/../../x.png", "..", "a/./x.png", "/etc/passwd.png", "con.png"),
    *("nul", "aux.txt.png", "x.png.", "x.png ", " x.png", "x\n.png", "x\0.png", 'x".png', "x<y>.png", "x:y.png"),
    *("a\\b.png", "%2e%2e%2fx.png", "ä.png", "a\N{COMBINING DIAERESIS}.png", "\udcff.png", "", "~.png", "n" * 300),
    *("d/" * 120 + "x.png", "D/" * 120 + "x.png", "Con/x.png", ".../x.png"),
]


@pytest.mark.parametrize("name", STRANGE)
def test_no_name_leaves_the_folder_or_breaks_a_file_system(name: str):
    path = image_folder(name)
    components = path.split("/")
    assert components[0] == "images"
    assert len(components) > 1
    assert len(path) <= 200
    for component in components:
        assert component not in ("", ".", "..")
        assert len(component) <= 120
        assert set(component) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-~ ")
        assert component.partition(".")[0].lower() not in ("con", "nul", "aux")
        assert component == component.strip(" ").rstrip(".")


def test_no_two_names_share_a_folder_even_where_case_is_ignored():
    names = [*STRANGE, "a/x.png", "x.png", "a/x.jpg", "x_.png", "x__.png"]
    folders = [image_folder(name).lower() for name in names]
    assert len(set(folders)) == len(names)
    # A folder of pictures never lies in another one.
    assert not any(a.startswith(b + "/") for a in folders for b in folders)


def test_part_files_are_safe_and_distinct():
    names = ["distinct", "style_0", "Style_0", "../x", "a/b", "a b", "a_b", ""]
    files = [part_file(name).lower() for name in names]
    assert files[0] == "part_distinct.png"
    assert len(set(files)) == len(names)
    assert not any("/" in file or ".." in file for file in files)


def test_rows_are_merged_by_name_in_the_order_of_the_input(folder: OutputFolder):
    folder.append(0, [row("b.png"), row("a.b/x.png")])
    folder.append(1, [row("a/x.png"), failure("c.png")])
    folder.append(1, [row("b.png", l1=0.5)])
    folder.merge()
    assert [(found["name"], found["status"]) for found in folder.rows()] == [
        ("a/x.png", "ok"),
        ("a.b/x.png", "ok"),
        ("b.png", "ok"),
        ("c.png", "failed"),
    ]
    assert next(found for found in folder.rows() if found["name"] == "b.png")["l1"] == 0.5
    assert sorted(os.listdir(folder.path)) == ["manifest.jsonl"]
    folder.append(0, [row("c.png")])
    folder.merge()
    assert [found["status"] for found in folder.rows()] == ["ok"] * 4


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
    assert [found["name"] for found in folder.rows()] == ["a.png"]
    folder.append(0, [row("b.png"), row("c.png")])
    folder.merge()
    assert [found["name"] for found in folder.rows()] == ["a.png", "b.png", "c.png"]


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
    (folder.path / ".manifest.csv.part").write_text("torn")
    folder.append(0, [row("a/x.png")])
    folder.merge()
    folder.write_table()
    folder.append(3, [row("b/y.png")])
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
    plain = table["=1+1.png"]
    assert plain["flipped"] == "true"
    assert plain["image"] == image_folder("=1+1.png") + "/image.png"
    assert (plain["part_distinct"], plain["gain_distinct"]) == (
        plain["image"].replace("image.", "part_distinct."),
        "4.0",
    )
    assert plain["score_change"] == "0.25"
    broken = table["\\udcff.png"]
    assert (broken["status"], broken["error"], broken["flipped"], broken["image"]) == (
        "failed",
        "The file is empty.",
        "",
        "",
    )


def test_flip_rates_have_wilson_intervals_and_leave_out_what_cannot_flip():
    rows = [row(f"{i}", flipped=i > 0, flipped_saved=i > 0) for i in range(10)]
    same = row("same", predicted="dog", flipped=None, flipped_saved=None, l1=0.9, note="already")
    summary = summarise([*rows, same, failure("x")])
    assert (summary["n_done"], summary["n_failed"], summary["n_already_target"]) == (11, 1, 1)
    # evaluation, section 3.1: 9 of 10 flipped.
    assert summary["flip_rate"]["value"] == 0.9
    assert summary["flip_rate"]["interval"] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert summary["l1"] == {"value": pytest.approx(0.02), "n": 10, "population": "all"}
    assert summary["delta_p"]["value"] == pytest.approx(0.7)
    assert "warning" not in summary


def test_flips_that_do_not_survive_saving_are_announced():
    rows = [row(f"{i}", flipped_saved=i > 0) for i in range(10)]
    assert summarise(rows)["flip_rate_saved"]["value"] == 0.9
    assert "smaller than one grey level" in summarise(rows)["warning"]


def test_what_cannot_be_computed_has_a_reason_and_no_number():
    summary = summarise([failure("x")])
    for key in ("flip_rate", "flip_rate_saved", "l1", "delta_p", "s_per_image"):
        assert "value" not in summary[key]
        assert summary[key]["undefined"]


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
    folder.append(0, [{"name": f"{index:04d}.png", "status": "failed", "error": "x"} for index in range(600)])
    folder.merge()
    closed = [json.loads(line)["end"] for line in folder.manifest_path.read_text().splitlines() if '"end"' in line]
    assert closed == [256, 256, 88]
    assert [row["name"] for row in folder.rows()] == [f"{index:04d}.png" for index in range(600)]
