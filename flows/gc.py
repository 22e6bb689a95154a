"""The flow `gc`: delete what nobody will ask for any more."""

from datetime import timedelta
from typing import Annotated

from prefect import flow
from pydantic import Field

from nightshift import progress
from nightshift.records import retention
from nightshift.settings import Settings
from nightshift.tracking import beside
from nightshift.workspace import open_workspace


@flow(name="gc", result_serializer="json")
def gc(older_than_hours: Annotated[float, Field(ge=0, le=876_000)] = 24) -> dict[str, int]:
    """Delete what interrupted runs left behind, and of finished nights what NIGHTSHIFT_KEEP__… keeps no longer.

    Tell MLflow, too, what it lacks: the night before may have failed, or its server was down.

    Args:
        older_than_hours: Leave what is younger of the first; it may be about to be used.
    """
    settings = Settings.load()
    with open_workspace(settings, to_make_room=True) as workspace:
        spent, found = retention.tidy(workspace.store, settings.keep, timedelta(hours=older_than_hours))
        beside.send_all(workspace.store, workspace.mlflow)
    progress.current().say(
        f"deleted {len(found.objects):,} objects, {found.bytes / 1e6:,.1f} MB, with {len(spent.runs):,} runs and "
        f"{len(spent.snapshots):,} snapshots"
    )
    return {"deleted": len(found.objects), "bytes": found.bytes}
