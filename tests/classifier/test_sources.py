import logging
import pickle
from urllib.error import URLError

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torchvision import models
from toy import ToyExplainer, ToyNetwork, save_checkpoint, toy_images

from cfe_lightning.classifier import (
    FrozenClassifier,
    exported_classifier,
    load_classifier,
    torchvision_classifier,
    wrap_classifier,
)
from cfe_lightning.explainer import load_explainer

TOY = {"class_path": "toy.ToyNetwork", "class_names": ["a", "b"], "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
EXPORT = {"class_names": ["a", "b"], "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def toy_weights(tmp_path):
    torch.manual_seed(1)
    network = ToyNetwork()
    nn.init.normal_(network.fc.weight)
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "toy.ckpt")
    return network.eval(), str(tmp_path / "toy.ckpt")


def small_network(outputs=2, seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(4, outputs)).eval()


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_torchvision_metadata_are_used_and_a_warning_says_that_weights_are_random(caplog):
    with caplog.at_level(logging.WARNING):
        classifier = torchvision_classifier("mobilenet_v2")
    spec = classifier.spec
    assert spec.class_path == "torchvision.models.mobilenet_v2"
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert spec.image_size == 224
    assert (classifier.num_classes, classifier.class_names[1]) == (1000, "goldfish")
    assert (spec.head, spec.feature_map) == ("classifier.1", "features")
    assert "mobilenet_v2 has random weights" in caplog.text


def test_torchvision_with_a_file_of_other_classes(tmp_path):
    trained = models.resnet18(weights=None, num_classes=3).eval()
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    arguments = {"class_names": ["x", "y", "z"], "image_size": 64}
    classifier = torchvision_classifier("resnet18", weights=str(tmp_path / "mine.pth"), **arguments)
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    prepared = ((image + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert torch.allclose(classifier(image), trained(prepared), atol=1e-5)
    with pytest.raises(ValueError, match=r"of another shape \(fc.weight \[3, 512\] instead of \[2, 512\]"):
        torchvision_classifier("resnet18", weights=str(tmp_path / "mine.pth"), class_names=["x", "y"], image_size=64)


def test_torchvision_with_a_file_of_one_output(tmp_path):
    trained = models.squeezenet1_1(weights=None, num_classes=1).eval()
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    classifier = torchvision_classifier("squeezenet1_1", str(tmp_path / "mine.pth"), ["no", "yes"], image_size=64)
    assert classifier.spec.init_args["num_classes"] == 1
    logits = classifier(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert logits.shape == (2, 2)
    assert torch.equal(logits[:, 0], torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "weights"), [("squeezenet1_1", "DEFAULT"), ("googlenet", "GoogLeNet_Weights.DEFAULT")]
)
def test_torchvision_weights_by_name_rebuild_without_a_download(name, weights, tmp_path, monkeypatch):
    torch.manual_seed(0)
    auxiliary = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    published = models.get_model(name, weights=None, **auxiliary).state_dict()
    asked = []
    monkeypatch.setattr(
        models.WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: asked.append(self.name) or published
    )
    classifier = torchvision_classifier(name, weights=weights)
    assert len(asked) == 1
    classifier.save(tmp_path / "file.pt")
    again = load_classifier(str(tmp_path / "file.pt"))
    assert len(asked) == 1
    image = torch.rand(1, 3, 224, 224) * 2 - 1
    assert torch.equal(again(image), classifier(image))
    assert again.fingerprint() == classifier.fingerprint()


def test_a_file_may_hold_the_heads_of_training(tmp_path):
    trained = models.googlenet(weights=None, num_classes=2, init_weights=False, aux_logits=True).eval()
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    arguments = {"init_args": {"transform_input": False}, "image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}
    path = str(tmp_path / "mine.pth")
    classifier = torchvision_classifier("googlenet", weights=path, class_names=["a", "b"], **arguments)
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(classifier(image), trained(image), atol=1e-5)


def test_a_vision_transformer_is_built_for_the_size():
    classifier = torchvision_classifier("vit_b_32", class_names=["a", "b"], image_size=64)
    assert classifier(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    assert classifier.spec.init_args == {"num_classes": 2, "image_size": 64}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"name": "resnet19"}, ValueError, "no classification network 'resnet19'"),
        ({"name": "fcn_resnet50"}, ValueError, "no classification network 'fcn_resnet50'"),
        (
            {"name": "resnet18", "weights": "IMAGENET1K_V9"},
            FileNotFoundError,
            "'IMAGENET1K_V9' are neither a file nor among resnet18's: IMAGENET1K_V1, DEFAULT",
        ),
        (
            {"name": "resnet18", "weights": "DEFAULT", "class_names": ["a", "b"]},
            ValueError,
            "The weights DEFAULT of resnet18 know 1000 classes, but class_names has 2",
        ),
        (
            {"name": "resnet18", "init_args": {"depth": 3}},
            ValueError,
            r"torchvision.models.resnet18 cannot be built with init_args \{'num_classes': 1000, 'depth': 3\}",
        ),
        (
            {"name": "resnet18", "class_names": ["a", "b"], "image_size": 32, "mean": [0.5], "std": [0.5]},
            ValueError,
            r"torchvision.models.resnet18 cannot take images \[2, 1, 32, 32\] \(set image_size, and one mean",
        ),
    ],
)
def test_torchvision_refusals(arguments, kind, message):
    with pytest.raises(kind, match=message):
        torchvision_classifier(**arguments)


# --- a class of the user's -------------------------------------------------------------------------------------------


def test_a_users_class_is_wrapped_and_traced(toy_weights, tmp_path):
    network, path = toy_weights
    classifier = wrap_classifier(**TOY, state_dict_path=path)
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.allclose(classifier(image), network(image), atol=1e-6)
    assert classifier.spec.head == "fc"
    assert torch.allclose(classifier.head(classifier.features(image)), classifier(image), atol=1e-6)
    classifier.save(tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"names 'toy.ToyNetwork', .* pass trusted=\['toy'\] .* --trusted toy\)"):
        load_classifier(str(tmp_path / "file.pt"))
    assert torch.equal(load_classifier(str(tmp_path / "file.pt"), trusted=["toy"])(image), classifier(image))


def test_a_key_chooses_among_the_weights_in_a_file(toy_weights, tmp_path):
    network, _ = toy_weights
    raw, image = network.state_dict(), torch.rand(3, 3, 16, 16) * 2 - 1
    average = {name: value * 2 if name == "fc.weight" else value for name, value in raw.items()}
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "both.pt")
    taken = wrap_classifier(**TOY, state_dict_path=str(tmp_path / "both.pt"))
    chosen = wrap_classifier(**TOY, state_dict_path=str(tmp_path / "both.pt"), weights_key="state_dict")
    assert torch.equal(taken.network.fc.weight, 2 * chosen.network.fc.weight)
    assert torch.allclose(chosen(image), network(image), atol=1e-6)


