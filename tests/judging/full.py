"""A report that has everything a report can have, of a night that was long and often interrupted."""

from dataclasses import replace
from typing import Any

import torch

from nightshift.judging import evaluation
from nightshift.judging.drift import CameIn, Drift, LabelErrors, LabelShift, Looked, Moved, Suspect, Unusual, drift_key
from nightshift.judging.evaluation import Metrics
from nightshift.judging.near import Near
from nightshift.judging.report import Report, build_report
from nightshift.records.curve import CurvePoint
from nightshift.records.keys import report_key
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import Origin, read_record
from nightshift.refs import ChampionRef, Comparison, DatasetRef, Guard, Verdict
from nightshift.storage import documents
from nightshift.tracking.metrics import CheckpointLine, TrainingLine
from nightshift.workspace import Workspace
from tests.judging.test_goodput import Night
from tests.made_up import known
from tests.records.test_lease import RESULT, spec

HOURS = 12
EPOCHS = 300


def full_report(workspace: Workspace, classes: int, size: int = 128) -> Report:
    """Twelve hours with five interruptions, on noisy photographs of so many classes.

    Args:
        workspace: only its home is used.
    """
    night = Night()
    here = Workspace(night.store, workspace.home, 60, 5)
    dataset = known(here, size, classes, train=60, test=60)
    _earlier_nights(night, dataset, 40)
    night.scheduled = night.now
    for lost in (1, 20, 3, 40, 7):
        night.attempt(trains=HOURS * 600, lost=lost)
        night.passes(100)
    night.attempt(trains=HOURS * 600, ends="finished")
    record = read_record(night.store, "run")[0]
    config = {**record.config, "schedule": {**record.config["schedule"], "epochs": EPOCHS}}
    record = record.changed(dataset=dataset, config=config, total_steps=record.step, curve=_curve(record.step))
    _write_lines(night)
    for run_id, seed in (("run", 0), ("champion", 1)):
        metrics = _metrics(dataset, seed)
        night.store.put(report_key(run_id, "evaluation.json"), metrics.model_dump_json().encode())
    night.store.put(drift_key("run"), documents.encoded(_drift(dataset)))
    return build_report(here, record, _verdict(dataset), price_per_hour=2.5)


def names_of(dataset: DatasetRef) -> tuple[str, ...]:
    return tuple(f"hexagon screw, M{number}" for number in range(dataset.classes))


def _earlier_nights(night: Night, dataset: DatasetRef, count: int) -> None:
    """Each of two hours or so, of which the training takes the more the later it is."""
    for number in range(count):
        origin = Origin(scheduled_at=night.now, began_at=night.passes(600))
        night.passes(60 * (count - number))
        with hold_run(night.store, replace(spec(f"parts-{number:02}"), dataset=dataset, origin=origin), 60) as run:
            run.trains()
            night.passes(5000 + 100 * number)
            night.seconds = 5000 + 100 * number
            night.save(run)
            night.passes(300)
            accuracy, promoted = 0.7 + 0.002 * number + 0.01 * (number % 3), number % 3 == 2
            verdict = Verdict(promoted=promoted, reason="", comparison=None, champion=None)
            result = RESULT.changed(test_accuracy=accuracy, verdict=verdict)
            run.end("finished", result=result)
        night.passes(22 * 3600 - 100 * number)
    night.seconds = 0


def _curve(steps: int) -> list[CurvePoint]:
    return [
        CurvePoint(
            epoch=epoch,
            step=epoch * steps // EPOCHS,
            loss=3 / epoch + 0.5,
            accuracy=1 - 0.9 / epoch,
            validation_loss=3 / epoch + 0.7,
            validation_accuracy=0.95 - 0.9 / epoch,
        )
        for epoch in range(1, EPOCHS + 1)
    ]


