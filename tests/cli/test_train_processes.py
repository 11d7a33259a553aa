"""train.py as two processes on the CPU, from the same command: equal weights, shared work, an untouched classifier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml

from cfe_lightning.classifier import load_classifier

CHECKOUT = Path(__file__).parents[2]


TOY = {"class_path": "toy.ToyExplainer", "init_args": {}}
#: With both lazy penalties in every second iteration, each of which a process could miss by itself.
STYLEX = {"class_path": "cfe_lightning.methods.stylex.StylEx", "init_args": toy.STYLEX}


@pytest.mark.parametrize(
    ("model", "moved"), [(TOY, "class_images"), (STYLEX, "generator.mapping.layers.0.weight")], ids=["toy", "stylex"]
)
def test_two_processes_train_one_model(model: dict[str, Any], moved: str, tmp_path: Path) -> None:
    toy.toy_classifier().save(tmp_path / "classifier.pt")
    load = {"path": "classifier.pt", "trusted": ["toy"]}
    classifier = {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": load}
    config = {
        "model": model | {"init_args": {"classifier": classifier, **model["init_args"]}},
        "data": {"class_path": "toy.ToyData", "init_args": {"num_images": 16, "batch_size": 2}},
        "trainer": {
            "max_epochs": 1,
            "logger": False,
            "callbacks": [
                {"class_path": "cfe_lightning.callbacks.EMA", "init_args": {"decay": 0.9}},
                {
                    "class_path": "cfe_lightning.callbacks.SampleGrid",
                    "init_args": {"every_n_batches": 2, "num_images": 2},
                },
                {"class_path": "toy.Witness", "init_args": {"folder": "seen"}},
            ],
        },
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(sys.executable, str(CHECKOUT / "train.py"), "--config", "toy.yaml"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2"),
    ]
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PL_")}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "seen" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]
    assert first["weights"][moved] != 0
    fingerprint = load_classifier(str(tmp_path / "classifier.pt"), ["toy"]).fingerprint()
    assert first["classifier"] == second["classifier"] == fingerprint
    # Half of the images each, none twice, and random numbers of their own.
    assert len(first["names"]) == len(second["names"]) == 8
    assert len({*first["names"], *second["names"]}) == 16
    assert first["draws"][0] != second["draws"][0]
    saved = torch.load(tmp_path / "checkpoints" / "toy" / "last.ckpt", weights_only=True)
    assert len(saved["callbacks"]["RandomState"]["processes"]) == 2
    written = sorted(path.name for path in (tmp_path / "checkpoints" / "toy").rglob("*") if path.is_file())
    assert written == [
        "00000000.png",
        "00000002.png",
        "00000004.png",
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "metrics.csv",
    ]