def test_a_key_chooses_for_a_network_of_torchvision(tmp_path):
    student, teacher = (models.shufflenet_v2_x0_5(num_classes=2).state_dict() for _ in range(2))
    torch.save({"student": student, "teacher": teacher}, path := tmp_path / "both.pt")
    arguments = {"name": "shufflenet_v2_x0_5", "weights": str(path), "class_names": ["a", "b"], "image_size": 64}
    with pytest.raises(ValueError, match="holds two sets of weights that fit, 'student' and 'teacher'"):
        torchvision_classifier(**arguments)
    classifier = torchvision_classifier(**arguments, weights_key="teacher")
    assert torch.equal(classifier.network.fc.bias, teacher["fc.bias"])


def test_blue_green_red_is_applied_after_mean_and_std(toy_weights):
    _, path = toy_weights
    other = {**TOY, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    rgb = wrap_classifier(**other, state_dict_path=path)
    bgr = wrap_classifier(**other, state_dict_path=path, bgr=True)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(bgr.prepare(image), rgb.prepare(image).flip(1))


def test_layers_can_be_named(toy_weights):
    _, path = toy_weights
    classifier = wrap_classifier(**TOY, state_dict_path=path, feature_map="norm")
    assert classifier.spec.feature_map == "norm"
    assert classifier.feature_map(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="head names 'classifier', but ToyNetwork has no such layer"):
        wrap_classifier(**TOY, state_dict_path=path, head="classifier")
    with pytest.raises(ValueError, match=r"feature_map names 'fc', but its output \[2, 2\] is no map"):
        wrap_classifier(**TOY, state_dict_path=path, feature_map="fc")


class Outputs(nn.Module):
    """Returns one logit, logits, probabilities, a dictionary or a map, by ``kind``."""

    def __init__(self, kind: str = "one") -> None:
        super().__init__()
        self.kind = kind
        self.body = small_network({"one": 1, "squeezed": 1}.get(kind, 3))

    def forward(self, image):
        logits = self.body(image)
        match self.kind:
            case "squeezed":
                return logits.squeeze(1)
            case "probabilities":
                return logits.softmax(dim=1)
            case "dictionary":
                return {"logits": logits}
            case "map":
                return logits[:, :, None, None].expand(-1, -1, 4, 4)
        return logits


def wrapped_outputs(kind, tmp_path, class_names, **arguments):
    torch.save(Outputs(kind).state_dict(), tmp_path / "weights.pt")
    names = {"class_path": f"{__name__}.Outputs", "class_names": class_names}
    weights = str(tmp_path / "weights.pt")
    return wrap_classifier(**(TOY | names), init_args={"kind": kind}, state_dict_path=weights, **arguments)


@pytest.mark.parametrize("kind", ["one", "squeezed"])
def test_one_output_before_a_sigmoid_becomes_two_classes(kind, tmp_path):
    classifier = wrapped_outputs(kind, tmp_path, ["benign", "malignant"])
    image = torch.rand(4, 3, 8, 8) * 2 - 1
    z = classifier.network(classifier.prepare(image)).flatten()
    assert classifier.class_names == ("benign", "malignant")
    assert torch.allclose(classifier(image).softmax(dim=1)[:, 1], z.sigmoid(), atol=1e-6)
    assert torch.allclose(classifier.head(classifier.features(image)), classifier(image), atol=1e-6)
    labelled = wrapped_outputs(kind, tmp_path, ["malignant"], label="malignant")
    assert labelled.class_names == ("not malignant", "malignant")
    assert torch.equal(labelled(image), classifier(image))


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("one", ["a", "b", "c"], r"has 1 output, so class_names needs 2 names, but has 3: \['a', 'b', 'c'\]"),
        ("three", ["a", "b"], r"has 3 outputs, so class_names needs 3 names, but has 2"),
        ("probabilities", ["a", "b", "c"], "returns probabilities, but logits are needed"),
        ("map", ["a", "b", "c"], r"logits \[B, K\] are needed, but 2 images gave \[2, 3, 4, 4\] of float32; wrap it"),
    ],
)
def test_what_is_no_logits_is_refused(kind, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        wrapped_outputs(kind, tmp_path, names)


def test_wrong_arguments_of_the_class_are_named(toy_weights):
    _, path = toy_weights
    with pytest.raises(ValueError, match=r"toy.ToyNetwork cannot be built with init_args \{'depth': 3\}: .*depth"):
        wrap_classifier(**TOY, state_dict_path=path, init_args={"depth": 3})
    with pytest.raises(ValueError, match=r"'toy.NoNetwork' cannot be imported: .*NoNetwork"):
        wrap_classifier(**{**TOY, "class_path": "toy.NoNetwork"}, state_dict_path=path)


# --- exported programs -----------------------------------------------------------------------------------------------


def script(network, path):
    torch.jit.save(torch.jit.script(network), path)


def trace(network, path):
    torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 16, 16)), path)


