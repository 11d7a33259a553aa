"""Hostile images, tables and command lines."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from hostile import broken, encoded, readable, strange_names
from hostile_case import Case, Place, Prepare, as_yaml, picture


def image_cases() -> Iterator[Case]:
    """One picture each, the only one in its folder; and names, beside good pictures."""
    for name, content in _broken_pictures().items():
        yield Case(name, "Images", "explain", _only(name.replace(" ", "_"), content))
    for name, content in readable(0).items():
        yield Case(f"strange but readable: {name}", "Images", "explain", _only(name, content), harmless=True)
    for name in strange_names():
        shown = ascii(name)[1:-1] if len(name) < 60 else f"{ascii(name)[1:20]}... ({len(name)} letters)"
        yield Case(f"file name {shown}", "File names", "explain", _only(name, png()), harmless=True)


def _only(name: str, content: bytes) -> Prepare:
    def prepare(place: Place) -> list[str]:
        place.write(f"in/{name}", content)
        return place.explain(photos="in")

    return prepare


def png(**options: object) -> bytes:
    return encoded(picture(), "PNG", **options)


def _broken_pictures() -> dict[str, bytes]:
    found = {f"broken {name}": content for name, content in broken().items()}
    whole = {
        "png": png(),
        "jpg": encoded(picture(), "JPEG"),
        "gif": encoded(picture("P"), "GIF"),
        "bmp": encoded(picture(), "BMP"),
        "tif": encoded(picture(), "TIFF"),
        "webp": encoded(picture(), "WEBP"),
        "pgm": encoded(picture("L"), "PPM"),
    }
    for ending, content in whole.items():
        found[f"first 8 bytes.{ending}"] = content[:8]
        found[f"cut in the header.{ending}"] = content[:14]
        found[f"first byte missing.{ending}"] = content[1:]
        found[f"signature overwritten.{ending}"] = b"XXXXXXXX" + content[8:]
    found |= {
        "header of 60000 x 60000.png": _png_of(60_000, 60_000),
        "header of 2^31 - 1 x 1.png": _png_of(2**31 - 1, 1),
        "header of 0 x 0.png": _png_of(0, 0),
        "header of 65535 x 65535.gif": whole["gif"][:6] + struct.pack("<HH", 65535, 65535) + whole["gif"][10:],
        "header of 100000 x 100000.bmp": whole["bmp"][:18] + struct.pack("<ii", 100_000, 100_000) + whole["bmp"][26:],
        "header of -1 x 100000.bmp": whole["bmp"][:18] + struct.pack("<ii", -1, 100_000) + whole["bmp"][26:],
        "header of 99999 x 99999.pgm": b"P5\n99999 99999\n255\n" + b"\0" * 100,
        "header of 10^30 columns.pgm": b"P5\n" + b"9" * 30 + b" 5\n255\n",
        "header without end.pgm": b"P5\n" + b"#" * 100_000,
        "header of 16384 x 16384.webp": _webp_of(16_383, 16_383),
        "text chunk that unpacks to 20 MB.png": _with_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 20_000_000, 9)),
        "iTXt that unpacks to 20 MB.png": _with_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"0" * 20_000_000, 9)),
        "colour profile that unpacks to 20 MB.png": _with_chunk(
            b"iCCP", b"a\0\0" + zlib.compress(b"0" * 20_000_000, 9)
        ),
        "many text chunks of 1 MB.png": png()[:33]
        + _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"0" * 1_000_000, 9)) * 100
        + png()[33:],
        "a chunk of 4 GB announced.png": png()[:33] + b"\xff\xff\xff\xffIDAT" + b"\0" * 50,
        "a wrong checksum.png": png()[:40] + bytes([png()[40] ^ 255]) + png()[41:],
        "tiff whose pages refer to themselves.tif": _looping_tiff(),
        "tiff of 10^9 columns.tif": _tiff_of(10**9, 10**9),
        "tiff strips beyond the file.tif": _tiff_of(20, 16),
        "gzip.png": gzip.compress(b"\0" * 1_000_000),
        "zip.png": b"PK\x03\x04" + b"\0" * 100,
        "pdf.png": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "svg with a script.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "postscript that runs a program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
        b"(%pipe%touch ../canary) run\n",
        "pickle.png": b"cos\nsystem\n(S'touch ../canary'\ntR.",
        "exif that leads nowhere.jpg": _jpeg_with_exif(b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "only line breaks.jpg": b"\n" * 10_000,
    }
    return found


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_of(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png()[:8] + _chunk(b"IHDR", header) + png()[33:]


def _with_chunk(kind: bytes, content: bytes) -> bytes:
    """Pixels that do not unpack either, or the picture would be good apart from the chunk."""
    return png()[:33] + _chunk(kind, content) + png()[33:60]


def _webp_of(width: int, height: int) -> bytes:
    content = encoded(picture(), "WEBP", lossless=True)
    bits = (width - 1) | (height - 1) << 14
    return content[:21] + struct.pack("<I", bits) + content[25:]


def _tiff(entries: list[tuple[int, int, int]], following: int) -> bytes:
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, _, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def _tiff_of(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 10**6), (278, height), (279, 10**6)]
    return _tiff([(tag, 4, value) for tag, value in tags], 0)


def _looping_tiff() -> bytes:
    return _tiff([(256, 4, 10), (257, 4, 10)], 8)


def _jpeg_with_exif(exif: bytes) -> bytes:
    content = encoded(picture(), "JPEG")
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:100]


def frames_cases() -> Iterator[Case]:
    """Files with more in them than one picture."""
    frames = [picture("L", (8, 8)).point(lambda level, i=i: (level + i) % 256) for i in range(2000)]
    many = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    pixels = _chunk(b"IDAT", zlib.compress(b"\0" * 20_000_000, 9))
    endless = png()[:33] + pixels + _chunk(b"IEND", b"")
    yield Case("pixels that unpack to 20 MB.png", "Images", "explain", _only("endless.png", endless), harmless=True)
    yield Case("gif of 2,000 frames", "Images", "explain", _only("frames.gif", many), harmless=True)
    dicom = b"\0" * 128 + b"DICM" + b"\xff" * 200
    yield Case("broken DICOM", "Images", "explain", _only("slice.dcm", dicom))
    nifti = struct.pack("<i", 348) + b"\0" * 36 + struct.pack("<8h", 3, 30000, 30000, 30000, 1, 1, 1, 1) + b"\0" * 292
    yield Case("NIfTI that claims 27 TB", "Images", "explain", _only("volume.nii", nifti))
    packed = gzip.compress(b"\0" * 50_000_000)
    yield Case("NIfTI that unpacks to 50 MB", "Images", "explain", _only("volume.nii.gz", packed))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    yield Case("NumPy array called .png", "Images", "explain", _only("array.png", buffer.getvalue()))


def table_cases() -> Iterator[Case]:
    """CSVs of labels, of CelebA, of CheXpert and of patients, as the data of cfe-evaluate."""
    for name, content in _tables().items():
        yield Case(f"labels: {name}", "Tables", "evaluate", _labels(content))
    for kind, (header, row, make) in _KINDS.items():
        for name, cell in _names_in_tables().items():
            content = header + row(cell, 0) + row("patient00001/1.png", 1)
            yield Case(f"{kind} with {name}", "Tables", "evaluate", make(content), harmless=kind == "patients")
        for name in () if kind == "labels" else ("empty", "a picture", "UTF-16", "a field of 200 kB"):
            content = _tables()[name]
            spoilt = header + content if isinstance(content, str) else content
            yield Case(f"{kind}: {name}", "Tables", "evaluate", make(spoilt))
    html = "name,label\n0.png,<script>alert(1)</script>\n1.png,../../up\n2.png,/etc/passwd\n"
    yield Case("classes that are HTML and paths", "Tables", "evaluate", _labels(html))


def _tables() -> dict[str, bytes | str]:
    return {
        "empty": b"",
        "a header alone": "name,label\n",
        "no column of labels": "name,class\n0.png,a\n",
        "a NUL byte": b"name,label\n0\0.png,a\n",
        "a picture": png(),
        "UTF-16": "name,label\n0.png,a\n".encode("utf-16"),
        "bytes that are no UTF-8": b"name,label\n\xff\xfe.png,a\n",
        "a field of 200 kB": "name,label\n" + "a" * 200_000 + ",b\n",
        "an open quote": 'name,label\n"0.png,a\n1.png,b\n',
        "semicolons": "name;label\n0.png;a\n",
        "rows that are short": "name,label\n0.png\n1.png\n",
        "rows that are long": "name,label\n0.png,a,b,c,d\n1.png,b\n",
        "formulas": "name,label\n=cmd|' /C calc'!A0,a\n",
        "only line breaks": "\n" * 1000,
    }


def _names_in_tables() -> dict[str, str]:
    return {
        "a path out of the folder": "../../../outside/secret.png",
        "an absolute path": "/etc/passwd",
        "a path of Windows": "..\\..\\secret.png",
        "a file that is not there": "gone.png",
        "a folder": ".",
        "no name": "",
        "a name of 5,000 letters": "n" * 5000,
        "escapes of a terminal": "\x1b[31mred.png",
        "a name from right to left": "\u202egnp.exe",
        "a URL": "http://localhost/0.png",
        "a device": "/dev/zero",
    }


def _photos(place: Place) -> None:
    for name in (*map(str, range(6)), "patient00001/1"):
        place.write(f"in/{name}.png", png())
    place.outside.mkdir(exist_ok=True)
    (place.outside / "secret.png").write_bytes(png())


def _labels(content: bytes | str) -> Prepare:
    return _data("cfe_lightning.data.folder.ImageFolder", {"in/labels.csv": content}, labels="labels.csv")


def _celeba(content: bytes | str) -> Prepare:
    files = {"in/celeba/img_align_celeba/1.png": png(), "in/celeba/list_attr_celeba.csv": content}
    names = content.splitlines()[1:] if isinstance(content, str) else []
    rows = [f"{line.partition(',')[0]},{index}" for index, line in enumerate(names)]
    files["in/celeba/list_eval_partition.csv"] = "\n".join(["image_id,partition", *rows])
    return _data("cfe_lightning.data.celeba.CelebA", files, attribute="Smiling")


def _chexpert(content: bytes | str) -> Prepare:
    arguments = {"pathology": "Edema", "uncertain": "ignore"}
    return _data("cfe_lightning.data.chexpert.CheXpert", {"in/train.csv": content}, channels=1, **arguments)


def _patients(content: bytes | str) -> Prepare:
    return _data(
        "cfe_lightning.data.patient_slices.PatientSlices",
        {"in/table.csv": content},
        labels="table.csv",
        slice_size=8,
        channels=3,
    )


#: Header of a table, one of its rows with a name and a class, and who reads it.
_KINDS: dict[str, tuple[str, Callable[[str, int], str], Callable[[bytes | str], Prepare]]] = {
    "labels": ("name,label\n", lambda name, label: f"{name},stripe {label}\n", _labels),
    "CelebA": ("image_id,Smiling\n", lambda name, label: f"{name},{label}\n", _celeba),
    "CheXpert": (
        "Path,Frontal/Lateral,No Finding,Edema\n",
        lambda name, label: f"{name},Frontal,{'' if label else 1.0},{1.0 if label else ''}\n",
        _chexpert,
    ),
    "patients": ("patient,path,label\n", lambda name, label: f"patient {label},{name},stripe {label}\n", _patients),
}


def _data(class_path: str, files: dict[str, bytes | str], **arguments: object) -> Prepare:
    def prepare(place: Place) -> list[str]:
        _photos(place)
        for name, content in files.items():
            place.write(name, content)
        sized = {} if "slice_size" in arguments else {"image_size": 16}
        section = {"class_path": class_path, "init_args": {"root": "in", **sized, **arguments}}
        place.write("data.yaml", json.dumps({"data": section}))
        return place.evaluate("data.yaml")

    return prepare


def command_cases() -> Iterator[Case]:
    """Command lines of all three commands."""
    for name, more in _explain_options().items():
        yield Case(f"explain.py {name}", "Command lines", "explain", lambda place, more=more: place.explain(*more))
    for steps in ("-5", "1000000000000", "NaN", "1e400"):
        more = ["--set", f"num_steps={steps}"]
        yield Case(f"explain.py with {steps} steps", "Command lines", "explain", _steps(more))
    for name, more in _evaluate_options().items():
        yield Case(
            f"cfe-evaluate {name}",
            "Command lines",
            "evaluate",
            lambda place, more=more: place.evaluate(str(place.base / "labelled"), *more),
        )
    for name, more in _train_options().items():
        yield Case(
            f"train.py {name}",
            "Command lines",
            "train",
            lambda place, more=more: place.train(as_yaml(), "--trusted", "toy", *more),
        )
    for command in ("explain", "train", "evaluate"):
        yield Case(f"{command} without any option", "Command lines", command, lambda place: [])
        yield Case(f"{command} with a NUL", "Command lines", command, lambda place: ["--output", "a\0b"])


def _steps(more: list[str]) -> Prepare:
    return lambda place: [*place.classify(str(place.base / "pooled.pt")), *more]


def _explain_options() -> dict[str, list[str]]:
    return {
        "with an input that is a file": ["--input", "../../../base/good.ckpt"],
        "with an input that is not there": ["--input", "gone"],
        "with an empty input": ["--input", ""],
        "with the output in the input": ["--output", "../../../base/photos/out"],
        "with an output that is a file": ["--output", "../../../base/good.ckpt"],
        "with an output below a file": ["--output", "../../../base/good.ckpt/out"],
        "with an output of 5,000 letters": ["--output", "o" * 5000],
        "with an output in /proc": ["--output", "/proc/out"],
        "with a NUL in the input": ["--input", "a\0b"],
        "with a target that is no class": ["--target", "../../x"],
        "with a batch of 0": ["--batch-size", "0"],
        "with a batch of -1": ["--batch-size", "-1"],
        "with a batch of 10^5 digits": ["--batch-size", "9" * 100_000],
        "with an unknown method's argument": ["--set", "novel=1"],
        "with an argument of another type": ["--set", "amplitude=[1,2]"],
        "with an argument that is a bomb": ["--set", "amplitude=" + "[" * 50_000],
        "with an assignment without a name": ["--set", "=1"],
        "with a window upside down": ["--window", "nan", "-1"],
        "with an unknown option": ["--frobnicate"],
        "with two who explain": ["--method", "steerable_lens"],
        "with a package that is no name": ["--checkpoint", "../../../base/gone.ckpt", "--trusted", "../evil"],
        "with shard 9 of 3": ["--shard", "9/3"],
        "with --verify of nothing": ["--verify", "gone"],
    }


def _evaluate_options() -> dict[str, list[str]]:
    return {
        "with data that are not there": ["--data", "gone.yaml"],
        "with data that are a checkpoint": ["--data", "../../../base/good.ckpt"],
        "with a checkpoint that is data": ["--checkpoint", "../../../base/run.yaml"],
        "with a classifier that is an explainer": ["--classifier", "../../../base/good.ckpt"],
        "with a second that is not there": ["--second", "gone.pt"],
        "with a baseline that is not there": ["--baselines", "../../evil"],
        "with probabilities beyond 1": ["--iso", "2"],
        "with an output that is a file": ["--output", "../../../base/good.ckpt"],
        "with weights of no network": ["--weights", "lpips=gone.pth"],
        "with weights of an unknown name": ["--weights", "evil=../../../base/good.ckpt"],
        "with weights that are a picture": ["--weights", "lpips=../../../base/photos/0.png"],
        "with references that are not there": ["--fid-reference", "gone"],
        "with attributes that are no table": ["--attributes", "../../../base/photos/0.png", "--asked", "x"],
        "with a device that is not here": ["--device", "mps"],
        "with a limit of 0": ["--limit", "0"],
        "with one of a bench's options": ["--budget", "2"],
        "with a bench and a checkpoint": ["--bench", "synthetic"],
    }


def _train_options() -> dict[str, list[str]]:
    return {
        "with a config that is not there": ["--config", "gone.yaml"],
        "with a run that leaves the folder": ["--run", "../../outside/run"],
        "with an absolute run": ["--run", "/tmp/hostile/run"],
        "with a run without a name": ["--run", ""],
        "with a run called ..": ["--run", ".."],
        "with a run with a NUL": ["--run", "a\0b"],
        "with a run of 5,000 letters": ["--run", "r" * 5000],
        "with an output that is a file": ["--output", "../../../base/good.ckpt"],
        "with an output in /proc": ["--output", "/proc"],
        "with a model from the internet": ["--model", "http://localhost/evil.yaml"],
        "with a class that is not trusted": ["--model", "os.system"],
        "with --trusted jsonargparse": ["--trusted", "jsonargparse"],
        "with --trusted of a path": ["--trusted", "../evil"],
        "with a value that is a bomb": ["--data.init_args.batch_size", "[" * 20_000],
        "with billion laughs as a value": [
            "--model.init_args.amplitude",
            "[&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], "
            "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]]",
        ],
        "with help for a class that is not trusted": ["--model.help", "evil.Model"],
        "with an unknown option": ["--frobnicate", "1"],
        "with nothing to resume": ["--resume"],
        "with a picture to resume": ["--resume", "../../../base/photos/0.png"],
        "with another method's checkpoint": ["--resume", "../../../base/good.ckpt"],
    }
