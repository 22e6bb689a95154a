"""Task: write the morning's page and finish the run."""

from prefect.artifacts import create_markdown_artifact

from nightshift.judging.report import publish_report
from nightshift.refs import CheckpointRef, Evaluation, ModelRef, Verdict
from nightshift.workspace import Workspace
from tasks import interruptible, step


@step
def report(
    workspace: Workspace,
    checkpoint: CheckpointRef,
    evaluation: Evaluation,
    model: ModelRef,
    verdict: Verdict | None,
    price_per_hour: float | None,
) -> str:
    """Store the report as HTML, show it as an artifact, and return its URL."""
    with interruptible():
        page = publish_report(workspace, checkpoint, evaluation, model, verdict, price_per_hour)
    create_markdown_artifact(page.markdown, key="report", description=f"Run {checkpoint.run_id}")
    return page.url