def export(network, path, dynamic=True):
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=shapes), path)


@pytest.fixture(params=[script, trace, export], ids=["script", "trace", "export"])
def exported(request, tmp_path):
    network = small_network()
    path = tmp_path / "program.pt2"
    request.param(network, path)
    return network, exported_classifier(str(path), **EXPORT)


def test_an_exported_program_gives_logits_and_gradients_but_no_features(exported):
    network, classifier = exported
    image = (torch.rand(5, 3, 16, 16) * 2 - 1).requires_grad_()
    expected = network((image * 0.5 + 0.5 - 0.5) / 0.25)
    assert torch.allclose(classifier(image), expected, atol=1e-5)
    found, wanted = (torch.autograd.grad(logits[:, 1].sum(), image)[0] for logits in (classifier(image), expected))
    assert torch.allclose(found, wanted, atol=1e-5)
    classifier.require_gradient()
    assert list(classifier.parameters()) == []
    classifier(image).sum().backward()
    assert all(weight.grad is None for program in classifier.network._program for weight in program.parameters())
    message = r"\(ExportedNetwork\) has no feature map that this method could read.*only logits \(DXAI, StylEx, Steer"
    with pytest.raises(ValueError, match=message):
        classifier.feature_map(image)
    with pytest.raises(ValueError, match=r"has no head that this method could read"):
        classifier.features(image)


