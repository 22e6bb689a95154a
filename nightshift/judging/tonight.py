"""Tonight's images, and what published versions say of them by their own cards."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nightshift import progress
from nightshift.records.run import read_record
from nightshift.records.versions import ModelCard
from nightshift.workspace import Workspace

if TYPE_CHECKING:
    from torch import nn

    from nightshift.data.datasets import Dataset
    from nightshift.judging.arrivals import Image
    from nightshift.judging.published import Seen


class Tonight:
    """The images of a run. They are opened, and torch is imported, when the first version is asked about them."""

    def __init__(self, workspace: Workspace, run_id: str) -> None:
        self._workspace, self._run_id = workspace, run_id
        self._predicted: dict[tuple[str, str | None], np.ndarray] = {}
        self._loaded: tuple[tuple[str, str | None], nn.Module] | None = None

    def predicted(self, card: ModelCard) -> np.ndarray:
        """What a version predicts of all test images: the numbers of its card's classes, int64 (N,).

        A version is tested once. Where it takes images of another size, each is scaled to that.

        Raises:
            ConfigError: there is no such network here, it takes no images of this size, or its config cannot be read.
            CheckpointCorruptError: the weights are none of this network's.
            DocumentDamagedError: they are not what was published.
            DeviceError: the GPU has failed; a new process may go on.
            StorageError, DataUnavailableError: something cannot be read.
        """
        key = (card.version, card.sha256)
        if key not in self._predicted:
            with progress.current().transfer(f"testing {card.version} on tonight's images", None):
                self._predicted[key] = self._test(card)
        return self._predicted[key]

    def seen(self, card: ModelCard, images: "Sequence[Image]") -> "Seen":
        """What a version says and sees of some images of any split, one at least; raises what `predicted` does."""
        from nightshift.hardware import failures_explained, find_device
        from nightshift.judging import published

        with failures_explained(find_device()):
            pixels = (self._dataset.images_of(image.split)[image.number] for image in images)
            return published.seen_by(self._model(card), card, pixels)

    def _test(self, card: ModelCard) -> np.ndarray:
        from nightshift.hardware import failures_explained, find_device
        from nightshift.judging import published

        with failures_explained(find_device()):
            return published.predicted_by(self._model(card), card, self._dataset.test_images).numpy()

    def _model(self, card: ModelCard) -> "nn.Module":
        """A version's network. The last one is kept, as the champion is asked several times."""
        from nightshift.hardware import find_device
        from nightshift.judging import published

        key = (card.version, card.sha256)
        if not self._loaded or self._loaded[0] != key:
            self._loaded = None  # two at a time may be too large for a GPU
            self._loaded = key, published.load_version(self._workspace.store, card, find_device())
        return self._loaded[1]

    @cached_property
    def _dataset(self) -> "Dataset":
        from nightshift.data.datasets import open_dataset

        return open_dataset(self._workspace, read_record(self._workspace.store, self._run_id)[0].dataset)
