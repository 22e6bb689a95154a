"""A run that was stopped, moved or killed ends with the bits of one that nobody has disturbed."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from nightshift.checkpoints.payload import Payload
from nightshift.config.train import TrainConfig
from nightshift.records.run import read_record
from nightshift.training.ranks import ALONE
from nightshift.training.state import build_state
from tests.bits import state_sha256
from tests.gpu.children import Child, in_child
from tests.gpu.stage import Figure, KeptStore, Stage, at, config_of, last_payload, made_up, train

_IMAGES, _BATCH = 500, 64  # the eighth batch of an epoch is a short one
_STOPS, _KILL = (5, 14, 23), 19  # after the last stop a process begins with a short one
_OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"lr": 0.05},
    "adam": {"lr": 1e-3},
    "muon": {"lr": 0.05, "momentum": 0.6},
    "adamw": {"lr": 1e-3},
}
_BASE = {"batch_size": _BATCH, "epochs": 4, "drop_last": False, "weight_decay": 0.0, "dataset": "cifar10"}


def _config(optimizer: str, **overrides: Any) -> TrainConfig:
    return config_of(**{**_BASE, "optimizer.name": optimizer, **_OPTIMIZERS[optimizer], **overrides})


def cases(stage: Stage) -> dict[str, TrainConfig]:
    """What is trained: each optimizer, precision and compilation, and a network that drops features at random."""
    dropping = {"model.name": "tests.gpu.networks:Dropping"}
    if stage.is_small:
        return {
            "muon": _config("muon", precision="float32"),
            "dropout": _config("adam", **dropping, precision="float32"),
        }
    found = {
        f"{name} {precision}{' compiled' if compiled == 'on' else ''}": _config(
            name, precision=precision, compile=compiled
        )
        for name in ("sgd", "adam", "muon")
        for precision in ("float32", "bfloat16")
        for compiled in ("off", "on")
    }
    return {
        **found,
        **{f"dropout {how}": _config("adam", **dropping, precision="bfloat16", compile=how) for how in ("off", "on")},
    }


def exact_resume(stage: Stage) -> Iterator[Figure]:
    """Whole twice; stopped at three steps and resumed in a new process each time; killed once. Equal bits."""
    with ThreadPoolExecutor(1 if stage.is_small else os.cpu_count()) as pool:
        running = {
            pool.submit(_one_case, stage.home / name.replace(" ", "-"), config): name
            for name, config in cases(stage).items()
        }
        for done in as_completed(running):
            try:
                yield Figure(running[done], done.result())
            except AssertionError as error:
                yield Figure(running[done], str(error), holds=False)


def admit_networks(home: Path) -> None:
    """Let this process' configs name those of this package, as a team lets them name its own."""
    project = home / "nightshift.toml"
    project.write_text('plugins = ["tests"]\n')
    os.environ["NIGHTSHIFT_PROJECT"] = str(project)


def _one_case(home: Path, config: TrainConfig) -> str:
    home.mkdir()
    in_child(_go_on, home, config, {"whole": None, "again": None, "stopped": _STOPS[0]})
    for stop in _STOPS[1:]:
        in_child(_go_on, home, config, {"stopped": stop})
    child = Child(_die, home, config)
    assert child.is_killed(300), f"it was to be killed, and ended with exit code {child.process.exitcode}"
    in_child(_go_on, home, config, {"stopped": None, "killed": None})
    store = KeptStore(home / "store")
    records = {name: read_record(store, name)[0] for name in ("whole", "again", "stopped", "killed")}
    assert records["stopped"].resumed_from_step == _STOPS[-1], "it did not go on where it was stopped"
    resumed = records["killed"].resumed_from_step
    assert resumed, "the killed one began anew"
    found = {name: state_sha256(last_payload(store, name)) for name in records}
    assert len(set(found.values())) == 1, f"{found}"
    return f"{found['whole'][:12]}, killed in step {_KILL}, resumed from {resumed}"


def _go_on(home: Path, config: TrainConfig, runs: Mapping[str, int | None]) -> None:
    admit_networks(home)
    store, dataset = KeptStore(home / "store"), made_up(_IMAGES)
    for run_id, stop in runs.items():
        train(home, store, run_id, config, dataset, at(stop))


def _die(home: Path, config: TrainConfig) -> None:
    admit_networks(home)
    store = KeptStore(home / "store")

    def kill(step: int) -> bool:
        if step == _KILL:
            while not read_record(store, "killed")[0].checkpoints:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    train(home, store, "killed", config.override({"checkpoint_every_steps": 5}), made_up(_IMAGES), kill)


def moves(stage: Stage) -> Iterator[Figure]:
    """From a GPU to the CPU and back: the state arrives with the same bits, and training goes on."""
    there = stage.gpu()
    for optimizer in _OPTIMIZERS:
        config = _config(optimizer, ema_decay=0.9)
        store, dataset = KeptStore(stage.home / optimizer), made_up(_IMAGES)
        for device, stop in ((there.type, 9), ("cpu", 17)):
            on = config.override({"hardware.device": device})
            train(stage.home, store, "run", on, dataset, at(stop))
            stored = last_payload(store, "run")
            yield Figure(
                f"{optimizer} stored by {device}, read on both", "same bits", _arrives(stored, on, (there, "cpu"))
            )
        record = train(stage.home, store, "run", config, dataset)
        yield Figure(f"{optimizer} on all three", f"ends at step {record.step}", record.step == 32)


def _arrives(stored: Payload, config: TrainConfig, devices: Sequence[torch.device | str]) -> bool:
    expected = _carried(stored)
    return all(
        expected
        == _carried(build_state(config, made_up(_IMAGES), torch.device(device), ALONE, lambda check: stored).capture())
        for device in devices
    )


def _carried(payload: Payload) -> str:
    """What a state takes from a payload on any device. A GPU has its own generators, and each step sets the rates."""
    kept = {name: payload[name] for name in ("model", "average", "step", "epoch_images", "curve")}
    return state_sha256({**kept, "optimizer": payload["optimizer"]["state"]})


def numerics(stage: Stage) -> Iterator[Figure]:
    """Deterministic algorithms, off and then on in one process: the same bits as in a new one, and what they cost."""
    stage.gpu()
    less = {"precision": "float32", "epochs": 2}
    config = _config("muon", **(less if stage.is_small else {"precision": "bfloat16", "epochs": 60}))
    first = in_child(_timed, stage.home / "on", config, [True])
    off, on, again = in_child(_timed, stage.home / "off-and-on", config, [False, True, True])
    yield Figure("on, after off", "same bits as in a new process", first[0][0] == on[0] == again[0])
    yield Figure("off", "other bits" if off[0] != on[0] else "the same bits, this time")
    yield Figure("price of determinism", again[1] / off[1])


def _timed(home: Path, config: TrainConfig, deterministic: Sequence[bool]) -> list[tuple[str, float]]:
    """The state and the seconds of each training, after one that warms up."""
    home.mkdir()
    store, dataset = KeptStore(home / "store"), made_up(_IMAGES)
    train(home, store, "warm", config, dataset, at(20))
    found = []
    for number, choice in enumerate(deterministic):
        on = config.override({"deterministic": choice})
        seconds = train(home, store, f"run-{number}", on, dataset).train_seconds
        found.append((state_sha256(last_payload(store, f"run-{number}")), seconds))
    return found
