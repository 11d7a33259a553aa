"""Hostile configs: YAML that breaks readers, names what is not to be run, or asks for nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

import torch
from hostile_case import TRUSTED, Case, Command, Place, Prepare, as_yaml, changed, config
from hostile_files import png


def config_cases() -> Iterator[Case]:
    """YAML files of train.py; nobody is trusted unless the case says so."""
    for name, text in _broken_yaml().items():
        # Both commands read YAML by the same door.
        take, command = (_trains, "train") if len(name) % 2 else (_evaluates, "evaluate")
        yield Case(f"{command} with {name}", "Configs", cast("Command", command), take(text))
    for name, text in _running_yaml().items():
        yield Case(name, "Configs that run something", "train", _trains(text, *TRUSTED, evil=True))
    data = json.dumps({"data": {"class_path": "evil.Data", "init_args": {}}})
    yield Case(
        "data of a module, to be measured", "Configs that run something", "evaluate", _evaluates(data, evil=True)
    )
    for name, text in _wrong_values().items():
        yield Case(name, "Configs with wrong values", "train", _trains(text, "--trusted", "toy"))


def _trains(text: str | bytes, *more: str, evil: bool = False) -> Prepare:
    def prepare(place: Place) -> list[str]:
        if evil:
            write_evil(place)
        arguments = place.train("", *more)
        place.write("config/given.yaml", text)
        return arguments

    return prepare


def _evaluates(text: str | bytes, evil: bool = False) -> Prepare:
    def prepare(place: Place) -> list[str]:
        if evil:
            write_evil(place)
        place.write("given.yaml", text)
        return place.evaluate("given.yaml")

    return prepare


def write_evil(place: Place) -> None:
    """A module beside the config that leaves a trace as soon as it is imported."""
    body = f"import pathlib\npathlib.Path({str(place.canary)!r}).touch()\nfrom toy import *\nfrom witness import *\n"
    names = "Model = ToyExplainer\nData = ToyData\nNetwork = ToyNetwork\nCallback = Witness\n"
    place.write("evil.py", f"{body}{names}def call(*_): pass\n")
    classifier = torch.load(place.base / "classifier.pt", weights_only=True)
    place.tensors("evil.pt", changed(classifier, classifier__class_path="evil.Network"))


def _broken_yaml() -> dict[str, str | bytes]:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
    return {
        "an empty file": "",
        "a comment alone": "# nothing\n",
        "a list": "- 1\n- 2\n",
        "a word": "hello\n",
        "a number": "42\n",
        "two documents": "data: {}\n---\ndata: {}\n",
        "a tab": "data:\n\tclass_path: x\n",
        "an open bracket": "data: [\n",
        "an open quote": "data: 'x\n",
        "a reference to nothing": "data: *nothing\n",
        "a reference to itself": "data: &d\n  x: *d\n",
        "billion laughs": f"{laughs}data: *a11\n",
        "billion laughs by merging": f"{merges}data: *a39\n",
        "a name twice": "data: {}\ndata: {}\n",
        "a name twice further in": "data:\n  class_path: a\n  class_path: b\n",
        "a list as a name": "? [1, 2]\n: 3\n",
        "10,000 brackets": "data: " + "[" * 10_000 + "]" * 10_000,
        "100,000 open brackets": "data: " + "[" * 100_000,
        "100,000 dashes": "- " * 100_000,
        "100 levels": "data: " + "{a: " * 100 + "1" + "}" * 100,
        "a picture": png(),
        "NUL bytes": b"data: \0\0\n",
        "bytes that are no UTF-8": b"data: \xff\xfe\xfa\n",
        "UTF-16": "data: {}\n".encode("utf-16"),
        "10 MB": "# " + "x" * 10_000_000,
        "a number of 10,000 digits": f"seed_everything: {'9' * 10_000}\ndata: 1\n",
        "an unknown tag": "data: !secret x\n",
        "a binary tag": "data: !!binary aGVsbG8=\n",
        "escapes of a terminal": "data: \x1b[2J\n",
        "JSON of another program": '{"version": 3, "data": [1, 2, 3]}',
        "a shell script": "#!/bin/sh\nrm -rf $HOME\n",
    }


def _running_yaml() -> dict[str, str]:
    tags = {
        "python/object/apply": "!!python/object/apply:os.system ['touch ../canary']",
        "python/object/new": "!!python/object/new:os.system ['touch ../canary']",
        "python/name": "!!python/name:os.system",
        "python/module": "!!python/module:evil",
        "python/object": "!!python/object:evil.Model {}",
        "python/tuple": "!!python/tuple [1, 2]",
    }
    found = {f"tag {name}": f"model: {tag}\n" for name, tag in tags.items()}
    wrap = {"state_dict_path": "x.pt", "class_names": ["a", "b"], "image_size": 16, "mean": [0.5], "std": [0.5]}
    sources = "cfe_lightning.classifier.sources"
    lambda_callback = "lightning.pytorch.callbacks.LambdaCallback"
    named = {
        "model of a module beside it": config(model__class_path="evil.Model"),
        "data of a module beside it": config(data__class_path="evil.Data"),
        "callback of a module beside it": config(trainer__callbacks=[{"class_path": "evil.Callback"}]),
        "logger of a module beside it": config(trainer__logger={"class_path": "evil.Callback"}),
        "strategy of a module beside it": config(trainer__strategy={"class_path": "evil.Callback"}),
        "plugin of a module beside it": config(trainer__plugins=[{"class_path": "evil.Callback"}]),
        "profiler of a module beside it": config(trainer__profiler={"class_path": "evil.Callback"}),
        "accelerator of a module beside it": config(trainer__accelerator={"class_path": "evil.Callback"}),
        "os.system as model": config(model__class_path="os.system"),
        "subprocess.Popen as callback": config(
            trainer__callbacks=[{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "../canary"]}}]
        ),
        "os.system as a function": config(
            trainer__callbacks=[{"class_path": lambda_callback, "init_args": {"on_fit_start": "os.system"}}]
        ),
        "torch.os.system as a function": config(
            trainer__callbacks=[{"class_path": lambda_callback, "init_args": {"on_fit_start": "torch.os.system"}}]
        ),
        "a function of a module beside it": config(
            trainer__callbacks=[{"class_path": lambda_callback, "init_args": {"on_fit_start": "evil.call"}}]
        ),
        "builtins.eval as model": config(model__class_path="builtins.eval"),
        "pickle.loads as model": config(model__class_path="pickle.loads"),
        "jsonargparse itself": config(model__class_path="jsonargparse.set_parsing_settings"),
        "wrap_classifier of a module beside it": config(
            model__class_path="cfe_lightning.methods.stylex.StylEx",
            model__init_args__classifier={
                "class_path": f"{sources}.wrap_classifier",
                "init_args": {"class_path": "evil.Network", **wrap},
            },
            data={"class_path": "cfe_lightning.data.synthetic.SyntheticShapes"},
        ),
        "load_classifier that trusts a module beside it": config(
            model__class_path="cfe_lightning.methods.stylex.StylEx",
            model__init_args__classifier={
                "class_path": "cfe_lightning.classifier.load_classifier",
                "init_args": {"path": "evil.pt", "trusted": ["evil"]},
            },
            data={"class_path": "cfe_lightning.data.synthetic.SyntheticShapes"},
        ),
        "an exported program": config(
            model__class_path="cfe_lightning.methods.stylex.StylEx",
            model__init_args__classifier={
                "class_path": f"{sources}.exported_classifier",
                "init_args": {
                    **{key: value for key, value in wrap.items() if key != "state_dict_path"},
                    "path": "evil.py",
                },
            },
            data={"class_path": "cfe_lightning.data.synthetic.SyntheticShapes"},
        ),
        "a class hidden in arguments": config(
            model__class_path="cfe_lightning.methods.stylex.StylEx",
            model__init_args__classifier={
                "class_path": f"{sources}.torchvision_classifier",
                "init_args": {
                    "name": "resnet18",
                    "class_names": ["a", "b"],
                    "init_args": {"norm_layer": {"class_path": "evil.Network"}},
                },
            },
            data={"class_path": "cfe_lightning.data.synthetic.SyntheticShapes"},
        ),
        "the network of a classifier that is trained": config(
            model={
                "class_path": "cfe_lightning.classifier.training.ClassifierTraining",
                "init_args": {"output": "out/classifier.pt", "architecture": "evil.Network"},
            },
            data={"class_path": "cfe_lightning.data.synthetic.SyntheticShapes"},
        ),
        "a path with a newline": config(model__class_path="evil\n.Model"),
        "a relative path": config(model__class_path="..evil.Model"),
        "a path of 100,000 letters": config(model__class_path="a." * 50_000),
    }
    return found | {name: json.dumps(content) for name, content in named.items()}


def _wrong_values() -> dict[str, str]:
    method = "cfe_lightning.methods.stylex.StylEx"
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    return {
        "no model": json.dumps({key: value for key, value in config().items() if key != "model"}),
        "no data": json.dumps({key: value for key, value in config().items() if key != "data"}),
        "a model that is a number": as_yaml(model=5),
        "a model that is data": as_yaml(model__class_path="toy.ToyData", model__init_args={}),
        "data that are a model": as_yaml(data__class_path=method),
        "an unknown section": as_yaml(secrets={"a": 1}),
        "an unknown argument": as_yaml(model__init_args__novel=1),
        "a text as number": as_yaml(model__init_args__amplitude="much"),
        "not a number": as_yaml(model__init_args__num_steps=float("nan")),
        "minus one image": as_yaml(data__init_args__batch_size=-1),
        "no images at all": as_yaml(data__init_args__num_images=0),
        "images of 10^9 pixels a side": as_yaml(data__init_args__image_size=10**9),
        "10^12 images": as_yaml(data__init_args__num_images=10**12),
        "minus two workers": as_yaml(data__init_args__num_workers=-2),
        "no epochs of text": as_yaml(trainer__max_epochs="all"),
        "a device that is not there": as_yaml(trainer__accelerator="cuda9"),
        "99 GPUs": as_yaml(trainer__accelerator="gpu", trainer__devices=99),
        "a precision that is not there": as_yaml(trainer__precision="3-bit"),
        "a strategy that is not there": as_yaml(trainer__strategy="telepathy"),
        "a seed below zero": as_yaml(seed_everything=-1),
        "a seed of 100 digits": as_yaml(seed_everything=10**99),
        "a classifier that is not there": as_yaml(model__init_args__classifier__init_args__path="gone.pt"),
        "a classifier that is a folder": as_yaml(model__init_args__classifier__init_args__path="config"),
        "a classifier that is this config": as_yaml(model__init_args__classifier__init_args__path="config/given.yaml"),
        "a classifier with a NUL in its path": as_yaml(model__init_args__classifier__init_args__path="a\0b"),
        "a checkpoint called ../../x": as_yaml(
            trainer__callbacks=[{"class_path": checkpoint, "init_args": {"filename": "../../outside/x"}}]
        ),
        "a checkpoint with an absolute name": as_yaml(
            trainer__callbacks=[{"class_path": checkpoint, "init_args": {"filename": "/tmp/x"}}]
        ),
    }