def test_a_file_alone_rebuilds_the_program_where_it_is_trusted(exported, tmp_path):
    _, classifier = exported
    classifier.save(tmp_path / "file.pt")
    for path in tmp_path.glob("program*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"program, which can do anything .* pass trusted=\['exported_program'\]"):
        load_classifier(str(tmp_path / "file.pt"))
    again = load_classifier(str(tmp_path / "file.pt"), trusted=["exported_program"])
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(again(image), classifier(image))
    assert again.fingerprint() == classifier.fingerprint()
    copied = pickle.loads(pickle.dumps(classifier))
    assert torch.equal(copied(image), classifier(image))


def test_an_explainer_checkpoint_alone_rebuilds_the_program(tmp_path):
    script(small_network(), tmp_path / "program.pt")
    explainer = ToyExplainer(exported_classifier(str(tmp_path / "program.pt"), **EXPORT))
    path = save_checkpoint(explainer, tmp_path / "best.ckpt")
    (tmp_path / "program.pt").unlink()
    with pytest.raises(ValueError, match=r"--trusted exported_program"):
        load_explainer(path, trusted=["toy"])
    again = load_explainer(path, trusted=["toy", "exported_program"])
    image = toy_images()
    assert torch.equal(again.classifier(image), explainer.classifier(image))
    assert again.classifier.fingerprint() == explainer.classifier.fingerprint()


def test_a_state_dictionary_cannot_exchange_the_program(tmp_path):
    for seed in (0, 1):
        script(small_network(seed=seed), tmp_path / f"{seed}.pt")
    first, second = (exported_classifier(str(tmp_path / f"{seed}.pt"), **EXPORT) for seed in (0, 1))
    first.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="is another one than the one given"):
        first.load_state_dict(second.state_dict())


def test_a_program_for_one_batch_size_is_refused(tmp_path):
    export(small_network(), tmp_path / "fixed.pt2", dynamic=False)
    with pytest.raises(ValueError, match=r"fixed.pt2 takes only batches of 2 images: export it for any number, with"):
        exported_classifier(str(tmp_path / "fixed.pt2"), **EXPORT)


def test_a_program_in_train_mode_is_refused(tmp_path):
    network = small_network().train()
    network[5].p = 0.0
    torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 16, 16), check_trace=False), tmp_path / "train.pt")
    with pytest.raises(ValueError, match=r"exported in train mode: call network.eval\(\) and export it again"):
        exported_classifier(str(tmp_path / "train.pt"), **EXPORT)


def test_a_script_in_train_mode_is_put_into_eval_mode(tmp_path):
    network = small_network()
    script(network.train(), tmp_path / "train.pt")
    classifier = exported_classifier(str(tmp_path / "train.pt"), **EXPORT)
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.allclose(classifier(image), network.eval()(image * 2), atol=1e-5)


def test_a_program_without_gradients_is_refused_by_who_needs_them(tmp_path):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_network()

        def forward(self, image):
            return self.body(image).detach()

    script(Detached(), tmp_path / "detached.pt")
    classifier = exported_classifier(str(tmp_path / "detached.pt"), **EXPORT)
    with pytest.raises(ValueError, match=r"No gradient reaches the image .* choose DiffExplainer, which needs only"):
        classifier.require_gradient()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no file of torch.jit.save or torch.export.save"),
        (b"not a zip file", "no file of torch.jit.save or torch.export.save"),
        (None, "a pickled object or state dictionary and no program; name its class with wrap_classifier"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "file.pt"
    if content is None:
        torch.save(small_network().state_dict(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file.pt cannot be used as an exported classifier: this .*{message}"):
        exported_classifier(str(path), **EXPORT)
    with pytest.raises(FileNotFoundError, match="There is no exported program"):
        exported_classifier(str(tmp_path / "none.pt"), **EXPORT)


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_every_source_is_a_class_path_in_yaml(toy_weights, tmp_path):
    network, path = toy_weights
    script(network, tmp_path / "toy.pt")
    torch.save(models.resnet18(weights=None, num_classes=2).state_dict(), tmp_path / "resnet.pth")
    common = "class_names: [a, b], image_size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]"
    sources = {
        "wrap_classifier": f"{{class_path: toy.ToyNetwork, init_args: {{num_classes: 2}}, "
        f"state_dict_path: '{path}', {common}}}",
        "exported_classifier": f"{{path: '{tmp_path / 'toy.pt'}', {common}}}",
        "torchvision_classifier": f"{{name: resnet18, weights: '{tmp_path / 'resnet.pth'}', {common}}}",
    }
    image = torch.rand(2, 3, 16, 16) * 2 - 1

    # One parser per source.
    for name, arguments in sources.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--classifier", type=FrozenClassifier)
        yaml = f"{{class_path: cfe_lightning.classifier.sources.{name}, init_args: {arguments}}}"
        classifier = parser.instantiate_classes(parser.parse_args([f"--classifier={yaml}"])).classifier
        assert isinstance(classifier, FrozenClassifier)
        if name != "torchvision_classifier":
            assert torch.allclose(classifier(image), network(image), atol=1e-5)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"The weights DEFAULT of resnet18 could not be downloaded \(no network\)"):
        torchvision_classifier("resnet18", "DEFAULT")
