"""Task: predict the classes of images with a published model."""

from nightshift.publishing import prediction
from nightshift.refs import PredictionsRef
from nightshift.workspace import Workspace
from tasks import step


@step
def predict(workspace: Workspace, name: str, version: str, images: list[str], out: str) -> PredictionsRef:
    """Load the verified weights, predict every image that can be read, and write a line per image to `out`."""
    return prediction.predict(workspace.store, name, version, images, out)
