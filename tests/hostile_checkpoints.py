"""Hostile checkpoints, classifier files, surveys and output folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile_case import Case, Place, Prepare, as_yaml, changed, copy_explained
from hostile_configs import write_evil
from hostile_files import png

from cfe_lightning.classifier import ClassifierSpec


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


Change = Callable[[dict[str, Any], Place], Any]


def checkpoint_cases() -> Iterator[Case]:
    """Checkpoints for explain.py and, where they are about training, for train.py --resume."""
    for name, spoil in _files().items():
        yield Case(f"explainer: {name}", "Checkpoints", "explain", _as_file(spoil, "good.ckpt", _explains))
        yield Case(f"classifier: {name}", "Classifier files", "explain", _as_file(spoil, "pooled.pt", _classifies))
        yield Case(f"resumed: {name}", "Resumed checkpoints", "train", _as_file(spoil, "runs/run/last.ckpt", _resumes))
    for name, change in {**_payloads(), **_parts()}.items():
        yield Case(f"explainer: {name}", "Checkpoints", "explain", _with(change, "good.ckpt", _explains))
    for name, change in {**_payloads(), **_specs()}.items():
        yield Case(f"classifier: {name}", "Classifier files", "explain", _with(change, "pooled.pt", _classifies))
    for name, change in {**_payloads(), **_states()}.items():
        yield Case(f"resumed: {name}", "Resumed checkpoints", "train", _with(change, "runs/run/last.ckpt", _resumes))
    for name, change in _networks().items():
        harmless = "HTML" in name
        yield Case(name, "Classifier files", "explain", _with(change, "pooled.pt", _classifies), harmless=harmless)


def _explains(place: Place, file: str) -> list[str]:
    return place.explain(checkpoint=file)


def _classifies(place: Place, file: str) -> list[str]:
    return place.classify(file)


def _resumes(place: Place, file: str) -> list[str]:
    shutil.copyfile(place.base / "run.yaml", place.here / "config.yaml")
    return place.train(as_yaml(trainer__max_epochs=2), "--trusted", "toy", "--resume", file)


def _as_file(
    spoil: Callable[[bytes, Place], bytes | None], good: str, take: Callable[[Place, str], list[str]]
) -> Prepare:
    def prepare(place: Place) -> list[str]:
        content = spoil((place.base / good).read_bytes(), place)
        if content is not None:
            place.write("given.ckpt", content)
        return take(place, "given.ckpt")

    return prepare


def _with(change: Change, good: str, take: Callable[[Place, str], list[str]]) -> Prepare:
    def prepare(place: Place) -> list[str]:
        write_evil(place)
        content = torch.load(place.base / good, weights_only=True)
        return take(place, place.tensors("given.ckpt", change(content, place)))

    return prepare


def _files() -> dict[str, Callable[[bytes, Place], bytes | None]]:
    def folder(_: bytes, place: Place) -> None:
        (place.here / "given.ckpt").mkdir()

    def pipe(_: bytes, place: Place) -> None:
        os.mkfifo(place.here / "given.ckpt")

    def loop(_: bytes, place: Place) -> None:
        (place.here / "given.ckpt").symlink_to("given.ckpt")

    return {
        "not there": lambda content, place: None,
        "a folder": folder,
        "a pipe": pipe,
        "a link to itself": loop,
        "empty": lambda content, place: b"",
        "one byte": lambda content, place: content[:1],
        "first 100 bytes": lambda content, place: content[:100],
        "first half": lambda content, place: content[: len(content) // 2],
        "last byte missing": lambda content, place: content[:-1],
        "first byte missing": lambda content, place: content[1:],
        "middle overwritten": lambda content, place: content[:300] + b"\xff" * 200 + content[500:],
        "doubled": lambda content, place: content + content,
        "a picture": lambda content, place: png(),
        "a text": lambda content, place: b"this is no checkpoint",
        "zeros": lambda content, place: b"\0" * 10_000,
        "a pickle that runs a program": lambda content, place: pickle.dumps(Payload(place.canary)),
        "a pickle of protocol 0 that runs a program": lambda content, place: pickle.dumps(Payload(place.canary), 0),
        "an empty archive": lambda content, place: b"PK\x05\x06" + b"\0" * 18,
        "another archive": lambda content, place: _archive({"notes.txt": b"hello"}),
        "an archive with names that lead out": lambda content, place: _archive({"../../outside/x/data.pkl": b"."}),
        "an archive that unpacks to 100 MB": lambda content, place: _archive(
            {"a/data.pkl": pickle.dumps({}, 2), "a/data/0": bytes(100 << 20), "a/version": b"3\n"}, packed=True
        ),
        "a pickle that unpacks to 100 MB": lambda content, place: _archive(
            {"a/data.pkl": b"\x80\x02" + b"N0" * (1 << 20) + bytes(100 << 20), "a/version": b"3\n"}, packed=True
        ),
        "a storage of 400 GB in 16 bytes": _claimed_storage,
        "a hundred thousand nested lists": lambda content, place: _pickled(b"]" * 100_000 + b"a" * 99_999 + b"."),
        "a tensor that grows while it is read": _grown,
        "bytes of a terabyte asked for": lambda content, place: _pickled(
            b"cbuiltins\nbytearray\n(\x8a\x06" + (10**12).to_bytes(6, "little") + b"tR."
        ),
        "a memo of 4 billion": lambda content, place: _pickled(b"Nr\xff\xff\xff\xff."),
        "a class to be found": lambda content, place: _pickled(b"cevil\nModel\n."),
        "a text of 4 GB announced": lambda content, place: _pickled(b"X\xff\xff\xff\xffabc."),
    }


def _archive(parts: dict[str, bytes], packed: bool = False) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _pickled(opcodes: bytes) -> bytes:
    return _archive({"a/data.pkl": b"\x80\x02" + opcodes, "a/version": b"3\n", "a/byteorder": b"little"})


class _Grown:
    """4 GB of one number, as tensors of some accelerators are stored."""

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (torch.zeros(1).expand(10**9), torch.float32, "cpu", False)


def _grown(content: bytes, place: Place) -> bytes:
    torch.save({"a": _Grown()}, place.here / "small")
    grown = (place.here / "small").read_bytes()
    (place.here / "small").unlink()
    return grown


def _claimed_storage(content: bytes, place: Place) -> bytes:
    torch.save({"a": torch.arange(4.0)}, place.here / "small")
    with zipfile.ZipFile(place.here / "small") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (place.here / "small").unlink()
    name = next(name for name in parts if name.endswith("data.pkl"))
    parts[name] = parts[name].replace(b"K\x04", b"\x8a\x06" + (10**11).to_bytes(6, "little"))
    return _archive(parts)


def _payloads() -> dict[str, Change]:
    def laughs(content: dict[str, Any], place: Place) -> Any:
        lists: Any = ["x"] * 10
        for _ in range(12):
            lists = [lists] * 10
        return content | {"more": lists}

    def endless(content: dict[str, Any], place: Place) -> Any:
        content["self"] = content
        return content

    return {
        "a payload beside the rest": lambda content, place: content | {"more": Payload(place.canary)},
        "a payload instead": lambda content, place: Payload(place.canary),
        "a whole pickled network": lambda content, place: torch.nn.Linear(2, 2),
        "a list": lambda content, place: [1, 2, 3],
        "a number": lambda content, place: 5,
        "a tensor": lambda content, place: torch.zeros(3),
        "nothing in it": lambda content, place: {},
        "the keys of others": lambda content, place: {"model": {}, "epoch": 3},
        "billion laughs": laughs,
        "a dictionary that holds itself": endless,
        "names that are numbers": lambda content, place: dict(enumerate(content.values())),
        "no weights": lambda content, place: content | {"state_dict": {}, "current_model_state": {}},
        "weights that are text": lambda content, place: _weights(content, lambda value: "heavy"),
        "weights of 4 TB in a few bytes": lambda content, place: _weights(
            content, lambda value: torch.zeros(1).expand(10**12)
        ),
        "weights that are sparse": lambda content, place: _weights(
            content, lambda value: torch.sparse_coo_tensor(size=(10**6, 10**6))
        ),
        "weights without memory": lambda content, place: _weights(
            content, lambda value: torch.empty(10**12, device="meta")
        ),
        "weights with another shape": lambda content, place: _weights(content, lambda value: value[..., None]),
        "weights of no elements": lambda content, place: _weights(content, lambda value: value.flatten()[:0]),
    }


def _weights(content: dict[str, Any], replace: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """All weights replaced, in every state that the file has."""
    return content | {
        key: {name: replace(value) for name, value in content[key].items()}
        for key in ("state_dict", "current_model_state")
        if key in content
    }


def _change(**changes: Any) -> Change:
    return lambda content, place: changed(content, **changes)


def _parts() -> dict[str, Change]:
    """Of an explainer's checkpoint."""
    kind = "explainer__class_path"
    return {
        "a newer version": _change(explainer__version="99.0"),
        "a version that is none": _change(explainer__version="newest"),
        "a version that is a list": _change(explainer__version=[1]),
        "no method": lambda content, place: {key: value for key, value in content.items() if key != "explainer"},
        "a method that is a number": _change(explainer=7),
        "a class that is a number": _change(**{kind: 7}),
        "a class that is empty": _change(**{kind: ""}),
        "a class without a package": _change(**{kind: "Toy"}),
        "a class of a module beside it": _change(**{kind: "evil.Model"}),
        "os.system as class": _change(**{kind: "os.system"}),
        "torch.hub.load as class": _change(**{kind: "torch.hub.load"}),
        "a class that is gone": _change(**{kind: "cfe_lightning.methods.dxai.Gone"}),
        "a network as class": _change(**{kind: "cfe_lightning.classifier.networks.PooledCnn"}),
        "the base of all methods as class": _change(**{kind: "cfe_lightning.explainer.ExplainerModule"}),
        "another method's class": _change(**{kind: "cfe_lightning.methods.dxai.Dxai"}),
        "a class path of 100,000 dots": _change(**{kind: "." * 100_000}),
        "escapes of a terminal as class": _change(**{kind: "\x1b[2J.x"}),
        "arguments that are a list": _change(hyper_parameters=[1]),
        "arguments that are unknown": _change(hyper_parameters={"novel": 1}),
        "arguments that are numbered": _change(hyper_parameters={1: 1}),
        "arguments of other types": _change(hyper_parameters={"amplitude": "much", "num_steps": None}),
        "10^12 times the amplitude": _change(hyper_parameters={"amplitude": 10**12, "num_steps": 3}),
        "a number of 100,000 digits": _change(hyper_parameters={"num_steps": 10**100_000}),
        "StylEx with a width of 10^9": _change(
            **{kind: "cfe_lightning.methods.stylex.StylEx", "hyper_parameters": {"base": 10**9, "max_width": 10**9}}
        ),
        "StylEx with 10^9 layers": _change(
            **{kind: "cfe_lightning.methods.stylex.StylEx", "hyper_parameters": {"mapping_layers": 10**9}}
        ),
        "DXAI with 10^9 branches": _change(
            **{
                kind: "cfe_lightning.methods.dxai.Dxai",
                "hyper_parameters": {"num_branches": 10**9, "min_resolution": 8},
            }
        ),
        "DXAI with branches of 10^6 channels": _change(
            **{
                kind: "cfe_lightning.methods.dxai.Dxai",
                "hyper_parameters": {"branch_width": 10**6, "min_resolution": 8},
            }
        ),
        "DiffExplainer with an autoencoder elsewhere": _change(
            **{
                kind: "cfe_lightning.methods.diff_explainer.DiffExplainer",
                "hyper_parameters": {"autoencoder": "../../../base/good.ckpt"},
            }
        ),
        "DiffExplainer with 10^9 steps of noise": _change(
            **{
                kind: "cfe_lightning.methods.diff_explainer.DiffExplainer",
                "hyper_parameters": {"autoencoder": {"image_size": 16, "width": 10**7}},
            }
        ),
        **{f"its classifier has {name}": change for name, change in _specs("classifier").items()},
    }


