"""Which split an image belongs to, as a function of its group: what is test tonight was test on every night before."""

import hashlib

from nightshift.config.project import SplitConfig


def split_of(group: bytes, config: SplitConfig) -> str:
    """`test`, `validation` or `train`. The sha256 of the group decides, so all of a group are in one split."""
    place = int.from_bytes(hashlib.sha256(group).digest()[:8]) / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"
