"""torchvision's and timm's networks: which there are, which sizes they take, and that they are what is trained here."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from models import build_model
from models.from_timm import names
from models.names import LARGEST, SMALLEST, TORCHVISION, sizes_of
from nightshift.errors import ConfigError
from nightshift.networks import build_network, check_network
from nightshift.publishing.export import export

FAMILIES = {
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t"),
    *("vgg11", "vgg11_bn", "vit_b_16", "vit_b_32", "vit_h_14", "wide_resnet50_2"),
}
"""The smallest network of each of torchvision's families, and those that take other sizes than their families."""
LARGE = {"densenet121", "efficientnet_v2_s", "inception_v3", "maxvit_t", "swin_v2_t", "vit_h_14"}
"""Those that take longest to make."""
OF_TIMM = ("convnext_atto", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet10t")


def takes(name: str, size: int) -> bool:
    """Whether a network does, found out without computing anything: tensors on "meta" have a shape and no values."""
    with torch.device("meta"):
        network = build_model(name, 3, size).train()
        try:
            return bool(network(torch.empty(2, 3, size, size)).shape == (2, 3))
        except RuntimeError:
            return False


def test_the_table_has_torchvisions_networks_for_classification_and_no_others() -> None:
    assert sorted(TORCHVISION) == sorted(torchvision.models.list_models(module=torchvision.models))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak if name in LARGE else [])
        for name in sorted(FAMILIES - {"regnet_x_400mf", "regnet_y_400mf"})
    ],
)
def test_a_network_of_torchvision_takes_the_sizes_that_the_table_says_and_no_smaller_ones(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sizes = TORCHVISION[name]
    assert all(takes(f"torchvision:{name}", size) for size in {sizes[0], sizes[1], sizes[-1]})
    monkeypatch.setitem(TORCHVISION, name, range(1, LARGEST + 1))
    if sizes[0] > SMALLEST and sizes.step == 1:
        assert not takes(f"torchvision:{name}", sizes[0] - 1)
    if sizes.step > 1:
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            assert takes(f"torchvision:{name}", sizes[0] + 1)


@pytest.mark.parametrize("name", ["regnet_x_400mf", "regnet_y_400mf", "mobilenet_v3_small", "googlenet"])
def test_small_networks_of_torchvision_really_learn_from_the_smallest_images(name: str) -> None:
    check_network(f"torchvision:{name}", 3, SMALLEST, 2, averaged=True, build_optimizer=lambda network: None)


def seeded(name: str, size: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(name, 3, size).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:resnet18", 32),
        ("timm:convnext_atto", 32),
        pytest.param("torchvision:mobilenet_v3_small", 33, marks=pytest.mark.soak),
        *(
            pytest.param(name, 32, marks=pytest.mark.soak)
            for name in ("torchvision:vit_b_16", "timm:tf_efficientnet_lite0", "timm:vit_tiny_patch16_224")
        ),
    ],
)
def test_the_seed_decides_the_initial_weights_and_the_network_is_exported_to_pt2_and_onnx(name: str, size: int) -> None:
    network, again, other = (seeded(name, size, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(network[key], again[key]) for key in network)
    assert not all(torch.equal(network[key], other[key]) for key in network)
    images = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
    for kind in ("safetensors", "pt2", "onnx"):
        assert export(seeded(name, size).eval(), seeded(name, size), images, kind)


@pytest.mark.soak
@pytest.mark.parametrize(
    "name",
    [*(f"torchvision:{name}" for name in sorted(FAMILIES - {"vit_h_14"})), *(f"timm:{name}" for name in OF_TIMM)],
)
def test_a_network_of_every_family_is_trained_and_exported_to_pt2_and_onnx(name: str) -> None:
    sizes = sizes_of(name) or range(64, LARGEST + 1)
    size = next(size for size in sizes if size >= 64)
    check_network(name, 3, size, 2, averaged=True, build_optimizer=lambda network: None)
    images = torch.randn(4, 3, size, size).to(memory_format=torch.channels_last)
    for kind in ("pt2", "onnx"):
        assert export(seeded(name, size).eval(), seeded(name, size), images, kind)


def test_a_network_that_returns_more_than_logits_in_training_is_made_without_the_rest() -> None:
    network = build_model("torchvision:inception_v3", 3, 75).train()
    assert network(torch.randn(2, 3, 75, 75)).shape == (2, 3)


def test_a_size_that_a_network_of_torchvision_does_not_take_is_refused_with_those_it_takes() -> None:
    for name, size, told in (
        ("alexnet", 32, "63 to 512 pixels, and these have 32"),
        ("vit_b_16", 40, "16, 32 … 512 pixels, and these have 40"),
        ("maxvit_t", 96, "224 or 448 pixels, and these have 96"),
    ):
        with pytest.raises(ConfigError, match=told):
            build_network(f"torchvision:{name}", 3, size)


def test_timms_networks_are_those_that_timm_lists_and_a_mistyped_one_is_told() -> None:
    assert names() == timm.list_models()
    assert sizes_of("timm:convnext_atto") is None
    with pytest.raises(ConfigError, match=r"timm has no network 'convnext_ato'. Did you mean convnext_atto\?"):
        build_network("timm:convnext_ato", 3, 32)


def test_a_size_that_a_network_of_timm_does_not_take_is_told_when_it_is_tried() -> None:
    with pytest.raises(ConfigError, match="model 'timm:inception_v3' cannot be trained on images of 32 pixels"):
        check_network("timm:inception_v3", 3, 32, 2, averaged=False, build_optimizer=lambda network: None)