def _specs(key: str = "classifier") -> dict[str, Change]:
    """Of a classifier's description, in a checkpoint or in its own file."""
    values: dict[str, dict[str, Any]] = {
        "no class path": {"class_path": None},
        "a class of a module beside it": {"class_path": "evil.Network"},
        "a function that downloads": {"class_path": "torchvision.models._api.load_state_dict_from_url"},
        "a torchvision function that is no network": {"class_path": "torchvision.models.get_model"},
        "an exported program": {"class_path": "cfe_lightning.classifier.exported.ExportedNetwork", "init_args": {}},
        "arguments that are a list": {"init_args": [1]},
        "arguments that are unknown": {"init_args": {"novel": 1}},
        "10^9 classes": {"init_args": {"num_classes": 10**9}},
        "a width of 10^9": {"init_args": {"num_classes": 2, "width": 10**9}},
        "a width of 10^5": {"init_args": {"num_classes": 2, "width": 10**5}},
        "a width below zero": {"init_args": {"num_classes": 2, "width": -4}},
        "a width that is text": {"init_args": {"num_classes": 2, "width": "wide"}},
        "weights from the internet": {
            "class_path": "torchvision.models.resnet18",
            "init_args": {"weights": "https://localhost/evil.pth"},
        },
        "weights of torchvision from the internet": {
            "class_path": "torchvision.models.resnet18",
            "init_args": {"weights": "IMAGENET1K_V1"},
        },
        "images of 10^9 pixels a side": {"image_size": 10**9},
        "images of -1 pixels": {"image_size": -1},
        "images of no number": {"image_size": "large"},
        "a mean that is no number": {"mean": (float("nan"),) * 3},
        "a deviation of zero": {"std": (0.0,) * 3},
        "an infinite deviation": {"std": (float("inf"),) * 3},
        "17 channels": {"mean": (0.5,) * 17, "std": (0.5,) * 17},
        "no classes": {"class_names": ()},
        "the same class twice": {"class_names": ("a", "a")},
        "classes that are numbers": {"class_names": (1, 2)},
        "10^5 classes by name": {"class_names": tuple(map(str, range(10**5)))},
        "a head that is not there": {"head": "../../x"},
        "a head that is a number": {"head": 5},
        "a feature map that is not there": {"feature_map": "gone"},
        "a label that is no class": {"label": "x"},
        "a field of the future": {"novel": 1},
    }
    found: dict[str, Change] = {name: _spec(key, fields) for name, fields in values.items()}
    found["no description"] = _change(**{key: 5})
    return found


