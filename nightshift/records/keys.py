"""Where in the bucket a run keeps its things. docs/storage.md has them all."""

import re
from dataclasses import dataclass
from typing import Literal

from nightshift.ids import DATASET, RUN_ID, parse_run_id

RECORDS = "runs/"
PAYLOADS = "checkpoints/"
REPORTS = "reports/"
MODELS = "models/"
DATASETS = "datasets/"
WEIGHTS = "weights/"
SWEEPS = "sweeps/"
PROBES = "probe/"
SERVED = "triton/"

_RUN = rf"(?P<run_id>{RUN_ID})"
_REPORT_FILES = (
    r"(metrics\.jsonl|evaluation\.json|drift\.json|predictions\.safetensors|report\.html|plots/[A-Za-z0-9_-]+\.svg)"
)
_VERSION_FILES = r"(weights\.pth|weights\.safetensors|model\.pt2|triton\.onnx|predictions\.safetensors|card\.json)"
_SHAPES = {
    "record": rf"{RECORDS}{_RUN}\.json",
    "payload": rf"{PAYLOADS}{_RUN}/[0-9]+-[0-9]+\.pt",
    "report": rf"{REPORTS}{_RUN}/{_REPORT_FILES}",
    "version": rf"{MODELS}{RUN_ID}/{_RUN}/{_VERSION_FILES}",
    "champion": rf"{MODELS}{RUN_ID}/champion(\.copy)?\.json",
    "dataset": rf"{DATASETS}[0-9a-f]{{64}}/packed\.safetensors",
    "snapshot": rf"{DATASETS}{DATASET}/(history\.json|snapshots/[0-9a-f]{{64}}\.(json|parquet))",
    "part": rf"{DATASETS}{DATASET}/parts/[0-9a-f]{{64}}\.parquet",
    "shard": rf"{DATASETS}shards/[0-9a-f]{{64}}",
    "weights": rf"{WEIGHTS}[0-9a-f]{{64}}",
    "sweep": rf"{SWEEPS}{RUN_ID}\.json",
    "served": rf"{SERVED}{RUN_ID}/(config\.pbtxt|[1-9][0-9]*/model\.onnx)",
    "probe": rf"{PROBES}[0-9a-f]{{16}}",
}
Kind = Literal[
    "record",
    "payload",
    "report",
    "version",
    "champion",
    "dataset",
    "snapshot",
    "part",
    "shard",
    "weights",
    "sweep",
    "served",
    "probe",
]


@dataclass(frozen=True)
class Place:
    """What lies under a key of nightshift's, and which run it belongs to; no run: ''."""

    kind: Kind
    run_id: str


def place_of(key: str) -> Place | None:
    """What a key of exactly one of nightshift's shapes is for; None for any other, which belongs to somebody else."""
    for kind, shape in _SHAPES.items():
        if found := re.fullmatch(shape, key):
            return Place(kind, found.groupdict().get("run_id", ""))  # type: ignore[arg-type]
    return None


def record_key(run_id: str) -> str:
    """The key of a run's record; raises ConfigError if the run id is not valid."""
    return f"{RECORDS}{parse_run_id(run_id)}.json"


def payload_key(run_id: str, step: int, token: int) -> str:
    """The key of the payload that the holder of a fencing token writes at a step; nobody else writes it."""
    return f"{PAYLOADS}{run_id}/{step}-{token}.pt"


def report_key(run_id: str, file_name: str) -> str:
    return f"{REPORTS}{run_id}/{file_name}"


def weights_key(sha256: str) -> str:
    """The key of weights that came from outside, by the sha256 of their file."""
    return f"{WEIGHTS}{sha256}"


def is_written_under(key: str, token: int) -> bool:
    """Whether a payload's key is one that the holder of this fencing token may write."""
    return key.startswith(PAYLOADS) and key.endswith(f"-{token}.pt")
