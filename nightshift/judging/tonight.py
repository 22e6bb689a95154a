"""Tonight's test images, and what published versions predict of them by their own cards."""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nightshift import progress
from nightshift.records.run import read_record
from nightshift.records.versions import ModelCard
from nightshift.workspace import Workspace

if TYPE_CHECKING:
    from nightshift.data.datasets import Dataset


class Tonight:
    """The test images of a run. They are opened, and torch is imported, when the first version is tested on them."""

    def __init__(self, workspace: Workspace, run_id: str) -> None:
        self._workspace, self._run_id = workspace, run_id
        self._predicted: dict[tuple[str, str | None], np.ndarray] = {}

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

    def _test(self, card: ModelCard) -> np.ndarray:
        from nightshift.hardware import failures_explained, find_device
        from nightshift.judging import published

        device = find_device()
        with failures_explained(device):
            model = published.load_version(self._workspace.store, card, device)
            return published.predicted_by(model, card, self._dataset.test_images).numpy()

    @cached_property
    def _dataset(self) -> "Dataset":
        from nightshift.data.datasets import open_dataset

        return open_dataset(self._workspace, read_record(self._workspace.store, self._run_id)[0].dataset)