def _spec(key: str, fields: dict[str, Any]) -> Change:
    return lambda content, place: content | {key: {**content[key], **fields}}


def _networks() -> dict[str, Change]:
    """Of a classifier's file."""
    resnet = ClassifierSpec(
        class_path="torchvision.models.vit_h_14",
        init_args={"num_classes": 2},
        head=None,
        class_names=("a", "b"),
        image_size=224,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    ).to_dict()
    return {
        "classifier: an explainer's checkpoint": lambda content, place: torch.load(
            place.base / "good.ckpt", weights_only=True
        ),
        "classifier: a plain state dictionary": lambda content, place: content["state_dict"],
        "classifier: 2 GB of network for its weights": lambda content, place: content | {"classifier": resnet},
        "classifier: infinite weights": lambda content, place: _weights(
            content, lambda value: torch.full_like(value, float("inf")) if value.is_floating_point() else value
        ),
        "classifier: class names that are HTML and paths": lambda content, place: changed(
            content, classifier__class_names=("<script>alert(1)</script>", "../../outside/x")
        ),
    }


def _states() -> dict[str, Change]:
    """Of a training that is to go on."""
    without = {
        key: lambda content, place, key=key: {name: value for name, value in content.items() if name != key}
        for key in ("loops", "optimizer_states", "callbacks", "epoch", "global_step", "state_dict")
    }
    return {
        **{f"without {key}": change for key, change in without.items()},
        "a newer version": _change(explainer__version="99.0"),
        "another method": _change(explainer__class_path="toy.FixedToyExplainer"),
        "loops that are text": _change(loops="round"),
        "loops of another trainer": _change(loops={"fit_loop": {"epoch": 3}}),
        "an epoch that is text": _change(epoch="late"),
        "a step below zero": _change(global_step=-5),
        "checkpoints of others to be removed": _kept(lambda place: f"{place.outside}/x.ckpt"),
        "a folder to be removed": _kept(lambda place: str(place.outside)),
        "checkpoints to be removed by going up": _kept(lambda place: "checkpoints/run/../../../outside/x.ckpt"),
        "checkpoints to be removed by a protocol": _kept(lambda place: f"local://{place.outside}/x.ckpt"),
        "checkpoints to be removed that are numbers": _kept(lambda place: 5),
        "arguments that are a list": _change(hyper_parameters=[1]),
        "arguments by number": _change(hyper_parameters={1: 2}),
        "weights by number": _change(state_dict={1: torch.zeros(1)}, current_model_state={2: torch.zeros(1)}),
        "averaged weights that are a list": _change(current_model_state=[1]),
        "optimisers that are none": _change(optimizer_states=[]),
        "optimisers of another form": _change(optimizer_states=[{"state": 1}, {"state": 2}]),
        "callbacks of another form": _change(callbacks={"RandomState": 5}),
        "random states of another form": lambda content, place: changed(
            content, callbacks={**content["callbacks"], "RandomState": {"processes": [{"torch": 1}]}}
        ),
    }


