"""TrainState: what was captured, stored and restored goes on as if nothing had happened, bit for bit."""

import hashlib
import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift.checkpoints.payload import Payload, weights_sha256
from nightshift.config.recipes import make_config
from nightshift.records.curve import CurvePoint
from nightshift.training import muon
from nightshift.training.optimizers import build_optimizer
from nightshift.training.snapshot import Snapshot
from nightshift.training.state import TrainState, seed_everything, seed_step

CPU = torch.device("cpu")


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 5)
    )


def fresh_state(optimizer: str, seed: int, ema_decay: float = 0.0) -> TrainState:
    seed_everything(seed)
    model = small_network().to(memory_format=torch.channels_last)  # as the training loop has it
    config = make_config("quick", {"optimizer": optimizer, "lr": 0.01, "weight_decay": 0.01})
    return TrainState(model, build_optimizer(model, config.optimizer), CPU, ema_decay)


def train_step(state: TrainState) -> None:
    """One step that draws from all generators; the normal variates come in pairs of which one is kept back."""
    seed_step(1, state.step)
    scale, shift = random.gauss(1, 0.1), np.random.randn()
    images = torch.randn(6, 3, 8, 8) * scale + shift
    labels = torch.tensor([random.randrange(5) for _ in range(6)])
    logits = state.model(images)
    loss = F.cross_entropy(logits, labels)
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    state.advance()
    state.epoch_images += len(labels)
    state.epoch_loss += loss.detach().double() * len(labels)
    state.epoch_correct += (logits.detach().argmax(1) == labels).sum()
    state.curve.append(CurvePoint(epoch=1, step=state.step, loss=loss.item(), accuracy=0.5))


def train_steps(state: TrainState, count: int) -> None:
    for _ in range(count):
        train_step(state)


def stored(state: TrainState) -> bytes:
    file = io.BytesIO()
    torch.save(state.capture(), file)
    return file.getvalue()


def loaded(file: bytes) -> Payload:
    payload: Payload = torch.load(io.BytesIO(file), weights_only=True)
    return payload


def bits(value: Any) -> Any:
    """A value as something of which equality is equality of all bits; 0.0 and -0.0 are two."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.detach().contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return value


def everything(state: TrainState) -> dict[str, Any]:
    """All that decides the next steps, read without `capture`."""
    found: dict[str, Any] = bits(
        {
            "model": state.model.state_dict(),
            "average": state.average and state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "step": state.step,
            "epoch_images": state.epoch_images,
            "epoch_loss": state.epoch_loss,
            "epoch_correct": state.epoch_correct,
            "curve": [point.model_dump() for point in state.curve],
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
    )
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 1, 4])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_restored_state_goes_on_as_the_uninterrupted_one(optimizer: str, steps_before: int, ema_decay: float) -> None:
    uninterrupted = fresh_state(optimizer, 1, ema_decay)
    train_steps(uninterrupted, steps_before)
    file = stored(uninterrupted)
    at_capture = everything(uninterrupted)
    train_steps(uninterrupted, 5)
    expected = everything(uninterrupted)

    resumed = fresh_state(optimizer, 2, ema_decay)
    train_steps(resumed, 3)
    assert everything(resumed)["model"] != at_capture["model"]
    resumed.restore(loaded(file))
    assert everything(resumed) == at_capture
    train_steps(resumed, 5)
    assert everything(resumed) == expected


def test_muon_goes_on_as_it_began_on_hardware_where_it_would_begin_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {}
    for begun, here in (("float32", "bfloat16"), ("bfloat16", "float32")):
        monkeypatch.setattr(muon, "native_precision", lambda device, begun=begun: begun)
        uninterrupted = fresh_state("muon", 1)
        train_steps(uninterrupted, 2)
        payload = loaded(stored(uninterrupted))
        train_steps(uninterrupted, 2)
        ends[begun] = everything(uninterrupted)
        if begun == "bfloat16":
            del payload["optimizer"]["precision"]  # as it was stored before there was a choice

        monkeypatch.setattr(muon, "native_precision", lambda device, here=here: here)
        resumed = fresh_state("muon", 2)
        resumed.restore(payload)
        train_steps(resumed, 2)
        assert everything(resumed) == ends[begun]
    assert ends["float32"]["model"] != ends["bfloat16"]["model"]


def test_capturing_changes_nothing() -> None:
    state = fresh_state("sgd", seed=1)
    train_steps(state, 3)
    before = everything(state)
    stored(state)
    assert everything(state) == before


def test_a_state_that_was_restored_stores_the_same_content_again() -> None:
    state = fresh_state("adam", seed=1)
    train_steps(state, 3)
    first = stored(state)
    other = fresh_state("adam", seed=2)
    other.restore(loaded(first))
    assert bits(loaded(stored(other))) == bits(loaded(first))


def parts_of(count: int) -> tuple[TrainState, list[Payload]]:
    """A state, and the parts of so many ranks, each with sums and generators of its own."""
    state, parts = fresh_state("sgd", seed=1), []
    for rank in range(count):
        seed_everything(1, rank)
        train_steps(state, 1)
        parts.append(loaded(stored(state))["ranks"][0])
    return state, parts


def test_each_of_as_many_ranks_as_before_takes_its_own_part() -> None:
    state, parts = parts_of(3)
    for rank in range(3):
        resumed = fresh_state("sgd", seed=2)
        resumed.restore(state.capture(parts), rank, world_size=3)
        assert bits(resumed.part()) == bits(parts[rank])
    assert len({str(bits(part["rng"])) for part in parts}) == 3


@pytest.mark.parametrize("now", [1, 2, 5])
def test_with_another_number_of_ranks_nothing_is_counted_twice_or_lost(now: int) -> None:
    state, parts = parts_of(3)
    sums = []
    for rank in range(now):
        resumed = fresh_state("sgd", seed=2)
        resumed.restore(state.capture(parts), rank, world_size=now)
        sums.append((float(resumed.epoch_loss), int(resumed.epoch_correct)))
    assert sum(loss for loss, _ in sums) == pytest.approx(sum(float(part["epoch_loss"]) for part in parts))
    assert sum(correct for _, correct in sums) == sum(int(part["epoch_correct"]) for part in parts)


def test_an_epoch_begins_with_nothing_seen() -> None:
    state = fresh_state("sgd", seed=1)
    train_steps(state, 2)
    state.begin_epoch()
    assert state.epoch_images == 0
    assert bits(state.epoch_loss) == bits(torch.zeros((), dtype=torch.float64))
    assert bits(state.epoch_correct) == bits(torch.zeros((), dtype=torch.int64))
    assert state.step == 2


def test_what_others_draw_between_the_steps_does_not_change_the_next_one() -> None:
    """Whatever retries a request, in the background, draws its pauses from python's generator."""
    undisturbed, disturbed = fresh_state("sgd", seed=1), fresh_state("sgd", seed=1)
    for state, draws in ((undisturbed, 0), (disturbed, 5)):
        seed_everything(1)
        for _ in range(3):
            train_step(state)
            for _ in range(draws):
                random.random()
    assert bits(disturbed.model.state_dict()) == bits(undisturbed.model.state_dict())


