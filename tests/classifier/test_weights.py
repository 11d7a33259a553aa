import pytest
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
        r"weights.pt do not fit Sequential: 1 missing \(3.bias\); 1 unexpected \(9.bias\); "
        r"1 of another shape \(3.weight \[5, 8\] instead of \[3, 8\]\)\."
    )
    with pytest.raises(ValueError, match=message):
        load_weights(network, saved(content, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_value_without_a_shape_does_not_fit(tmp_path):
    content = dict(network_of().state_dict()) | {"3.bias": "text"}
    with pytest.raises(ValueError, match=r"fit Sequential: 1 of another shape \(3.bias None instead of \[3\]\)\."):
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
