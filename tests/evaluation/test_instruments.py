"""Tests of ``cfe_lightning.evaluation.instruments`` and ``embeddings`` with random weights in files."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from classifiers import simple
from torch import Tensor, nn
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.v2.functional import normalize

from cfe_lightning.evaluation import instruments
from cfe_lightning.evaluation.embeddings import FaceEmbedding, SimSiamEmbedding, UserEmbedding
from cfe_lightning.evaluation.instruments import NAMES, Instruments, load_instruments, read_labels, weights_from


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- LPIPS -----------------------------------------------------------------------------------------------------------


def backbone(name: str) -> nn.Module:
    """Returns the features of torchvision's network."""
    torch.manual_seed(0)
    return getattr(torchvision.models, name)().features


@pytest.fixture(scope="module", autouse=True)
def no_classifiers() -> Iterator[None]:
    """Saves the time for the hundred million random weights of VGG's classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=make_layers(cfgs["D"])))
        yield


def written(name: str, features: nn.Module, path: Path) -> Path:
    """Writes another kind of file for each network: a whole model, its features, a model out of ``DataParallel``."""
    prefix = {"alexnet": "features.", "vgg16": "", "squeezenet1_1": "module.features."}[name]
    state = {f"{prefix}{key}": value for key, value in features.state_dict().items()}
    if prefix:
        state[f"{prefix.removesuffix('features.')}classifier.1.weight"] = torch.zeros(3)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module", params=["alexnet", "vgg16", "squeezenet1_1"])
def perceptual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns name and features of a backbone, and the instruments with its file."""
    features = backbone(request.param)
    path = written(request.param, features, tmp_path_factory.mktemp("lpips") / "backbone.pt")
    return request.param, features, load_instruments({"lpips": path})


def test_perceptual_distance_is_zero_of_the_same_only_and_symmetric(perceptual: Any) -> None:
    _, _, found = perceptual
    image, edited = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    assert found.lpips(image, image).tolist() == [0, 0]
    there = found.lpips(image, edited)
    assert there.shape == (2,)
    assert (there > 1e-4).all()
    assert not there.requires_grad
    torch.testing.assert_close(found.lpips(edited, image), there)


def test_perceptual_distance_is_torchmetrics_with_the_same_backbone(
    perceptual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, features, found = perceptual
    monkeypatch.setattr(torchvision.models, name, lambda weights: SimpleNamespace(features=features))
    kind = {"alexnet": "alex", "vgg16": "vgg", "squeezenet1_1": "squeeze"}[name]
    image, edited = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    expected = learned_perceptual_image_patch_similarity(image, edited, net_type=kind, reduction="none")  # type: ignore[arg-type]
    torch.testing.assert_close(found.lpips(image, edited), expected, rtol=1e-3, atol=1e-5)


def test_small_and_grey_images_are_made_large_and_coloured(tmp_path: Path) -> None:
    path = written("squeezenet1_1", backbone("squeezenet1_1"), tmp_path / "weights.pt")
    lpips = load_instruments({"lpips": path}).lpips
    assert lpips is not None
    grey, edited = noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1)
    # Equal channels, enlarged to 64 pixels.
    coloured = (one.expand(-1, 3, -1, -1) for one in (grey, edited))
    large = [nn.functional.interpolate(one, size=(64, 64), mode="bilinear") for one in coloured]
    assert torch.equal(lpips(grey, edited), lpips(*large))
    assert lpips(grey, edited).isfinite().all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"features.0.weight": torch.zeros(64, 3, 7, 7)}, "are those of none of the three networks"),
        (
            {"features.0.weight": torch.zeros(64, 3, 3, 3)},
            r"not those of torchvision's vgg16: 0.bias, 2.weight, .* differ",
        ),
        ({"fc.weight": torch.zeros(2, 2)}, r"its layers \(fc.weight, ...\) are those of none"),
    ],
)
def test_another_backbone_is_refused(weights: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"other.pt cannot be used as lpips, which takes .*{message}"):
        load_instruments({"lpips": tmp_path / "other.pt"})


# --- faces, things and the user's own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(num_classes=8631)


