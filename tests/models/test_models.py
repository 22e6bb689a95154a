"""The architectures: what the tutorial promised, and what the training loop relies on."""

import hashlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.layers import DiracConv
from models.names import LARGEST, MODELS, SMALLEST, known_models
from models.quick_cnn import QuickCNN
from models.resnet import resnet18
from models.simple_cnn import SimpleCNN, simple_cnn_sequential
from models.speednet import SpeedNet


def seeded(name: str, seed: int, num_classes: int = 10, image_size: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, num_classes, image_size)


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def sizes_of(name: str) -> list[int]:
    """The smallest that a network takes, and some larger ones; large images take seconds."""
    return sorted(size for size in {MODELS[name].sizes[0], 24, 31, 32, 48, 97} if size in MODELS[name].sizes)


SIZES = [(name, size) for name in known_models() for size in sizes_of(name)]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_both_forms_of_the_tutorial_network_give_the_same_output_with_the_same_weights() -> None:
    subclass, sequential = SimpleCNN(), simple_cnn_sequential()
    weights = zip(sequential.state_dict(), subclass.state_dict().values(), strict=True)
    sequential.load_state_dict(dict(weights))
    assert torch.equal(subclass(images()), sequential(images()))


def test_both_forms_of_the_tutorial_network_give_the_same_output_from_the_same_seed() -> None:
    subclass, sequential = seeded("simple_cnn", 5), seeded("simple_cnn_sequential", 5)
    assert torch.equal(subclass(images()), sequential(images()))


def test_simple_cnn_has_exactly_the_layers_of_the_tutorial() -> None:
    assert shapes(SimpleCNN()) == {
        "conv1.weight": (32, 3, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 2304),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


def test_resnet18_sees_small_images_at_full_resolution() -> None:
    network = resnet18(10)
    stem, first_stage = network.conv1, network.layer1
    assert isinstance(stem, nn.Conv2d)
    assert isinstance(first_stage, nn.Module)
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    first_stage_input: list[torch.Size] = []
    first_stage.register_forward_pre_hook(lambda _, inputs: first_stage_input.append(inputs[0].shape))
    assert network(images()).shape == (2, 10)
    assert first_stage_input == [(2, 64, 32, 32)]
    assert not any(isinstance(module, nn.MaxPool2d) for module in network.modules())


def test_resnet18_has_torchvisions_layers_after_the_stem() -> None:
    from torchvision.models import resnet

    ours, theirs = resnet18(10), resnet.resnet18(num_classes=10)
    assert shapes(ours).keys() == shapes(theirs).keys()
    for name in ("bn1", "relu", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
        assert repr(getattr(ours, name)) == repr(getattr(theirs, name))


@pytest.mark.parametrize("fast", [QuickCNN, SpeedNet])
def test_the_first_layer_of_a_fast_network_whitens_the_patches_it_was_initialized_from(
    fast: type[QuickCNN | SpeedNet],
) -> None:
    network, seen = fast(), images(256).cumsum(3)  # neighbouring pixels are alike, as in photographs
    network.initialize_from(seen)
    whiten = network.whiten
    directions, negatives = F.conv2d(seen, whiten.weight, stride=whiten.stride).chunk(2, dim=1)
    assert torch.equal(directions, -negatives)
    covariance = directions.permute(1, 0, 2, 3).flatten(1)
    covariance = covariance @ covariance.T / covariance.shape[1]
    assert torch.allclose(covariance, torch.eye(len(covariance)), atol=0.01)


def test_the_convolutions_of_a_fast_network_begin_as_partial_identities() -> None:
    for convolution in [module for module in SpeedNet().modules() if isinstance(module, DiracConv)]:
        features = torch.randn(1, convolution.in_channels, 5, 5)
        assert torch.allclose(convolution(features)[:, : convolution.in_channels], features, atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 300])
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_model_gives_a_logit_a_class_and_a_gradient_to_every_parameter_that_is_trained(
    name: str, size: int, num_classes: int
) -> None:
    model = seeded(name, 0, num_classes, size)
    logits = model(images(2, size))
    assert logits.shape == (2, num_classes)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
    given = {key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert given == {key for key, weight in model.named_parameters() if weight.requires_grad}


def test_an_unknown_model_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(ValueError, match="simple_cn") as refusal:
        build_model("simple_cn", 10)
    assert all(name in str(refusal.value) for name in known_models())


@pytest.mark.parametrize("name", known_models())
def test_the_seed_decides_the_initial_weights(name: str) -> None:
    once, again, other = (seeded(name, seed).state_dict() for seed in (7, 7, 8))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not all(torch.equal(once[key], other[key]) for key in once)


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_model_learns_from_a_batch_of_one_image(name: str, size: int) -> None:
    """Batch norm refuses a single value a channel: the last batch of an epoch would end the run."""
    assert seeded(name, 0, 3, size).train()(images(1, size)).shape == (1, 3)


@pytest.mark.parametrize("name", ["quick_cnn", "resnet18"])
def test_some_models_take_any_size(name: str) -> None:
    assert MODELS[name].sizes == range(SMALLEST, LARGEST + 1)
    assert seeded("quick_cnn", 0, 3, 512).eval()(images(1, 512)).shape == (1, 3)


def test_a_size_that_a_model_does_not_take_is_refused_with_those_it_takes_and_the_models_that_take_it() -> None:
    with pytest.raises(ValueError, match="'simple_cnn' takes images with a side of 32 pixels, and these have 96") as no:
        build_model("simple_cnn", 10, 96)
    assert str(no.value).endswith("Models that take these: quick_cnn, resnet18, speednet")
    with pytest.raises(ValueError, match="17 to 512 pixels, and these have 16"):
        build_model("speednet", 10, 16)
    with pytest.raises(ValueError, match="No model takes these"):
        build_model("quick_cnn", 10, 513)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quick_cnn", "00d51afde16b5f2ab3f08e63886a6608d870f91cc3217f7b60a275204306f1d5"),
        ("speednet", "c33ad11e3685d92f0470108e6723a7fbe66396522387a13c3d064580413f3c6e"),
        ("resnet18", "bfbc64b839ec1a94217b18bdfbb786dc8aad58cefbf988d12dab7ca8f1caa91b"),
    ],
)
def test_a_model_for_cifar10_has_the_layers_and_names_it_always_had(name: str, expected: str) -> None:
    """A stored run resumes, and a seed means the same weights, because the layers draw them in their order."""
    network = seeded(name, 0)
    described = f"{network} {shapes(network)}"
    assert hashlib.sha256(described.encode()).hexdigest() == expected
