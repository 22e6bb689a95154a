"""The rights in the bucket: the example policy allows what nightshift asks for, and no more."""

import fnmatch
import hashlib
import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from nightshift.data import sources
from nightshift.data.datasets import fetch, pack
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.judging import gate
from nightshift.judging.evaluation import evaluate
from nightshift.judging.report import publish_report
from nightshift.publishing.publish import publish_model
from nightshift.records import orphans
from nightshift.refs import DatasetRef
from nightshift.settings import GateSettings
from nightshift.storage.s3 import MIB, S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.deployments.manifests import DEPLOYMENTS
from tests.stores import begin_upload

POLICY = DEPLOYMENTS / "kubernetes" / "s3-policy.json"
# What IAM asks for where that is not called like the operation.
_RIGHTS = {
    "HeadObject": "GetObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
}
Request = tuple[str, str]  # a right, and the key or nothing


@pytest.fixture
def asked(workspace: Workspace) -> set[Request]:
    """What the workspace's store is asked for from now on."""
    seen: set[Request] = set()
    store = workspace.store
    assert isinstance(store, S3)

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        key = params.get("Key", "").removeprefix(store.prefix)
        seen.add(("s3:" + _RIGHTS.get(model.name, model.name), key))

    store._client.meta.events.register("provide-client-params.s3", note)
    return seen


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def refused(requests: set[Request], policy: dict[str, Any]) -> set[Request]:
    """Those that the policy does not allow."""

    def allows(statement: dict[str, Any], right: str, key: str) -> bool:
        name = f"arn:aws:s3:::EXAMPLE-BUCKET/nightshift/{key}" if key else "arn:aws:s3:::EXAMPLE-BUCKET"
        assert statement["Effect"] == "Allow"
        return right in listed(statement["Action"]) and any(
            fnmatch.fnmatchcase(name, pattern) for pattern in listed(statement["Resource"])
        )

    return {
        (right, key)
        for right, key in requests
        if not any(allows(statement, right, key) for statement in policy["Statement"])
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, cifar10: DatasetRef, home: Path) -> None:
    """A data set of a few images and one outside source, so that it is stored and read in no time."""
    whole = load_file(home / "datasets" / f"{cifar10.digest}.safetensors")
    few: Arrays = {name: array[:20].copy() for name, array in whole.items()}
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in few.items()}
    monkeypatch.setitem(SPECS, "tiny", Spec("tiny", SPECS["cifar10"].classes, sums))
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"elsewhere": lambda scratch: dict(few)})


def live(workspace: Workspace, cifar10: DatasetRef, tmp_path: Path) -> None:
    """All that a run, its publication, `doctor` and `gc` do to the store, and each way to do it."""
    store = workspace.store
    elsewhere = Workspace(store, tmp_path / "a new machine", workspace.lease_seconds, workspace.save_retry_seconds)
    first = pack(elsewhere, fetch(elsewhere, "tiny"))
    (elsewhere.home / "datasets" / f"{first.digest}.safetensors").unlink()
    pack(elsewhere, fetch(elsewhere, "tiny"))
    store.put(first.key, b"damaged")
    (elsewhere.home / "datasets" / f"{first.digest}.safetensors").unlink()
    pack(elsewhere, fetch(elsewhere, "tiny"))

    checkpoint = train_alone(workspace, "run", small_config(checkpoint_every_steps=10, keep_last=1), cifar10)
    evaluation = evaluate(workspace, checkpoint, cifar10)
    model = publish_model(workspace, checkpoint, cifar10, evaluation)
    verdict = gate.promote(store, model, GateSettings())
    publish_report(workspace, checkpoint, evaluation, model, verdict, price_per_hour=None)
    store.put("reports/no-such-run/report.html", b"")

    store.upload("checkpoints/run/1000-0.pt", io.BytesIO(bytes(17 * MIB)))
    store.download_bytes("checkpoints/run/1000-0.pt")
    store.put("models/tiny/unfinished/weights.pth", b"a version without its card")
    store.put("probe/0123456789abcdef", b"")
    begin_upload(store, "checkpoints/run/1001-0.pt")
    orphans.collect(store, orphans.find(store, timedelta(0)))


@pytest.mark.usefixtures("tiny")
def test_the_example_policy_allows_what_nightshift_asks_of_the_bucket_and_no_other_right(
    workspace: Workspace, cifar10: DatasetRef, asked: set[Request], tmp_path: Path
) -> None:
    live(workspace, cifar10, tmp_path)
    policy = json.loads(POLICY.read_text())
    assert refused(asked, policy) == set()
    granted = {right for statement in policy["Statement"] for right in listed(statement["Action"])}
    assert granted == {right for right, _ in asked}


def test_a_policy_that_lacks_a_right_is_found_out() -> None:
    policy = json.loads(POLICY.read_text())
    assert refused({("s3:DeleteObject", "runs/run.json")}, policy)
    assert refused({("s3:GetObject", "somebody-elses/key")}, policy)
    assert refused({("s3:DeleteBucket", "")}, policy)
    assert not refused({("s3:DeleteObject", "checkpoints/run/1-1.pt"), ("s3:ListBucket", "")}, policy)
