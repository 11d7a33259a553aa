import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from cfe_lightning.classifier import load_classifier
from cfe_lightning.classifier.weights import load_weights
from cfe_lightning.files.formats import foreign_format


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()


def archive(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, "{}")

    return write


def start(content):
    return lambda path: path.write_bytes(content + bytes(64))


def export(path):
    program = torch.export.export(network(), (torch.zeros(3, 1, 2, 2),))
    # PyTorch wants its own ending.
    torch.export.save(program, path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


KINDS = {
    "TorchScript": (lambda path: torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 1, 2, 2)), path),
                    "a TorchScript program: take it with .*exported_classifier"),
    "export": (export, "a torch.export program: take it with .*exported_classifier"),
    "export before 2.8": (archive("serialized_exported_program.json", "version"), "a torch.export program: take it"),
    "ONNX": (start(b"\x08\x08\x12\x07pytorch"), "an ONNX network: give the PyTorch network"),
    "HDF5": (start(b"\x89HDF\r\n\x1a\n"), "an HDF5 file, as Keras writes them: give the PyTorch network"),
    "Keras": (archive("metadata.json", "config.json", "model.weights.h5"), "a Keras network: give the PyTorch"),
    "TFLite": (start(b"\x1c\0\0\0TFL3"), "a TensorFlow Lite network"),
    "LFS": (start(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "a pointer of Git LFS"),
    "web page": (start(b"\n<!doctype html>"), "a web page: download the file itself"),
    "whole model": (lambda path: torch.save(network(), path), r"tensors \(torch.nn.modules.container.Sequential"),
    "whole model inside": (lambda path: torch.save({"ema": network()}, path), r"more than tensors \(torch.nn.modules"),
    "newer pickle": (lambda path: torch.save(network(), path, pickle_protocol=4), "pickle of more than tensors, such"),
    "folder": (lambda path: path.mkdir(), "a folder: name the file of weights in it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_both_doors_name_what_a_file_is_and_the_way_in(kind, tmp_path):
    write, message = KINDS[kind]
    # The ending says nothing.
    write(path := tmp_path / "given.pt")
    for door in (load_classifier, lambda given: load_weights(network(), given)):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            door(str(path))
        assert str(caught.value).count("\n") == 0


def test_safetensors_hold_no_classifier(tmp_path):
    safetensors.torch.save_file(network().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"weights alone, written by safetensors: take it with .*wrap_classifier"):
        load_classifier(str(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    "name", ["microsoft/resnet-50", "timm/resnet50.a1_in1k", "hf-hub:timm/vit", "https://x.org/a.pt"]
)
def test_names_of_model_hubs_are_told_from_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for door in (load_classifier, lambda given: load_weights(network(), given)):
        with pytest.raises(FileNotFoundError, match="is no file, but looks like a name on a model hub"):
            door(name)


@pytest.mark.parametrize("name", ["runs/best.pt", "here/best", "../a/b", "/no/such", "best", "runs/a/best"])
def test_missing_files_are_no_names_of_hubs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert foreign_format(name) is None


def test_plain_weights_are_nothing_foreign(tmp_path):
    torch.save(network().state_dict(), tmp_path / "plain.pt")
    assert foreign_format(tmp_path / "plain.pt") is None


def test_a_broken_archive_is_no_fault_of_the_program(tmp_path):
    path = tmp_path / "broken.pt"
    torch.save(network().state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] = 0
    path.write_bytes(content)
    for door in (load_classifier, lambda given: load_weights(network(), given)):
        with pytest.raises(ValueError, match="truncated, damaged"):
            door(str(path))
