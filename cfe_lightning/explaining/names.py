"""Names in the output folder of ``explain.py``: the files of every writer, and safe names for the files of an image."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

#: Pictures of an explanation besides its parts: keys of a row's ``files``, in the order of the table.
PICTURES = ("image", "counterfactual", "difference", "attribution", "steps", "motion")
#: Single files of the output folder; the manifest, the first of them, makes it recognisable as ours.
FILES = ("manifest.jsonl", "manifest.csv", "summary.json", "report.html", "verification.json")
#: Number of pairs in global.json that have pictures and examples; the page shows the same number.
MAX_PICTURED = 12

# Name of a file while it is being written.
_TORN = r"\..+\.part"
_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_ .-]*(?<![ .])")
# Names of devices, which Windows does not give to files.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
# Limits in characters: file systems take names of 255 bytes, and Windows whole paths of 260 characters.
_LONGEST_COMPONENT = 80
_LONGEST_FOLDER = 160


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """A folder of pictures inside the output folder, and the JSON file that describes them."""

    name: str
    pattern: str  # regular expression of the pictures' file names
    file: str = ""  # name of the JSON file; empty where the manifest describes the pictures
    schema: int = 1  # version of the JSON file's content that this package writes and reads

    def checked(self, address: str) -> str:
        """Returns the address of a picture; raises a ``ValueError`` for others, which must not reach the page."""
        if not re.fullmatch(f"{self.name}/({self.pattern})", address):
            raise ValueError(f"it names the picture {address!r}")
        return address

    def remove(self, output: Path) -> None:
        """Removes the JSON file and all pictures, whole or torn; files of other names stay, with their folders."""
        if self.file:
            (output / self.file).unlink(missing_ok=True)
        folder = output / self.name
        # A link leads out of the output folder.
        if folder.is_symlink():
            folder.unlink()
            return
        for directory, _, names in os.walk(folder, topdown=False):
            for name in names:
                if re.fullmatch(f"{self.pattern}|{_TORN}", name):
                    os.unlink(os.path.join(directory, name))
            if not os.listdir(directory):
                os.rmdir(directory)


IMAGES = PictureFolder("images", rf"({'|'.join(PICTURES)}|part_.+)\.png")
ATLAS = PictureFolder("atlas", r"\d+-\d+\.png", file="atlas.json")
OVERVIEW = PictureFolder("global", r"\d+-(change|strength)\.png", file="global.json")
PICTURE_FOLDERS = (IMAGES, ATLAS, OVERVIEW)


def image_folder(name: str) -> str:
    """Returns the folder of one image's pictures, relative to the output folder, unique on every file system.

    Names of lower-case letters, digits, ``_ . -`` and inner spaces are kept, so the input tree is mirrored. Any other
    name keeps its safe characters and ends in ``~`` and a hash of the whole name: ``A.PNG`` and ``a.png`` differ on
    file systems that ignore case, and no name can leave the folder.
    """
    components = name.split("/")
    if len(name) <= _LONGEST_FOLDER and all(map(_is_plain, components)):
        return f"images/{name}"
    path = "/".join(map(_safe, components))
    return f"images/{path if len(path) <= _LONGEST_FOLDER else f'long/{_safe(components[-1])[:40]}'}~{_hash(name)}"


def part_file(name: str) -> str:
    """Returns the file of a named part inside ``image_folder``."""
    return f"part_{name}.png" if _is_plain(name) else f"part_{_safe(name)[:40]}~{_hash(name)[:8]}.png"


def picture_file(key: str) -> str:
    """Returns the file of a picture inside ``image_folder``, by its key in a row's ``files``."""
    return f"{key}.png" if key in PICTURES else part_file(key.removeprefix("part_"))


def _is_plain(component: str) -> bool:
    fits = len(component) <= _LONGEST_COMPONENT
    return fits and bool(_PLAIN.fullmatch(component)) and not _RESERVED.fullmatch(component)


def _safe(component: str) -> str:
    """Replaces unsafe characters of a file name; two names may become the same."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", component)[:_LONGEST_COMPONENT].strip(".") or "_"
    return f"_{safe}" if _RESERVED.fullmatch(safe.lower()) else safe


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
