"""Files appear whole or not at all, and never through a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from cfe_lightning.files.atomic import atomic_path, atomic_write, refuse_links


def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("of the user")
    (tmp_path / ".table.md.part").symlink_to(tmp_path / "notes")
    with atomic_write(tmp_path / "table.md") as file:
        file.write("new")
    assert (tmp_path / "notes").read_text() == "of the user"
    assert (tmp_path / "table.md").read_text() == "new"
    assert not (tmp_path / "table.md").is_symlink()


def test_a_folder_in_the_place_of_the_unfinished_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".table.md.part").mkdir()
    with pytest.raises(OSError, match=r"table.md'$"), atomic_path(tmp_path / "table.md"):
        pass


def test_what_is_interrupted_leaves_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("old")

    def interrupted() -> None:
        with atomic_write(tmp_path / "table.md") as file:
            file.write("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "old"


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "\u00e4" * 125 + ".png"])
def test_names_as_long_as_any_work(name: str, tmp_path: Path) -> None:
    with atomic_path(tmp_path / name, owner="123") as temporary:
        temporary.write_text("new")
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".123.part")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_in_an_output_folder_are_refused(tmp_path: Path) -> None:
    refuse_links(tmp_path / "not there")
    (tmp_path / "file").touch()
    refuse_links(tmp_path)
    (tmp_path / "table.md").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"table.md is a link, so results would be written elsewhere: remove it, or"):
        refuse_links(tmp_path)