def _write_lines(night: Night) -> None:
    """A line every five seconds, and a checkpoint every thirty, as in any night."""
    chance = torch.Generator().manual_seed(0)
    lines: list[TrainingLine | CheckpointLine] = []
    start = read_record(night.store, "run")[0].events[0].at
    for second in range(5, HOURS * 3600, 5):
        at, share = start + (night.now - start) * second / (HOURS * 3600), second / (HOURS * 3600)
        luck = float(torch.rand((), generator=chance))
        common: dict[str, Any] = {"at": at, "step": 10 * second, "epoch": int(share * EPOCHS) + 1}
        lines.append(
            TrainingLine(
                **common,
                loss=0.5 + 3 / (1 + 100 * share) + 0.2 * luck,
                accuracy=0.9 * share**0.2,
                learning_rate=0.1 * (1 - share),
                images_per_second=300 + 50 * luck,
                train_seconds=float(second),
            )
        )
        if second % 30 == 0:
            lines.append(CheckpointLine(**common, bytes=10**8, stall_seconds=0.02 + 0.01 * luck, save_seconds=1.0))
    night.store.put(
        report_key("run", "metrics.jsonl"), "".join(f"{line.model_dump_json()}\n" for line in lines).encode()
    )


def _metrics(dataset: DatasetRef, seed: int) -> Metrics:
    chance, count = torch.Generator().manual_seed(seed), dataset.classes
    labels = torch.randint(0, count, (max(10 * count, 2000),), generator=chance)
    others = torch.randint(0, count, labels.shape, generator=chance)
    predicted = torch.where(torch.rand(labels.shape, generator=chance) < 0.3, others, labels)
    answers = evaluation.Answers(
        labels=labels,
        predicted=predicted,
        confidence=torch.rand(labels.shape, generator=chance),
        in_top5=torch.ones(len(labels), dtype=torch.bool),
        loss=torch.ones(len(labels)),
    )
    measured = evaluation.measure(answers, names_of(dataset))
    mistakes = [mistake.model_copy(update={"image": at}) for at, mistake in enumerate(measured["mistakes"])]
    near = [Near(split="test", image=at, train=at, pixels=0.97, network=0.99) for at in range(30)]
    digests = dict.fromkeys(("checkpoint", "weights_sha256", "predictions_sha256"), "0" * 64)
    fields = {**digests, **measured, "mistakes": mistakes, "near": near, "dataset_digest": dataset.digest}
    return Metrics(**fields, tta="off", predictions="none")


def _drift(dataset: DatasetRef) -> Drift:
    names = names_of(dataset)
    image: dict[str, Any] = {"split": "train"}
    labels = [(names[at % len(names)], names[-1 - at % len(names)]) for at in range(20)]
    unusual = [
        Unusual(**image, number=at, id=f"{one}/{at:05}.png", label=one, predicted=two, confidence=0.9, distance=1.0)
        for at, (one, two) in enumerate(labels)
    ]
    suspects = [
        Suspect(
            **image,
            number=20 + at,
            by="champion",
            id=f"{one}/{at:05}.png",
            label=one,
            suggested=two,
            given=0.01,
            probability=0.9,
        )
        for at, (one, two) in enumerate(labels)
    ]
    some = Looked(images=2000, known=1980, accuracy=0.81, interval=(0.79, 0.83), confidence=0.7)
    moved = [Moved(name=one, before=100, tonight=120, moved=0.01) for one, _ in labels[:10]]
    return Drift(
        run_id="run",
        weights_sha256="0" * 64,
        champion="champion",
        labels=LabelShift(before=90_000, tonight=91_000, came=1500, went=500, distance=0.02, p_value=0.01, moved=moved),
        came_in=CameIn(
            images=1500, new=some, old=some, confidence_p=0.5, discrepancy=0.1, p_value=0.001, unusual=unusual
        ),
        label_errors=LabelErrors(images=9000, found=90, suspects=suspects),
        problems=["likely wrong labels: cleanlab could not be asked"],
        seconds=12.3,
    )


def _verdict(dataset: DatasetRef) -> Verdict:
    measured: dict[str, Any] = {"images": 50, "difference": -0.02, "low": -0.06, "high": 0.02, "p_value": 0.3}
    guards = [Guard(name=name, kind="class", ok=at != 3, **measured) for at, name in enumerate(names_of(dataset)[:20])]
    whole = Guard(name="all images", kind="whole", ok=True, **measured)
    return Verdict(
        promoted=False,
        reason="it is worse on the class 3 than a guard allows",
        comparison=Comparison(
            champion="champion",
            images=10_000,
            only_candidate=300,
            only_champion=320,
            difference=-0.002,
            low=-0.007,
            high=0.003,
            p_value=0.4,
        ),
        champion=ChampionRef(
            name=dataset.name, version="champion", run_id="champion", test_accuracy=0.8, previous=None
        ),
        guards=[whole, *guards],
        guarded=dataset.classes,
    )
