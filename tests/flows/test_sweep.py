"""A sweep that was started twice: both of its flow runs look after the same trials."""

from typing import Any

import pytest

from flows.sweep import _Runs
from nightshift.storage.store import Store
from nightshift.sweeps.stored import Sweep, Trial, begin
from tests.sweeps.test_sweep import asked, plan, trained


def test_a_sweep_whose_other_flow_run_has_asked_for_the_last_trials_asks_for_no_more(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan({"lr": [0.1, 0.2, 0.3]})
    known = begin(store, planned)
    both = asked(store, planned, 3)
    started = []

    def start(runs: _Runs, study: Sweep, trial: Trial) -> None:
        started.append(trial.run_id)
        for number in range(3):
            runs.records[study.asked[number].run_id] = trained(store, study, number, [0.5], "finished")

    monkeypatch.setattr(_Runs, "_flow_run", start)
    unused: Any = None
    assert _Runs(unused, store, unused).train_all(known, parallel=3).asked == both.asked
    assert started == [both.asked[-1].run_id]
