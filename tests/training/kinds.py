"""Every way to augment, to sample and to measure the loss, as what it changes in a config."""

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "everything": {"crop": 0.5, "randaugment": 9, "jitter": 0.2, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}
    | {"loss": "focal", "class_weights": "balanced", "clip_norm": 1.0, "accumulate": 3},
    "crop": {"crop": 0.3},
    "randaugment": {"randaugment": 9},
    "trivialaugment": {"trivialaugment": True},
    "jitter": {"jitter": 0.4, "hue": 0.1},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "class weights": {"class_weights": "balanced"},
    "focal": {"loss": "focal"},
    "balanced sampling": {"sampling": "balanced"},
    "clipping": {"clip_norm": 0.1},
    "accumulation": {"accumulate": 3},
}
BINARY: dict[str, Any] = {"loss": "binary", "class_weights": "balanced"}
"""For two classes."""
