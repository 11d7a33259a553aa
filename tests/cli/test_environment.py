import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfe_lightning.cli.environment import check_torchvision

ROOT = Path(__file__).parents[2]


def installed(folder, name, version, code, requires=()):
    """A package that fails as code says, with the metadata that pip would have left."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")


def check_beside(folder):
    """What the check says in a fresh interpreter that finds the packages of a folder first."""
    program = "from cfe_lightning.cli.environment import check_torchvision\n"
    program += "try:\n    check_torchvision()\nexcept ValueError as error:\n    print(error)\n"
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_pair_that_runs_these_tests_fits():
    check_torchvision()


@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "raise ImportError('operator torchvision::nms does not exist')",
        "raise OSError('operator torchvision::nms does not exist')",
    ],
)
def test_a_mismatch_is_one_sentence_with_both_versions_and_the_repair(code, tmp_path):
    installed(tmp_path, "torch", "2.11.0", "")
    requires = ["numpy", "torch==2.10.0", "gdown>=4.7.3; extra == 'gdown'"]
    installed(tmp_path, "torchvision", "0.25.0", code, requires)
    assert check_beside(tmp_path) == (
        "torchvision 0.25.0 does not fit torch 2.11.0 (operator torchvision::nms does not exist); it was made for "
        "torch==2.10.0: install matching releases from the same index with "
        "`python -m pip install --upgrade --force-reinstall torch torchvision`."
    )


def test_a_missing_torchvision_is_named(tmp_path):
    installed(tmp_path, "torchvision", "0.25.0", "import a_package_that_is_not_there")
    assert check_beside(tmp_path).startswith(
        "No module named 'a_package_that_is_not_there': torch and torchvision are both needed; install them with `"
    )


def test_older_metadata_are_read_too(tmp_path):
    installed(tmp_path, "torchvision", "0.25.0", "raise RuntimeError('x')", ["torch (>=2.14.0)"])
    assert "it was made for torch>=2.14.0:" in check_beside(tmp_path)


@pytest.mark.parametrize("command", ["train", "explain", "evaluate"])
def test_every_command_checks_before_anything_heavy_is_imported(command, tmp_path, monkeypatch, capsys):
    def mismatch():
        raise ValueError("torchvision does not fit torch.")

    module = importlib.import_module(f"cfe_lightning.cli.{command}")
    monkeypatch.setattr(module, "check_torchvision", mismatch)
    (tmp_path / "photos").mkdir()
    given = {
        "train": [],
        "explain": ["--checkpoint", "a.ckpt", "--input", f"{tmp_path}/photos", "--output", f"{tmp_path}/out"],
        "evaluate": ["--checkpoint", "a.ckpt", "--data", f"{tmp_path}/photos", "--output", f"{tmp_path}/out"],
    }
    assert module.main(given[command]) == 2
    assert capsys.readouterr().err == "error: torchvision does not fit torch.\n"
    assert not (tmp_path / "out").exists()
