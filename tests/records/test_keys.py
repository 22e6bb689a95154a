"""Keys: what nightshift writes for a run is found again as that run's."""

from hypothesis import example, given

from nightshift.records.keys import Place, payload_key, place_of, record_key, report_key
from nightshift.records.versions import card_key
from tests.test_refs import RUN_IDS


@given(RUN_IDS)
@example("ends-with.")
def test_every_key_of_a_run_is_known_as_its_own_whatever_it_is_called(run_id: str) -> None:
    assert place_of(record_key(run_id)) == Place("record", run_id)
    assert place_of(payload_key(run_id, 20, 1)) == Place("payload", run_id)
    assert place_of(report_key(run_id, "report.html")) == Place("report", run_id)
    assert place_of(card_key(run_id, run_id)) == Place("version", run_id)