def _kept(name: Callable[[Place], Any]) -> Change:
    """ModelCheckpoint is to remove what its state names as soon as a better checkpoint is there."""

    def change(content: dict[str, Any], place: Place) -> dict[str, Any]:
        place.outside.mkdir()
        (place.outside / "x.ckpt").write_bytes(b"of others")
        score, callbacks = torch.tensor(1e9), dict(content["callbacks"])
        key = next(key for key in callbacks if key.startswith("ModelCheckpoint"))
        kept = {"best_k_models": {name(place): score}, "kth_best_model_path": name(place), "kth_value": score}
        state = {"best_model_score": score, "best_model_path": name(place), "last_model_path": "", **kept}
        return content | {"callbacks": callbacks | {key: state}}

    return change


def output_cases() -> Iterator[Case]:
    """Output folders that somebody else has left: to be verified, and to be gone on with."""
    for name, change in _rows().items():
        yield Case(f"verified: {name}", "Output folders", "explain", _verifies(change))
    for name, spoil in _folders().items():
        # What is not verified may be anything.
        harmless = any(part in name for part in ("summary", "global", "part that is a picture"))
        yield Case(f"verified: {name}", "Output folders", "explain", _spoilt(spoil, _verify), harmless=harmless)
        yield Case(f"gone on with: {name}", "Output folders", "explain", _spoilt(spoil, _go_on), harmless=True)
    for name, spoil in _surveys().items():
        yield Case(f"a survey beside the checkpoint: {name}", "Output folders", "explain", spoil, harmless=True)

    for name in ("table.md", "unfinished", "unfinished/000000"):
        yield Case(f"evaluated into: {name} is a link", "Output folders", "evaluate", _linked_table(name))
    for name in ("samples", "metrics.csv"):
        yield Case(f"trained into: {name} is a link", "Output folders", "train", _linked_run(name))


