"""Names in the output folder: safe ones for every image, and the pictures that a writer owns."""

from pathlib import Path

import pytest

from cfe_lightning.explaining.names import ATLAS, IMAGES, OVERVIEW, image_folder, part_file, picture_file


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


def test_pictures_have_the_names_of_their_keys():
    assert [picture_file(key) for key in ("image", "motion")] == ["image.png", "motion.png"]
    assert picture_file("part_a/b") == part_file("a/b")


def test_only_a_writers_own_pictures_become_addresses():
    assert ATLAS.checked("atlas/0-12.png") == "atlas/0-12.png"
    assert OVERVIEW.checked("global/3-strength.png") == "global/3-strength.png"
    for address in ("atlas/0.png", "global/0-1.png", "../atlas/0-1.png", "atlas/0-1.png\n", "atlas/.0-1.png.7.part"):
        with pytest.raises(ValueError, match="it names the picture"):
            ATLAS.checked(address)


def test_a_writers_files_are_removed_and_those_of_others_stay(tmp_path: Path):
    mine, torn, others = "images/a/b.png/steps.png", "images/a/c.png/.image.png.7.part", "images/a/b.png/notes.txt"
    for name in (mine, torn, others, "atlas.json", "atlas/0-1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    IMAGES.remove(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["atlas.json", "atlas/0-1.png", others]
    assert not (tmp_path / "images" / "a" / "c.png").exists(), "empty folders go, too"
    ATLAS.remove(tmp_path)
    OVERVIEW.remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
