"""The parts of `make gpu` on the CPU, small: what they promise holds there, and a promise that does not is seen."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.training.snapshot import Snapshot
from tests.gpu import bits, loading, preflight, ranks, snapshots, speed
from tests.gpu.stage import Figure, NoGpuError, Stage

ROOT = Path(__file__).parents[2]
Part = Callable[[Stage], Iterator[Figure]]


class Pretended(Stage):
    """The CPU as if it were a GPU."""

    def gpu(self) -> torch.device:
        return self.device


FOR_ALL: list[Part] = [preflight.preflight, bits.exact_resume, ranks.one_rank, loading.decoding]
ONLY_FOR_A_GPU: list[Part] = [preflight.card, loading.nvjpeg]
FOR_A_GPU: list[Part] = [
    *(bits.moves, bits.numerics, snapshots.under_fire, loading.fed),
    *(speed.classes, speed.one_step, speed.saving, speed.speedrun, speed.tutorial),
]
LONG = {bits.exact_resume, bits.numerics, loading.fed, speed.saving}


def left_to_the_soak(parts: list[Part]) -> list[Any]:
    """The same parts. Those that take longest are left to `make soak`."""
    return [pytest.param(part, marks=pytest.mark.soak) if part in LONG else part for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("part", left_to_the_soak(FOR_ALL))
def test_a_part_that_needs_no_gpu_holds_here(part: Part, tmp_path: Path) -> None:
    assert [figure for figure in part(Stage(tmp_path)) if not figure.holds] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", left_to_the_soak(FOR_A_GPU))
def test_a_part_for_a_gpu_holds_where_the_cpu_stands_for_one(part: Part, tmp_path: Path) -> None:
    found = list(part(Pretended(tmp_path, seconds=1)))
    assert found
    assert [figure for figure in found if not figure.holds] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("part", [*ONLY_FOR_A_GPU, *FOR_A_GPU, *FOR_ALL])
def test_a_part_holds_on_a_gpu(part: Part, tmp_path: Path) -> None:
    assert [figure for figure in part(Stage(tmp_path)) if not figure.holds] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("part", [*ONLY_FOR_A_GPU, *FOR_A_GPU])
def test_a_part_for_a_gpu_says_that_there_is_none(part: Part, tmp_path: Path) -> None:
    with pytest.raises(NoGpuError):
        list(part(Stage(tmp_path)))


def test_a_snapshot_that_changes_with_the_state_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "_copy", lambda self, path, tensor: tensor)
    assert not next(snapshots.under_fire(Pretended(tmp_path))).holds


@pytest.mark.slow
def test_a_run_that_ends_with_other_bits_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bits.cases(Stage(tmp_path))["dropout"].override({"model.name": "tests.gpu.networks:Drifting"})
    monkeypatch.setattr(bits, "cases", lambda stage: {"drifting": config})
    (found,) = bits.exact_resume(Stage(tmp_path))
    assert not found.holds
    assert "whole" in str(found.value)


def command(*arguments: str) -> tuple[int, dict[str, str]]:
    """Its exit code, and the state of each part."""
    with tempfile.NamedTemporaryFile() as file:
        done = subprocess.run(
            [sys.executable, "benchmarks/gpu.py", *arguments, "--json", file.name],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        )
        return done.returncode, {part["part"]: part["state"] for part in json.load(file)["parts"]}


@pytest.mark.slow
def test_the_command_says_of_each_part_whether_it_holds_or_needs_a_gpu() -> None:
    code, states = command("--part", "card", "--part", "decoding", "--part", "nvjpeg")
    assert states == {"card": "no GPU here", "decoding": "holds", "nvjpeg": "no GPU here"}
    assert code == 0


@pytest.mark.slow
def test_the_command_stops_a_part_that_takes_too_long_and_says_so() -> None:
    code, states = command("--part", "bits", "--part", "decoding", "--minutes", "0.12")
    assert states == {"bits": "took longer than 7 s", "decoding": "no time was left"}
    assert code == 1