def _linked_table(name: str) -> Prepare:
    def prepare(place: Place) -> list[str]:
        _link(place, place.here / "out" / name)
        return place.evaluate(str(place.base / "labelled"))

    return prepare


def _linked_run(name: str) -> Prepare:
    def prepare(place: Place) -> list[str]:
        run = place.here / "checkpoints" / "run"
        shutil.copytree(place.base / "runs" / "run", run, ignore=lambda *_: [name])
        shutil.copyfile(place.base / "run.yaml", run / "config.yaml")
        _link(place, run / name)
        return ["--run", "run", "--resume", "--skip-classifier-check", "--trusted", "toy", "--trainer.max_epochs", "2"]

    return prepare


def _link(place: Place, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    place.outside.mkdir()
    (place.outside / "notes").write_text("of the user")
    path.symlink_to(place.outside / "notes" if path.suffix else place.outside)


def _verify(place: Place) -> list[str]:
    return ["--verify", "out", "--checkpoint", str(place.base / "good.ckpt"), "--trusted", "toy"]


def _go_on(place: Place) -> list[str]:
    return place.explain()


def _verifies(change: Callable[[dict[str, Any], Place], Any]) -> Prepare:
    def prepare(place: Place) -> list[str]:
        manifest = copy_explained(place) / "manifest.jsonl"
        lines = manifest.read_text().splitlines()
        lines[1] = json.dumps(change(json.loads(lines[1]), place))
        manifest.write_text("\n".join(lines) + "\n")
        place.outside.mkdir()
        (place.outside / "image.png").write_bytes(png())
        return _verify(place)

    return prepare


def _spoilt(spoil: Callable[[Path, Place], object], take: Callable[[Place], list[str]]) -> Prepare:
    def prepare(place: Place) -> list[str]:
        place.outside.mkdir()
        (place.outside / "image.png").write_bytes(png())
        spoil(copy_explained(place), place)
        return take(place)

    return prepare


def _rows() -> dict[str, Callable[[dict[str, Any], Place], Any]]:
    def files(**paths: Any) -> Callable[[dict[str, Any], Place], Any]:
        return lambda row, place: row | {"files": {**row["files"], **paths}}

    return {
        "a picture out of the folder": files(image="../../../../outside/image.png"),
        "a picture with an absolute path": lambda row, place: (
            row | {"folder": str(place.outside), "files": row["files"]}
        ),
        "a folder out of the folder": lambda row, place: row | {"folder": "../../outside"},
        "a folder that is a number": lambda row, place: row | {"folder": 5},
        "a picture that is a device": files(image="/dev/zero"),
        "a picture with a NUL": files(image="a\0b.png"),
        "a picture of 5,000 letters": files(image="p" * 5000),
        "a picture that is a number": files(image=5),
        "pictures that are a list": lambda row, place: row | {"files": ["image.png"]},
        "no pictures": lambda row, place: {key: value for key, value in row.items() if key != "files"},
        "no image among the pictures": lambda row, place: row | {"files": {}},
        "classes that are not there": lambda row, place: row | {"predicted": "../../x"},
        "classes that are numbers": lambda row, place: row | {"predicted": 3, "target": []},
        "probabilities that are text": lambda row, place: row | {"p_predicted_before": "high"},
        "a curve of another form": lambda row, place: row | {"curve": {"strength": 5}},
        "a curve of 10^6 steps": lambda row, place: row | {"curve": {"strength": [0] * 10**6}},
        "digests of another form": lambda row, place: row | {"digests": 5},
        "a status that is a list": lambda row, place: row | {"status": []},
        "no status": lambda row, place: {key: value for key, value in row.items() if key != "status"},
        "a name that is a number": lambda row, place: row | {"name": 5},
        "a name with escapes of a terminal": lambda row, place: row | {"name": "\x1b[2J", "predicted": "x"},
        "a change that is text": lambda row, place: row | {"changed_area": "much"},
        "a row that is a list": lambda row, place: [row],
        "a row that is a number": lambda row, place: 5,
    }


def _folders() -> dict[str, Callable[[Path, Place], object]]:
    def linked(out: Path, place: Place) -> None:
        shutil.rmtree(out / "images")
        (out / "images").symlink_to(place.outside)
        (out / "manifest.jsonl").write_text((out / "manifest.jsonl").read_text().splitlines()[0] + "\n")

    def header(**changes: Any) -> Callable[[Path, Place], object]:
        def spoil(out: Path, place: Place) -> None:
            first, *rest = (out / "manifest.jsonl").read_text().splitlines()
            (out / "manifest.jsonl").write_text("\n".join([json.dumps(json.loads(first) | changes), *rest]) + "\n")

        return spoil

    def torn(out: Path, place: Place) -> None:
        content = (out / "manifest.jsonl").read_bytes()
        (out / "manifest.jsonl").write_bytes(content[: len(content) // 2])

    def part(content: str) -> Callable[[Path, Place], object]:
        return lambda out, place: (out / "manifest.0.jsonl").write_text(content)

    return {
        "an empty manifest": lambda out, place: (out / "manifest.jsonl").write_bytes(b""),
        "a manifest that is a picture": lambda out, place: (out / "manifest.jsonl").write_bytes(png()),
        "a manifest that is torn": torn,
        "no manifest": lambda out, place: (out / "manifest.jsonl").unlink(),
        "a header of another schema": header(schema=99),
        "a header with other classes": header(classes=["x"]),
        "a header that is a list": lambda out, place: (out / "manifest.jsonl").write_text("[1]\n"),
        "a manifest of deep brackets": lambda out, place: (out / "manifest.jsonl").write_text("[" * 100_000),
        "a part that is a picture": lambda out, place: (out / "manifest.0.jsonl").write_bytes(png()),
        "a part of other things": part('5\n[]\n"x"\n{"end": 0}\n'),
        "a part with a row of nothing": part('{"name": "x"}\n{"end": 1}\n'),
        "a part with a name that is a list": part('{"name": [1], "status": "ok"}\n{"end": 1}\n'),
        "a summary that is a list": lambda out, place: (out / "summary.json").write_text("[]"),
        "a summary of deep brackets": lambda out, place: (out / "summary.json").write_text("[" * 100_000),
        "pictures that lie elsewhere": linked,
        "a global view that is a list": lambda out, place: (out / "global.json").write_text("[]"),
    }


def _surveys() -> dict[str, Prepare]:
    def beside(write: Callable[[Path, Place], object]) -> Prepare:
        def prepare(place: Place) -> list[str]:
            shutil.copyfile(place.base / "good.ckpt", place.here / "best.ckpt")
            write(place.here / "best.survey.pt", place)
            return place.explain(checkpoint="best.ckpt")

        return prepare

    return {
        "a payload": beside(lambda path, place: torch.save(Payload(place.canary), path)),
        "a picture": beside(lambda path, place: path.write_bytes(png())),
        "a folder": beside(lambda path, place: path.mkdir()),
        "a header of a length": beside(lambda path, place: path.write_bytes(b"PK\x03\x04" + struct.pack("<I", 9))),
    }