@pytest.fixture(scope="module")
def face(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> FaceEmbedding:
    path = tmp_path_factory.mktemp("face") / "face.pt"
    torch.save(resnet.state_dict(), path)
    loaded = load_instruments({"face": path}).face
    assert isinstance(loaded, FaceEmbedding)
    return loaded


def test_the_face_network_sees_blue_green_red_less_the_mean_face(face: FaceEmbedding) -> None:
    image = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    seen = face.prepare(image)
    assert seen.shape == (1, 3, 224, 224)
    expected = torch.tensor([0 - 91.4953, 127.5 - 103.8827, 255 - 131.0912])
    torch.testing.assert_close(seen.mean(dim=(0, 2, 3)), expected, rtol=0, atol=1e-3)
    # Grey is three equal channels.
    torch.testing.assert_close(face.prepare(image[:, :1]), face.prepare(image[:, :1].expand(-1, 3, -1, -1)))


def test_embeddings_of_faces(face: FaceEmbedding, resnet: nn.Module) -> None:
    embedded = face(noise(2, 3, 32, 32))
    assert embedded.shape == (2, 2048)
    assert embedded.isfinite().all()
    assert not embedded.requires_grad
    assert not face.training
    assert not [name for name, weight in face.named_parameters() if weight.requires_grad]
    assert torch.equal(face.network.state_dict()["layer4.2.conv3.weight"], resnet.state_dict()["layer4.2.conv3.weight"])


def test_the_face_network_halves_its_maps_where_caffe_did(face: FaceEmbedding) -> None:
    # Sizes of the maps behind some layers.
    sizes: dict[str, int] = {}

    def watched(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: sizes.update({name: output.shape[-1]})

    layers = {name: face.network.get_submodule(name) for name in ("maxpool", "layer3.0.conv1", "layer3.0.conv2")}
    hooks = [layer.register_forward_hook(watched(name)) for name, layer in layers.items()]
    face(noise(1, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert sizes == {"maxpool": 56, "layer3.0.conv1": 14, "layer3.0.conv2": 14}

    # Without a border the first window of the pooling starts at the edge of the map.
    corner = torch.zeros(1, 1, 112, 112)
    corner[..., 2, 2] = 1
    assert face.network.maxpool(corner)[0, 0, 0, 0] == 1


def simsiam_checkpoint(path: Path) -> tuple[Path, nn.Module]:
    """Writes a checkpoint of the published form, and returns it with its encoder."""
    # Encoder and projector.
    torch.manual_seed(1)
    encoder = torchvision.models.resnet50()
    # fmt: off
    encoder.fc = nn.Sequential(  # type: ignore[assignment]
        nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(),
        nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.ReLU(),
        nn.Linear(2048, 2048), nn.BatchNorm1d(2048, affine=False),
    )
    # fmt: on
    encoder.fc[7].running_mean.normal_()
    encoder.fc[4].running_var.uniform_(0.5, 2)

    # File, with the predictor and other content of a training.
    state = {f"module.encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {"module.predictor.0.weight": torch.zeros(512, 2048), "module.predictor.3.bias": torch.zeros(2048)}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.05, "params": [0]}]}
    torch.save({"epoch": 100, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}, path)
    return path, encoder.eval()


def test_simsiam_is_compared_after_its_projector(tmp_path: Path) -> None:
    path, encoder = simsiam_checkpoint(tmp_path / "checkpoint.pth.tar")
    loaded = load_instruments({"simsiam": path}).simsiam
    assert isinstance(loaded, SimSiamEmbedding)
    image = noise(2, 3, 224, 224)
    with torch.no_grad():
        expected = encoder(normalize(image / 2 + 0.5, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    embedded = loaded(image)
    assert embedded.shape == (2, 2048)
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-4)
    assert loaded.prepare(noise(1, 1, 16, 16)).shape == (1, 3, 224, 224)


class Pooled(nn.Module):
    """Returns the mean colours of the four quarters."""

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(image, (2, 2)).flatten(1)


class Grey(nn.Module):
    """Refuses colours."""

    def forward(self, image: Tensor) -> Tensor:
        return image.view(image.shape[0], 1, image.shape[2], image.shape[3])


def program(network: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(network.eval()), path)
    return path


@pytest.mark.parametrize("form", ["script", "export"])
def test_the_user_s_network_sees_colours_in_unit_range(form: str, tmp_path: Path) -> None:
    # Program.
    path = tmp_path / "program.pt"
    if form == "script":
        program(Pooled(), path)
    else:
        automatic = torch.export.Dim.AUTO
        shapes = ({0: automatic, 2: automatic, 3: automatic},)
        torch.export.save(torch.export.export(Pooled(), (noise(2, 3, 16, 12),), dynamic_shapes=shapes), path)

    # Features.
    found = load_instruments({"user": path})
    assert isinstance(found.user, UserEmbedding)
    image = noise(3, 3, 8, 8)
    torch.testing.assert_close(found.user(image), Pooled()(image / 2 + 0.5))
    grey = image[:, :1]
    assert torch.equal(found.user(grey), found.user(grey.expand(-1, 3, -1, -1)))


def test_what_the_user_s_network_refuses_or_returns_is_told(tmp_path: Path) -> None:
    refusing = load_instruments({"user": program(Grey(), tmp_path / "grey.pt")}).user
    assert refusing is not None
    with pytest.raises(ValueError, match=r"network cannot take images \[2, 3, 8, 8\] in \[0, 1\]: .*invalid for input"):
        refusing(noise(2, 3, 8, 8))
    mapping = load_instruments({"user": program(nn.Identity(), tmp_path / "map.pt")}).user
    assert mapping is not None
    with pytest.raises(ValueError, match=r"returns \[2, 3, 8, 8\] for 2 images, but one row of features for each"):
        mapping(noise(2, 3, 8, 8))


# --- Inception -----------------------------------------------------------------------------------------------------


def test_without_torch_fidelity_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "inception.pt")
    with pytest.raises(ValueError, match=r"cannot be used as inception, .*: pip install torch-fidelity\."):
        load_instruments({"inception": tmp_path / "inception.pt"})


def test_inception_sees_eight_bit_colours() -> None:
    seen = instruments._Inception(nn.Identity())(torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2))
    assert seen.dtype == torch.uint8
    assert seen[0, :, 0, 0].tolist() == [0, 0, 0]
    assert seen[0, 2].flatten().tolist() == [0, 128, 191, 255]


def test_inception_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as without_download:
        without_download.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        without_download.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pt")
    found = load_instruments({"inception": tmp_path / "inception.pt"})
    assert found.inception is not None
    features = found.inception(noise(2, 1, 16, 16))
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    assert torch.equal(features, found.inception(noise(2, 1, 16, 16)))


# --- the oracle and its table --------------------------------------------------------------------------------------

TABLE = "image,b,spare,q,a\n1.jpg,-1,1,1,1\n2.jpg,1,-1,1,1\n3.jpg,-1,1,-1,-1\n4.jpg,1,1,-1,1\n"


def oracle_file(path: Path, label: str | None = "a") -> Path:
    simple(class_names=("q", "a", "b"), label=label).save(path)
    return path


def table_file(path: Path, content: str = TABLE) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_an_oracle_and_the_correlations_of_its_labels(tmp_path: Path) -> None:
    # With a table.
    table, path = table_file(tmp_path / "table.csv"), oracle_file(tmp_path / "oracle.pt")
    found = load_instruments({"oracle": path}, attributes=table, asked="q")
    assert found.oracle is not None
    assert found.correlations is not None
    assert (found.asked, found.oracle.label_names) == (0, ("q", "a", "b"))
    # In the oracle's order, not the table's.
    assert found.correlations.tolist() == pytest.approx([1, 0.577350, 0], abs=1e-6)
    assert found.oracle.label_probabilities(noise(2, 1, 16, 16)).shape == (2, 3)
    files = {"oracle": path, "attributes": table}
    assert found.hashes == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}

    # Without.
    alone = load_instruments({"oracle": path}, asked="b")
    assert (alone.asked, alone.correlations) == (2, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zeros.csv", TABLE.replace("-1", "0")),
        ("blanks.csv", TABLE.replace(",", " , ") + "\n"),
        ("bom.txt", "\ufeff" + TABLE.replace("image,", "").replace(",", " ")),
        # CelebA's form: the number of images first, no name over the images, blanks between.
        ("list_attr_celeba.txt", TABLE.replace("image,", "4\n").replace(",", "  ")),
    ],
)
def test_tables_of_labels(name: str, content: str, tmp_path: Path) -> None:
    labels = read_labels(table_file(tmp_path / name, content), ["q", "b"])
    assert labels.tolist() == [[True, False], [True, True], [False, False], [False, True]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no column for the oracle's q, a, b: .* it has none"),
        ("image,q,a\n1.jpg,1,1\n", "has no column for the oracle's b: .* it has q, a"),
        (
            "image,q,a,b\n1.jpg,1,1\n",
            r"does not hold 1 and 0 \(or -1\) for each of its 3 columns in the row of '1.jpg'",
        ),
        ("image,q,a,b\n1.jpg,1,1,0.3\n", ".* in the row of '1.jpg'"),
        ("image,q,a,b\n1.jpg,1,1,1\n", "has 1 rows, but correlations need many"),
    ],
)
def test_a_table_that_is_none_is_refused(content: str, message: str, tmp_path: Path) -> None:
    table = table_file(tmp_path / "table.csv", content)
    with pytest.raises(ValueError, match=f"The table of attributes .*table.csv {message}"):
        load_instruments({"oracle": oracle_file(tmp_path / "oracle.pt")}, attributes=table, asked="q")


def test_an_oracle_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    # Labels.
    path, table = oracle_file(tmp_path / "oracle.pt"), table_file(tmp_path / "table.csv")
    with pytest.raises(ValueError, match=r"oracle .*exclusive.pt decides between classes \(q, a, b\), but"):
        load_instruments({"oracle": oracle_file(tmp_path / "exclusive.pt", label=None)})
    with pytest.raises(ValueError, match="no label 'smile' to ask for: it has q, a, b"):
        load_instruments({"oracle": path}, asked="smile")

    # Tables.
    with pytest.raises(ValueError, match="name that one too"):
        load_instruments({"oracle": path}, attributes=table)
    for arguments in ({"attributes": table}, {"asked": "q"}):
        with pytest.raises(ValueError, match="give its file as oracle too"):
            load_instruments({}, **arguments)
    with pytest.raises(FileNotFoundError, match=r"no table of attributes .*none.csv"):
        load_instruments({"oracle": path}, attributes=tmp_path / "none.csv", asked="q")


# --- files -----------------------------------------------------------------------------------------------------------


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["nothing", "text", "pickle", "other weights"])
def test_files_that_are_something_else_are_refused_and_not_run(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # File.
    monkeypatch.chdir(tmp_path)
    if name == "inception":
        monkeypatch.setattr(instruments.importlib.util, "find_spec", lambda _: True)
    path = Path("file.pt")
    if content == "pickle":
        torch.save({"state_dict": Malicious()}, path)
    elif content == "other weights":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    else:
        path.write_bytes(b"" if content == "nothing" else b"no weights at all")

    # Refusal.
    with pytest.raises(ValueError, match=r"^(file.pt cannot be used as|file.pt is not a classifier file)"):
        load_instruments({name: path})
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_says_what_is_needed(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no file .*none.pt for {name}: it takes ") as caught:
        load_instruments({name: tmp_path / "none.pt"})
    assert NAMES[name] in str(caught.value)


def test_nothing_given_measures_nothing() -> None:
    assert load_instruments({}) == Instruments()
    assert not load_instruments({}).hashes
    with pytest.raises(ValueError, match="no instruments lips: choose from lpips, inception"):
        load_instruments({"lips": Path("x")})


def test_options_come_before_the_environment() -> None:
    environ = {"CFE_WEIGHTS_LPIPS": "/a.pt", "CFE_WEIGHTS_FACE": "/b.pt", "CFE_WEIGHTS_USER": "", "HOME": "/home"}
    assert weights_from(None, environ) == {"lpips": Path("/a.pt"), "face": Path("/b.pt")}
    assert weights_from({"face": "c.pt"}, environ) == {"lpips": Path("/a.pt"), "face": Path("c.pt")}
    with pytest.raises(ValueError, match="no instruments for the weights lips: choose from lpips"):
        weights_from({"lips": "c.pt"}, {})
    with pytest.raises(ValueError, match="for the variables CFE_WEIGHTS_LIPS: choose from"):
        weights_from({}, {"CFE_WEIGHTS_LIPS": "c.pt"})
