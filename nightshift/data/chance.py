"""Random numbers that are a function of what they are for, so that no generator has to be carried along or saved."""

import hashlib

from torch import Generator


def key_of(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for what the numbers say; hashed, because generators with neighbouring seeds would not be independent."""
    digest = hashlib.sha256("/".join(map(str, (seed, purpose, *numbers))).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def generator_of(seed: int, purpose: str, *numbers: int) -> Generator:
    """A generator with `key_of` these as its seed, on the CPU."""
    return Generator().manual_seed(key_of(seed, purpose, *numbers))
