"""Which labels are likely wrong, by cleanlab's confident learning (Northcutt et al. 2021, arXiv 1911.00068)."""

import warnings
from importlib.util import find_spec

import numpy as np

_FEWEST = 5
"""Labels of a class with fewer images are not doubted: cleanlab needs the model's mean confidence in each class."""


def is_installed() -> bool:
    """Whether the extra `nightshift[cleanlab]` is here."""
    return find_spec("cleanlab") is not None


def suspects(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The places of the images whose labels are likely wrong, int64 (M,), those that look most wrong first.

    Args:
        labels: the number of each image's class, int64 (N,).
        probabilities: of each class, by a model that was not trained on these images, float32 (N, classes).
    """
    # cleanlab's memory grows as the number of classes squared, so the rare ones are left out first.
    classes = np.flatnonzero(np.bincount(labels, minlength=probabilities.shape[1]) >= _FEWEST)
    places = np.flatnonzero(np.isin(labels, classes))
    if len(classes) < 2:
        return np.array([], np.int64)
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may overlook some in a class of few images
        found = find_label_issues(
            np.searchsorted(classes, labels[places]),
            probabilities[places][:, classes],
            return_indices_ranked_by="self_confidence",
            n_jobs=1,
        )
    return places[np.asarray(found, np.int64)]
