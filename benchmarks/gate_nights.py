"""What the champion gate makes of many nights on the same 10,000 test images, by its settings.

The models are made up, the gate is the real one, on a store in memory. An image is as easy as a normal distribution
says; a model has it right with a probability that grows with the image's ease and the model's skill. Models of the same
skill have 94 % right and differ on about five images of a hundred.

    equal    each night's model has the same skill: how often does one go live, and in how many months?
    sliding  each night's model is trained on from the live one, and is a little worse than that on average: how far
             does the true accuracy of what is live fall below the best that was live in the thirty nights before?

    A minute; no time is measured.

    python benchmarks/gate_nights.py [--months N] [--slides N] [--quick] [--json FILE]
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import machine, show, write_json
from safetensors.numpy import save
from scipy.special import ndtr, ndtri

from nightshift.config.recipes import make_config
from nightshift.judging import gate
from nightshift.judging.answers import PREDICTIONS
from nightshift.records.versions import ModelCard, publish_version
from nightshift.settings import GateSettings
from nightshift.storage.memory import MemoryStore

IMAGES, POPULATION = 10_000, 200_000
ACCURACY, SPREAD = 0.94, 2.5
NIGHTS_A_MONTH, NIGHTS_OF_A_SLIDE, REMEMBERED = 30, 60, 30
STEP, STEP_SPREAD = -0.001, 0.002
"""By how much a model's true accuracy is above that of the one it was trained on from, in shares of 1."""

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "max_regression=0.001": {"max_regression": 0.001},
    "max_regression=0.003": {"max_regression": 0.003},
    "require_significance": {"require_significance": True},
}
SLIDES: dict[str, dict[str, Any]] = {
    "default": {},
    "max_regression=0.003": {"max_regression": 0.003},
    "max_regression=0.003, max_slide=0.01": {"max_regression": 0.003, "max_slide": 0.01},
    "max_regression=0.003, max_slide=1 (off)": {"max_regression": 0.003, "max_slide": 1},
}
NEEDED = float(np.sqrt(1 + SPREAD**2))


@dataclass
class Nights:
    """A store of its own, in which a night passes with each candidate."""

    settings: GateSettings
    chance: np.random.Generator
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    night: int = 0
    live: list[int] = field(default_factory=list)
    """The night of the model that is live after each night."""

    def __post_init__(self) -> None:
        self.store = MemoryStore(clock=lambda: self.now)
        self.labels = self.chance.integers(0, 10, IMAGES).astype(np.uint8)
        self.ease = self.chance.normal(0, SPREAD, IMAGES)

    def judge(self, accuracy: float) -> bool:
        """Publish a model of this true accuracy, and ask the gate whether it goes live."""
        right = self.chance.random(IMAGES) < ndtr(self.ease + skill(accuracy))
        predicted = np.where(right, self.labels, (self.labels + 1) % 10).astype(np.uint8)
        version = f"night-{self.night:03}"
        card = ModelCard(
            name="made-up",
            version=version,
            run_id=version,
            architecture="quick_cnn",
            classes=[str(number) for number in range(10)],
            input="float32 (batch, 3, 32, 32)",
            output="logits",
            mean=[125.0, 123.0, 114.0],
            std=[63.0, 62.0, 66.5],
            tta="off",
            test_accuracy=float(right.mean()),
            test_loss=1.0,
            weights_sha256=f"{self.night:064x}",
            config=make_config("quick").model_dump(),
            dataset_digest="1" * 64,
            environment={"device": "cpu"},
            trained_at=self.now,
        )
        publish_version(self.store, card, {PREDICTIONS: save({"predicted": predicted, "labels": self.labels})})
        promoted = gate.promote(self.store, card.ref(), self.settings).promoted
        self.live.append(self.night if promoted else self.live[-1])
        self.night, self.now = self.night + 1, self.now + timedelta(days=1)
        return promoted


def skill(accuracy: float) -> float:
    """What to add to each image's ease so that this share of all images is right."""
    return float(ndtri(accuracy)) * NEEDED


def equal(settings: dict[str, Any], months: int) -> dict[str, float]:
    """How often a model of the same skill goes live, in months one after the other. The first meets nobody."""
    nights = Nights(GateSettings(**settings), np.random.default_rng(0))
    nights.judge(ACCURACY)
    found = np.array([[nights.judge(ACCURACY) for _ in range(NIGHTS_A_MONTH)] for _ in range(months)])
    return {
        "months with a promotion": float(found.any(axis=1).mean()),
        "nights with a promotion": float(found.mean()),
        "months with one, last third": float(found[-(months // 3) :].any(axis=1).mean()),
    }


def sliding(settings: dict[str, Any], slides: int) -> dict[str, float]:
    """How far the true accuracy of what is live falls, in points."""
    falls, ends, promotions = [], [], []
    for number in range(slides):
        nights = Nights(GateSettings(**settings), np.random.default_rng(1_000 + number))
        true = [ACCURACY]
        nights.judge(ACCURACY)
        for _ in range(NIGHTS_OF_A_SLIDE):
            step = nights.chance.normal(STEP, STEP_SPREAD)
            true.append(true[nights.live[-1]] + step)
            nights.judge(true[-1])
        live = np.array(true)[nights.live]
        best = [live[max(0, at - REMEMBERED) : at + 1].max() for at in range(len(live))]
        falls.append(100 * float((np.array(best) - live).max()))
        ends.append(100 * (float(live[-1]) - ACCURACY))
        promotions.append(len(set(nights.live)) - 1)
    return {
        "largest fall, median": float(np.median(falls)),
        "largest fall, worst": max(falls),
        "after sixty nights, median": float(np.median(ends)),
        "promotions": float(np.mean(promotions)),
    }


def main(
    months: Annotated[int, typer.Option(help="Months of equal models, one after the other.")] = 30,
    slides: Annotated[int, typer.Option(help="How often sixty nights are gone through.")] = 30,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of both.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    if quick:
        months, slides = max(months // 10, 3), max(slides // 10, 1)
    ease = np.random.default_rng(0).normal(0, SPREAD, POPULATION)
    right = ndtr(ease + skill(ACCURACY))
    facts = {**machine(), "differ": f"{(2 * right * (1 - right)).mean():.1%}", "months": months, "slides": slides}
    found_equal = {name: equal(settings, months) for name, settings in SETTINGS.items()}
    columns = ["setting of the gate", *found_equal["default"]]
    rows = [[name, *(f"{share:.0%}" for share in figures.values())] for name, figures in found_equal.items()]
    show("Equal models", facts, columns, rows)
    found_sliding = {name: sliding(settings, slides) for name, settings in SLIDES.items()}
    columns = ["setting of the gate", *found_sliding["default"]]
    rows = [[name, *(f"{figure:.2f}" for figure in figures.values())] for name, figures in found_sliding.items()]
    show("Models that are a little worse each night, in points", facts, columns, rows)
    write_json(json, {"facts": facts, "equal": found_equal, "sliding": found_sliding})


if __name__ == "__main__":
    typer.run(main)