def test_a_snapshot_is_of_one_step_whatever_is_trained_meanwhile() -> None:
    state, snapshot = fresh_state("adam", seed=1), Snapshot(CPU)
    train_steps(state, 2)
    at_step_2 = bits(state.capture())
    snapshot.take(state.capture())
    train_steps(state, 3)
    assert bits(snapshot.payload()) == at_step_2
    assert bits(state.capture()) != at_step_2


def test_the_memory_of_a_snapshot_is_used_again_for_the_next_one() -> None:
    state, snapshot = fresh_state("adam", seed=1), Snapshot(CPU)
    train_steps(state, 1)
    snapshot.prepare(state.capture())
    snapshot.take(state.capture())
    first = {name: weight.data_ptr() for name, weight in snapshot.payload()["model"].items()}
    train_steps(state, 1)
    snapshot.take(state.capture())
    assert {name: weight.data_ptr() for name, weight in snapshot.payload()["model"].items()} == first
    assert bits(snapshot.payload()) == bits(state.capture())


def test_a_snapshot_follows_a_state_that_has_grown() -> None:
    state, snapshot = fresh_state("adam", seed=1), Snapshot(CPU)
    snapshot.take(state.capture())
    train_steps(state, 1)
    snapshot.take(state.capture())
    assert bits(snapshot.payload()) == bits(state.capture())


def test_a_seed_decides_what_all_three_generators_draw() -> None:
    def draws(seed: int) -> list[float]:
        seed_everything(seed)
        seed_step(seed, 0)
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    assert draws(3) == draws(3)
    assert all(one != other for one, other in zip(draws(3), draws(4), strict=True))


def trained_weights() -> dict[str, Tensor]:
    state = fresh_state("sgd", seed=1)
    train_steps(state, 2)
    return state.model.state_dict()


def test_the_hash_of_weights_is_the_documented_one() -> None:
    weights = trained_weights()
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}
    documented = b"".join(key.encode() + weights[key].numpy().tobytes(order="C") for key in sorted(weights))
    assert weights_sha256(weights) == hashlib.sha256(documented).hexdigest()


def test_the_hash_of_weights_does_not_depend_on_the_order_of_keys() -> None:
    weights = trained_weights()
    assert weights_sha256(dict(reversed(weights.items()))) == weights_sha256(weights)


def test_the_hash_of_weights_does_not_depend_on_the_memory_format() -> None:
    weights = trained_weights()
    convolution = weights["0.weight"]
    assert not convolution.is_contiguous()
    assert weights_sha256({**weights, "0.weight": convolution.contiguous()}) == weights_sha256(weights)


def test_the_hash_of_weights_depends_on_their_names() -> None:
    weights = trained_weights()
    renamed = {key.replace("5.bias", "6.bias"): value for key, value in weights.items()}
    assert weights_sha256(renamed) != weights_sha256(weights)


WEIGHTS = {
    **trained_weights(),
    "half": torch.randn(3).bfloat16(),
    "temperature": torch.tensor(0.5),
    "mask": torch.tensor([True, False]),
}


@pytest.mark.parametrize("key", WEIGHTS)
@given(data=st.data())
@settings(max_examples=15)
def test_one_bit_of_one_weight_changes_the_hash(key: str, data: st.DataObject) -> None:
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in WEIGHTS.items()}
    before = weights_sha256(weights)
    stored_bytes = weights[key].reshape(-1).view(torch.uint8)
    stored_bytes[data.draw(st.integers(0, len(stored_bytes) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert weights_sha256(weights) != before
