import logging

import pytest
import safetensors.torch
import torch
from classifiers import spec_of
from torch import nn

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.classifier.weights import load_weights


def network_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def saved(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


WRAPPINGS = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "nested": lambda weights: {"model": {"state_dict": weights}, "optimizer": {"lr": 0.1}},
    "data parallel": lambda weights: prefixed(weights, "module."),
    "compiled": lambda weights: prefixed(weights, "_orig_mod."),
    "lightning": lambda weights: {"state_dict": prefixed(weights, "model.") | {"loss.weight": torch.ones(3)}},
    "three deep": lambda weights: {"state_dict": prefixed(weights, "model.module._orig_mod.")},
    "backbone": lambda weights: {"state_dict": prefixed(weights, "backbone."), "epoch": 3},
    "fabric": lambda weights: {"model": prefixed(weights, "_forward_module.")},
    "nested backbone": lambda weights: prefixed(weights, "model.backbone.") | {"model.neck.weight": torch.ones(3)},
    "other key": lambda weights: {
        "net_state": weights,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 1, 1, 1)}}},
    },
    "beside tensors": lambda weights: {"mean": torch.ones(3), "trained": dict(weights)},
    "list": lambda weights: {"models": [dict(weights)]},
    "saved twice": lambda weights: prefixed(weights, "model.") | prefixed(weights, "network."),
    "old batch norm": lambda weights: {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_usual_wrappings_are_taken_off(wrapping, tmp_path):
    trained, network = network_of(1), network_of(2)
    load_weights(network, saved(WRAPPINGS[wrapping](dict(trained.state_dict())), tmp_path))
    for name, value in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_a_network_whose_own_layer_is_called_model_keeps_its_names(tmp_path):
    trained, network = nn.ModuleDict({"model": network_of(1)}), nn.ModuleDict({"model": network_of(2)})
    load_weights(network, saved(trained.state_dict(), tmp_path))
    assert torch.equal(network["model"][0].weight, trained["model"][0].weight)


def test_names_of_heads_for_training_are_left_out(tmp_path):
    trained, network = network_of(1), network_of(2)
    content = dict(trained.state_dict()) | {"aux.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 unexpected \(aux.weight\)"):
        load_weights(network, saved(content, tmp_path))
    load_weights(network, saved(content, tmp_path), without=["aux."])
    assert torch.equal(network[0].weight, trained[0].weight)


def test_a_mismatch_names_what_differs_and_changes_nothing(tmp_path):
    network = network_of()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    content = prefixed(network_of(1).state_dict(), "module.")
    content["module.3.weight"] = torch.zeros(5, 8)
    content["module.9.bias"] = content.pop("module.3.bias")
    message = (
        r"weights.pt do not fit Sequential: below 'module', 7 of 8 names are there; "
        r"1 missing \(3.bias\); 1 unexpected \(9.bias\); "
        r"1 of another shape \(3.weight \[5, 8\] instead of \[3, 8\]\); give the class and"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(network, saved(content, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_value_without_a_shape_does_not_fit(tmp_path):
    content = dict(network_of().state_dict()) | {"3.bias": "text"}
    with pytest.raises(ValueError, match=r"names are there; 1 of another shape \(3.bias None instead of \[3\]\); give"):
        load_weights(network_of(), saved(content, tmp_path))


def test_long_lists_are_shortened(tmp_path):
    with pytest.raises(ValueError, match=r"9 missing \(0.weight, 0.bias, 1.weight, 1.bias, ...\); 1 unexpected \(x\)"):
        load_weights(nn.Sequential(*network_of(), nn.Linear(3, 3, bias=False)), saved({"x": torch.ones(1)}, tmp_path))


def test_nothing_in_the_file_is_executed(tmp_path):
    path = saved(network_of(), tmp_path)
    with pytest.raises(
        ValueError, match=r"could run its code: write the weights alone, with torch.save\(network.state_dict\(\)"
    ):
        load_weights(network_of(), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "other": {"a": 1}}, r"holds no state dictionary; its keys are \['epoch', 'other'\]"),
        (torch.ones(2), "holds a Tensor and no state dictionary"),
    ],
)
def test_other_content_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_weights(network_of(), saved(content, tmp_path))


def test_our_own_file_and_a_missing_file_are_told_apart(tmp_path):
    FrozenClassifier(network_of(), spec_of(head=None)).save(tmp_path / "ours.pt")
    with pytest.raises(ValueError, match="is a classifier file of cfe_lightning: read it with load_classifier"):
        load_weights(network_of(), tmp_path / "ours.pt")
    with pytest.raises(FileNotFoundError, match="There is no file of weights"):
        load_weights(network_of(), tmp_path / "none.pt")


def holds(network, seed):
    return all(torch.equal(value, network_of(seed).state_dict()[name]) for name, value in network.state_dict().items())


def test_safetensors_are_known_by_content(tmp_path):
    network, path = network_of(2), tmp_path / "weights.bin"
    safetensors.torch.save_file(prefixed(network_of(1).state_dict(), "model."), path)
    load_weights(network, path)
    assert holds(network, 1)
    whole = path.read_bytes()
    for length in (9, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights\.bin is a safetensors file, but truncated or damaged"):
            load_weights(network_of(), path)


def test_the_removed_prefix_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load_weights(network_of(), saved({"state_dict": prefixed(network_of(1).state_dict(), "backbone.")}, tmp_path))
    assert "The weights are those below 'state_dict.backbone'" in caplog.text


# Raw weights have seed 1, those of EMA seed 2.
BESIDE = {
    "timm": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema},
    "detr": lambda raw, ema: {"model": prefixed(raw, "module."), "model_ema": {"model": ema}},
    "dinov2": lambda raw, ema: {"ema": {"module": ema}, "model": raw},
    "ema first": lambda raw, ema: {"ema_state_dict": ema, "model": raw},
    "lightning": lambda raw, ema: {"state_dict": prefixed(raw, "model.") | prefixed(ema, "ema_model.module.")},
    "upper case": lambda raw, ema: {"model": raw, "EMA": ema},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_weights_of_ema_are_preferred_and_a_key_chooses(beside, tmp_path, caplog):
    path = saved(BESIDE[beside](dict(network_of(1).state_dict()), dict(network_of(2).state_dict())), tmp_path)
    network = network_of()
    load_weights(network, path)
    assert holds(network, 2)
    assert "holds EMA weights beside others" in caplog.text
    raw = "state_dict" if beside == "timm" else "model"
    assert f"weights_key '{'state_dict.model' if beside == 'lightning' else raw}" in caplog.text
    load_weights(network, path, key=raw)
    assert holds(network, 1)


def test_weights_of_ema_that_do_not_fit_are_said(tmp_path, caplog):
    raw = network_of(1).state_dict()
    # As latent diffusion writes them: without the dots.
    flat = {f"model_ema.{name.replace('.', '')}": value for name, value in raw.items()}
    network = network_of()
    load_weights(network, saved({"state_dict": prefixed(raw, "model.") | flat}, tmp_path))
    assert holds(network, 1)
    assert "also holds EMA weights (state_dict.model_ema.0weight, ...), which do not fit" in caplog.text


def test_a_layer_called_ema_is_no_average(tmp_path, caplog):
    network = nn.ModuleDict({"ema": network_of(2)})
    load_weights(network, saved({"state_dict": prefixed(network_of(1).state_dict(), "net.ema.")}, tmp_path))
    assert holds(network["ema"], 1)
    assert "EMA" not in caplog.text


def test_two_that_fit_are_refused_until_one_is_named(tmp_path):
    student, teacher = (dict(network_of(seed).state_dict()) for seed in (1, 2))
    path = saved({"state_dict": prefixed(student, "student.") | prefixed(teacher, "teacher.")}, tmp_path)
    with pytest.raises(
        ValueError, match=r"fit, 'state_dict.student' and 'state_dict.teacher': name one .* weights_key"
    ):
        load_weights(network_of(), path)
    network = network_of()
    for key, seed in (("student", 1), ("teacher.", 2), ("state_dict.student", 1)):
        load_weights(network, path, key=key)
        assert holds(network, seed)
    with pytest.raises(ValueError, match=r"holds no weights below the weights_key 'tutor'; there are .*student"):
        load_weights(network_of(), path, key="tutor")


@pytest.mark.parametrize("prefix", ["", "model.backbone."])
def test_another_number_of_classes_is_said(prefix, tmp_path):
    content = network_of().state_dict() | {"3.weight": torch.zeros(5, 8), "3.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match="number of classes differs, so build the network for 5 outputs instead of 3"):
        load_weights(network_of(), saved(prefixed(content, prefix), tmp_path))
