"""The flow `predict`: the classes of images, by a published model."""

from prefect import flow

from nightshift.refs import PredictionsRef
from nightshift.settings import Settings
from nightshift.workspace import open_workspace
from tasks.predict import predict as predict_task


@flow(name="predict", persist_result=True, result_serializer="json")
def predict(images: list[str], out: str, model: str = "champion", name: str = "cifar10") -> PredictionsRef:
    """Predict the classes of images with a published model, and name the images that cannot be read.

    Args:
        images: Files, folders or s3://BUCKET/PREFIX.
        out: Where to write a line per image: a .csv or .jsonl file, or s3://BUCKET/KEY of one.
        model: The version, which is a run id, or `champion`.
        name: Name of the model.
    """
    with open_workspace(Settings.load()) as workspace:
        return predict_task(workspace, name, model, images, out)
