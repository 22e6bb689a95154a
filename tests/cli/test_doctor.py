"""What `doctor` looks for where it matters, and only there."""

import pytest

from nightshift.cli import doctor


def checks(gpus: int) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.ok, check.detail) for check in doctor._needs_of_gpus(gpus)}


def test_a_machine_without_gpus_needs_neither_a_compiler_nor_shared_memory() -> None:
    assert checks(0) == {}
    assert set(checks(1)) == {"compiler"}


def test_a_missing_compiler_and_a_containers_default_of_shared_memory_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(doctor, "_SHARED_MEMORY_BYTES", float("inf"))
    found = checks(8)
    assert not found["compiler"][0]
    assert "Install gcc, or set compile=off" in found["compiler"][1]
    assert not found["shared memory"][0]
    assert "too little for the ranks of 8 GPUs" in found["shared memory"][1]
