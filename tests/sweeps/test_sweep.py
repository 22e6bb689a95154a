"""A sweep: what is asked, that it is asked once, which trials are stopped early, and what each came to."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import pytest

from nightshift.cli.config import parse_space
from nightshift.config.project import DatasetConfig, Project, RecipeConfig
from nightshift.errors import ConfigError, PreconditionFailedError, ResumeMismatchError, SourceError, StorageError
from nightshift.records.curve import CurvePoint
from nightshift.records.lease import RunSpec, acquire
from nightshift.records.run import Result, RunRecord, Status, read_record
from nightshift.records.snapshots import Entry, Manifest, Split, append, write_manifest
from nightshift.refs import Finding
from nightshift.storage import documents
from nightshift.storage.store import Store
from nightshift.sweeps.stored import Sweep, begin, best_model, end, results
from nightshift.sweeps.stored import plan as plan_sweep
from nightshift.sweeps.study import ask, bad_trials
from tests.records.test_lease import DATASET
from tests.stores import Faulty

GRID = {"momentum": [0.8, 0.9], "lr": [0.01, 0.02, 0.05, 0.1]}
RANGES = {"lr": {"low": 0.01, "high": 1, "log": True}, "epochs": {"low": 4, "high": 10, "step": 2}, "flip": ["off"]}


def plan(space: dict[str, Any] = GRID, sweep_id: str = "sweep", **more: Any) -> Sweep:
    return plan_sweep(sweep_id, "tutorial", space, **more)


def asked(store: Store, planned: Sweep, trials: int) -> Sweep:
    """The sweep after so many trials were asked of which no run has begun."""
    study = begin(store, planned)
    while len(study.asked) < trials:
        study = ask(store, study, {})
    return study


def trained(
    store: Store,
    study: Sweep,
    number: int,
    curve: Sequence[float],
    status: Status = "running",
    detail: str = "",
    validated: Sequence[float | None] = (),
) -> RunRecord:
    """The record of a trial after epochs with these accuracies; on the test images, it has the last of training."""
    trial = study.asked[number]
    run = acquire(store, RunSpec(trial.run_id, study.config(trial.overrides), DATASET, {}, 40), 60)
    points = [
        CurvePoint(
            epoch=epoch,
            step=20 * epoch,
            loss=1.0,
            accuracy=accuracy,
            validation_loss=None if seen is None else 1.0,
            validation_accuracy=seen,
        )
        for epoch, (accuracy, seen) in enumerate(zip_longest(curve, validated), 1)
    ]
    run.update(lambda record: record.changed(curve=points))
    if status != "running":
        made = Result(test_accuracy=curve[-1], test_loss=1.0, weights_sha256="0" * 64, model=f"models/{trial.run_id}/")
        run.end(status, detail, made if status == "finished" else None)
    return read_record(store, trial.run_id)[0]


def test_a_grid_is_every_combination_and_the_field_named_last_changes_fastest(store: Store) -> None:
    study = asked(store, plan(), plan().size)
    assert [(trial.overrides["momentum"], trial.overrides["lr"]) for trial in study.asked] == [
        (momentum, lr) for momentum in GRID["momentum"] for lr in GRID["lr"]
    ]
    assert [trial.run_id for trial in study.asked] == [f"sweep-{number:02}" for number in range(1, 9)]


def test_a_study_stays_in_its_ranges_and_is_the_same_for_the_same_seed_and_results(store: Store) -> None:
    def overrides(sweep_id: str, seed: int) -> list[dict[str, Any]]:
        study = begin(store, plan(RANGES, sweep_id, trials=14, seed=seed))
        found: dict[str, RunRecord] = {}
        for number in range(study.size):
            study = ask(store, study, found)
            record = trained(store, study, number, [study.asked[-1].overrides["lr"] / 2], "finished")
            found[record.run_id] = record
        return [trial.overrides for trial in study.asked]

    first = overrides("first", seed=1)
    assert len({values["lr"] for values in first}) == 14, "a trial was asked again"
    assert all(0.01 <= values["lr"] <= 1 and values["epochs"] in (4, 6, 8, 10) for values in first)
    assert overrides("second", seed=1) == first
    assert overrides("third", seed=2) != first


def test_a_sweep_that_is_started_again_has_the_trials_it_had(store: Store) -> None:
    planned = plan(RANGES, trials=8)
    before = asked(store, planned, 3)
    assert begin(store, planned) == before


def test_a_number_that_comes_as_text_is_the_same_number(store: Store) -> None:
    before = asked(store, plan({"lr": [0.1]}, overrides={"epochs": 3}), 1)
    assert begin(store, plan({"lr": ["0.10"]}, overrides={"epochs": "3"})) == before


def test_of_many_that_ask_at_once_all_get_the_same_trial(store: Store) -> None:
    study = begin(store, plan(RANGES, trials=8))
    with ThreadPoolExecutor(6) as pool:
        after = list(pool.map(lambda _: ask(store, study, {}), range(6)))
    assert {found.model_dump_json() for found in after} == {begin(store, study).model_dump_json()}
    assert len(after[0].asked) == 1


def test_a_trial_whose_writing_down_got_no_answer_is_asked_once(store: Store) -> None:
    study, losing = begin(store, plan()), Faulty(store)
    losing.lose_response("put", PreconditionFailedError("as boto3's own retry sees it"), "sweeps/sweep.json")
    assert len(ask(losing, study, {}).asked) == 1
    assert not losing.planned
    assert len(begin(store, plan()).asked) == 1


def test_a_sweep_that_is_started_again_with_another_space_is_refused(store: Store) -> None:
    begin(store, plan())
    with pytest.raises(ResumeMismatchError, match=r"space: stored .*0\.05"):
        begin(store, plan({"lr": [0.3]}))


@pytest.mark.parametrize(
    "trials",
    [
        [{"run_id": "nightly-2026-11-25", "overrides": {"momentum": 0.8, "lr": 0.01}}],
        [{"run_id": "sweep-01", "overrides": {"momentum": 0.8, "lr": 0.01, "nproc_per_node": 1024}}],
        [{"run_id": "sweep-01", "overrides": {"momentum": 0.8, "lr": "fast"}}],
        [{"run_id": f"sweep-{number:02}", "overrides": {"momentum": 0.8, "lr": 0.01}} for number in range(1, 10)],
    ],
    ids=["a run of somebody else's", "another field", "no value", "too many"],
)
def test_a_sweep_with_trials_that_are_not_its_own_is_not_believed(store: Store, trials: list[dict[str, Any]]) -> None:
    begin(store, plan())
    fields = json.loads(store.get("sweeps/sweep.json")[0]) | {"asked": trials}
    del fields["sha256"]
    store.put("sweeps/sweep.json", json.dumps({**fields, "sha256": documents._digest(fields)}).encode())
    with pytest.raises(StorageError, match=r"sweeps/sweep\.json is damaged"):
        begin(store, plan())


def test_a_damaged_sweep_is_not_believed(store: Store) -> None:
    begin(store, plan())
    body = store.get("sweeps/sweep.json")[0]
    store.put("sweeps/sweep.json", body.replace(b"0.05", b"0.50"))
    with pytest.raises(StorageError, match=r"sweeps/sweep\.json is damaged"):
        begin(store, plan())


@pytest.mark.parametrize(
    ("space", "more", "told"),
    [
        ({}, {}, "nothing is swept"),
        ({"ler": [0.1]}, {}, "Did you mean lr"),
        ({"lr": [0.1, "fast"]}, {}, "lr='fast' is not valid"),
        ({"lr": []}, {}, "a list of values, or a range"),
        ({"lr": 0.1}, {}, "a list of values, or a range"),
        ({"lr": [0.1, "0.10"]}, {}, "named twice"),
        ({"lr": [0.1]}, {"overrides": {"lr": 0.2}}, "swept and fixed at once"),
        ({"lr": [0.1]}, {"overrides": {"optimizer.lr": 0.2}}, "swept and fixed at once"),
        ({"recipe": ["quick"]}, {}, "there is no field 'recipe'|recipe cannot be overridden"),
        ({"dataset": ["cifar10"]}, {}, "Make a sweep of each data set"),
        ({"lr": {"low": 0.1, "high": 1}}, {}, "Say how many trials"),
        ({"lr": {"low": 0.1, "high": 1000}}, {"trials": 2}, "lr=1000.* is not valid"),
        ({"lr": {"low": 1, "high": 0.1}}, {"trials": 2}, "low must be less than high"),
        ({"momentum": {"low": 0, "high": 0.5, "log": True}}, {"trials": 2}, "log needs a low above 0"),
        ({"lr": {"low": 0.1}}, {"trials": 2}, "lr.high: Field required"),
        ({"flip": {"low": 0, "high": 1}}, {"trials": 2}, "flip=0 is not valid"),
        ({"seed": list(range(1001))}, {}, "1,001 trials are too many"),
        ({"lr": [0.1]}, {"trials": 0}, "at least one"),
        ({"lr": [0.1]}, {"sweep_id": "a/b"}, "run id 'a/b' is not valid"),
        ({"lr": [0.1]}, {"sweep_id": "a" * 98}, "is not valid: use up to 100"),
    ],
)
def test_a_space_that_is_not_valid_is_refused_before_anything_starts(
    space: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(space, **more)


def test_the_command_line_names_lists_and_ranges() -> None:
    space = parse_space(["lr=0.01..0.2:log", "epochs=2..8:2", "momentum=0.6, 0.9", "flip=off,random"])
    assert space == {
        "lr": {"low": "0.01", "high": "0.2", "log": True},
        "epochs": {"low": "2", "high": "8", "step": "2"},
        "momentum": ["0.6", "0.9"],
        "flip": ["off", "random"],
    }
    assert plan(space, trials=3).space["momentum"] == [0.6, 0.9]
    for mistake, told in ((["lr"], "is not FIELD=V1,V2"), (["lr=1", "lr=2"], "names lr twice")):
        with pytest.raises(ConfigError, match=told):
            parse_space(mistake)


@pytest.mark.parametrize(
    ("curve", "finished", "is_bad"),
    [
        ((0.2, 0.3), 4, True),
        ((0.2, 0.5), 4, False),  # better than the median, 0.45
        ((0.2,), 4, False),  # in the warm-up
        ((0.2, 0.3), 3, False),  # nothing to compare with yet
        ((0.2, 0.3, 0.3), 4, False),  # it is done
        ((), 4, False),
    ],
)
def test_a_trial_below_the_median_is_stopped_after_its_warmup_and_before_its_last_epoch(
    store: Store, curve: tuple[float, ...], finished: int, is_bad: bool
) -> None:
    study = asked(store, plan(overrides={"epochs": 3}), 5)
    others = [trained(store, study, number, (0.2, 0.3 + number / 10, 0.6), "finished") for number in range(finished)]
    found = {record.run_id: record for record in (*others, trained(store, study, 4, curve))}
    bad = bad_trials(study, found)
    assert set(bad) == ({study.asked[4].run_id} if is_bad else set())
    if is_bad:
        assert "after epoch 2 its training accuracy, 30.0%" in bad[study.asked[4].run_id]


def test_every_trial_has_a_result_and_the_best_is_the_one_with_the_highest_test_accuracy(store: Store) -> None:
    study = asked(store, plan(), 7)
    for number, how in ((1, "pruned"), (4, "failed"), (5, "pruned")):
        study = end(store, study, study.asked[number].run_id, how, "noted")  # type: ignore[arg-type]
    made = [
        trained(store, study, 0, [0.5], "finished"),
        trained(store, study, 1, [0.1], "cancelled"),
        trained(store, study, 2, [0.1], "cancelled"),
        trained(store, study, 3, [0.1], "failed", "the loss is not finite"),
        trained(store, study, 5, [0.7], "finished"),  # before it could be stopped
        trained(store, study, 6, [0.9]),
    ]
    found = {record.run_id: record for record in made}
    ended = results(study, found)
    assert [(result.run_id[-1], result.status, result.reason) for result in ended] == [
        ("1", "finished", ""),
        ("2", "pruned", "noted"),
        ("3", "cancelled", "by a user"),
        ("4", "failed", "the loss is not finite"),
        ("5", "failed", "noted"),
        ("6", "finished", ""),
    ]
    best = best_model(ended, found)
    assert best
    assert (best.run_id, best.test_accuracy) == ("sweep-06", 0.7)
    assert best_model(ended[1:5], found) is None


PROJECT = Project(
    datasets={"parts": DatasetConfig(source="images")},
    recipes={"parts": RecipeConfig(base="tutorial", dataset="parts", epochs=3, lr=0.02)},
)


def snapshot(store: Store, number: int, validation: int = 10, ok: bool = True) -> str:
    """The digest of a snapshot of the data set `parts` that the store has from now on."""
    digest = f"{number:064}"
    splits: dict[Split, int] = {"train": 80, "validation": validation, "test": 10}
    parts: dict[str, Any] = {"images": sum(splits.values()), "refused": 0}
    shape: dict[str, Any] = {"image_size": 32, "resize": "crop", "classes": {"a": 60, "b": 40}, "shards": []}
    write_manifest(store, Manifest(name="parts", digest=digest, test_digest=digest, splits=splits, **parts, **shape))
    counts = {"classes": 2, "added": 0, "removed": 0, "relabelled": 0, "read": 0}
    findings = [Finding(rule="vanished", ok=ok, detail="")]
    append(store, "parts", Entry(digest=digest, at=store.now(), findings=findings, **parts, **counts))
    return digest


def own_sweep(**more: Any) -> Sweep:
    return plan_sweep("own", "parts", {"momentum": [0.5, 0.6, 0.7, 0.8, 0.9]}, project=PROJECT, **more)


def test_a_sweep_of_a_teams_own_images_trains_on_the_newest_that_are_fit_and_stays_with_them(store: Store) -> None:
    with pytest.raises(SourceError, match="there are no images of parts to train on"):
        begin(store, own_sweep())
    snapshot(store, 1)
    fit = snapshot(store, 2)
    snapshot(store, 3, ok=False)
    study = begin(store, own_sweep())
    assert study.snapshot == fit
    snapshot(store, 4)
    assert begin(store, own_sweep()) == study


def test_a_recipe_of_a_teams_own_is_written_down_whole_and_needs_no_project_file_later(store: Store) -> None:
    snapshot(store, 1)
    study = asked(store, own_sweep(overrides={"lr": 0.03}), 1)
    config = study.config(study.asked[0].overrides)
    wanted = {"data.dataset": "parts", "schedule.epochs": 3, "optimizer.lr": 0.03, "optimizer.momentum": 0.5}
    assert {name: config.value_of(name) for name in wanted} == wanted
    assert study.recipe == "parts", "its runs would be those of another recipe"
    again = plan_sweep("again", "parts", {"lr": [0.1, 0.2]}, project=PROJECT)
    assert again.config({"lr": 0.2}).optimizer.lr == 0.2, "the recipe's own value came after the trial's"


@pytest.mark.parametrize(
    ("validation", "overrides", "every"), [(10, {}, 1), (10, {"validate_every": 3}, 3), (0, {}, None)]
)
def test_trials_look_at_the_validation_images_that_there_are(
    store: Store, validation: int, overrides: dict[str, Any], every: int | None
) -> None:
    snapshot(store, 1, validation)
    study = begin(store, own_sweep(overrides=overrides))
    assert study.config({}).evaluation.validate_every == every


@pytest.mark.parametrize(("validation", "best"), [(10, "own-01"), (0, "own-02")])
def test_the_best_trial_is_the_best_on_the_validation_images_where_there_are_any(
    store: Store, validation: int, best: str
) -> None:
    snapshot(store, 1, validation)
    study = asked(store, own_sweep(), 2)
    seen = [(0.5, 0.7, 0.6), (0.8, 0.6, 0.5)] if validation else [(), ()]
    made = [
        trained(store, study, number, (0.1, 0.2, on_test), "finished", validated=seen[number])
        for number, on_test in enumerate((0.3, 0.9))
    ]
    found = {record.run_id: record for record in made}
    ended = results(study, found)
    assert [trial.validation_accuracy for trial in ended] == ([0.6, 0.5] if validation else [None, None])
    chosen = best_model(ended, found)
    assert chosen
    assert chosen.run_id == best


def test_a_trial_is_stopped_early_by_its_validation_accuracy_where_trials_look_at_it(store: Store) -> None:
    snapshot(store, 1)
    study = asked(store, own_sweep(), 5)
    others = [
        trained(store, study, number, (0.2, 0.3, 0.6), "finished", validated=(0.2, 0.5, 0.6)) for number in range(4)
    ]
    bad = trained(store, study, 4, (0.9, 0.9), validated=(0.2, 0.3))
    found = {record.run_id: record for record in (*others, bad)}
    assert "after epoch 2 its validation accuracy, 30.0%" in bad_trials(study, found)[bad.run_id]
