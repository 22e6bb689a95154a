"""What a config asks of the hardware is resolved once, and refused where it cannot be had."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from nightshift.config.sections import HardwareConfig
from nightshift.errors import ConfigError, DeviceError, RankLostError
from nightshift.hardware import Hardware, failures_explained, find_device, ranks_here
from nightshift.parallel.ranks import joined

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


def test_a_gpu_that_is_not_there_is_refused_with_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="'auto' and 'cpu'"):
        find_device("cuda")


def test_what_is_left_to_the_hardware_is_chosen_by_it_and_what_is_asked_for_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolved(steps: int = 50, **asked: str) -> Hardware:
        return Hardware.resolve(HardwareConfig.model_validate({"precision": "auto", **asked}), steps)

    has_bfloat16 = "bf16" in Path("/proc/cpuinfo").read_text()
    assert resolved(device="cpu").precision == ("bfloat16" if has_bfloat16 else "float32")
    assert resolved(device="cpu", precision="float32").precision == "float32"
    assert resolved(device="cpu", compile="on").compiled
    assert not resolved(9999, device="cpu", compile="auto").compiled
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [resolved(steps, compile="auto", precision="float32").compiled for steps in (50, 9999)] == [False, True]


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_are_refused_before_anything_starts_and_any_number_trains_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"nproc_per_node=4, but this machine has 2 GPUs.*nproc_per_node=auto"):
        ranks_here(HardwareConfig(nproc_per_node=4))
    assert ranks_here(HardwareConfig(nproc_per_node=2)) == 2
    assert ranks_here(HardwareConfig(nproc_per_node=4, device="cpu")) == 4


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_one_rank_a_gpu_and_one_on_the_cpu() -> None:
    assert ranks_here(HardwareConfig(nproc_per_node="auto")) == 2
    assert ranks_here(HardwareConfig(nproc_per_node="auto", device="cpu")) == 1


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_device_that_fails_interrupts_a_run_and_does_not_fail_it(kind: type[RuntimeError]) -> None:
    with pytest.raises(DeviceError, match="cpu has failed: out of memory"), failures_explained(CPU):
        raise kind("out of memory\nand a page of advice")


def test_a_bug_in_a_network_is_not_taken_for_a_failing_device() -> None:
    with pytest.raises(RuntimeError, match="shape"), failures_explained(CPU):
        raise RuntimeError("shape mismatch")


def test_cublas_is_made_deterministic_before_anything_can_have_multiplied() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    code = "import os, nightshift.hardware; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == ":4096:8\n", done.stderr


def test_after_an_error_no_rank_waits_for_the_operations_of_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected, for want of a GPU: all that can be seen here is that the groups are aborted and not destroyed."""
    called: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: called.append("aborted"))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    ranks = joined(HashStore(), timedelta(seconds=10))
    ranks.__enter__()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    error = RankLostError("rank 1 is gone")
    assert not ranks.__exit__(RankLostError, error, None)
    assert (called, dist.is_initialized()) == (["aborted"], True)
    dist.destroy_process_group()


class Highest(nn.Module):
    """Asks for a global maximum of what an activation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU()), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, side, side) → (batch, 10)."""
        logits: Tensor = self.head(self.features(images).amax((2, 3)))
        return logits


@pytest.mark.slow
def test_a_compiled_network_finds_the_maximum_that_it_has_rounded() -> None:
    hardware, model = Hardware(CPU, "bfloat16", compiled=True, deterministic=True), Highest()
    with hardware.autocast():
        hardware.compile(model)(torch.rand(8, 3, 8, 8)).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.slow
def test_the_bits_of_a_batch_do_not_depend_on_the_size_of_the_batch_before_it() -> None:
    hardware = Hardware(CPU, "float32", compiled=True, deterministic=True)

    def gradients(*sizes: int) -> Tensor:
        """Of the batch of 64 images."""
        model, found = nn.BatchNorm1d(64), torch.empty(0)
        forward = hardware.compile(model)
        for size in sizes:
            model.zero_grad()
            forward(torch.rand(size, 64, generator=torch.Generator().manual_seed(size))).square().mean().backward()
            if size == 64:
                found = torch.cat([weight.grad for weight in model.parameters() if weight.grad is not None])
        return found

    assert torch.equal(gradients(64, 52), gradients(52, 64))


@pytest.mark.slow
def test_a_process_may_compile_for_any_number_of_trainings_and_sizes_of_batches() -> None:
    hardware = Hardware(CPU, "float32", compiled=True, deterministic=True)
    compiled = 0
    for _ in range(2):
        forward = hardware.compile(nn.Linear(4, 4))
        for size in range(2, 12):
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            forward(torch.rand(size, 4))
            compiled += torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert compiled == 20
