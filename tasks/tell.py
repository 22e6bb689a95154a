"""Task: tell the team's webhook of a verdict."""

from nightshift.judging.table import guards_table
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import Webhook
from nightshift.tracking import beside
from nightshift.workspace import Workspace
from tasks import step


@step
def tell(workspace: Workspace, model: ModelRef, verdict: Verdict, hook: Webhook) -> None:
    """Send the verdict with its table. It takes a minute at most, and failure is a warning."""
    beside.send_verdict(workspace.store, hook, model, verdict, guards_table(verdict))
