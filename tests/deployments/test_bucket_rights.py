"""The rights in the bucket: a real S3 server holds users to the example policies, and these allow what is asked.

SeaweedFS enforces policies as AWS does, as far as they are used here. It knows no condition on `If-None-Match`, so no
policy that it understands can forbid to write over a card.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.numpy import load_file

from models import build_model
from nightshift.config.project import DatasetConfig
from nightshift.data.known import fetch, pack
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.errors import StorageDeniedError
from nightshift.judging import gate
from nightshift.judging.evaluation import evaluate
from nightshift.judging.report import publish_report
from nightshift.local import s3
from nightshift.publishing.publish import publish_model
from nightshift.records import champions, deletion, index, orphans, retention, serving
from nightshift.records.rebuild import rebuild
from nightshift.records.snapshots import Trained, note_trained, read_history
from nightshift.refs import DatasetRef, ModelRef
from nightshift.settings import GateSettings, KeepSettings, S3Settings
from nightshift.storage.s3 import MIB, S3, Credentials
from nightshift.sweeps import stored
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import eventually, small_config
from tests.deployments.manifests import KUBERNETES_FOLDER
from tests.own_images import write_images
from tests.stores import begin_upload

PREFIX = "nightshift"
ROLES = ("train", "promote", "gc", "delete", "keep")
CHAMPION = "models/tiny/champion.json"
COPY = "models/tiny/champion.copy.json"
CARD = "models/tiny/run/card.json"
# What IAM asks for where that is not called like the operation.
_RIGHTS = {
    "HeadObject": "GetObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
}
Request = tuple[str, str]
"""A right, and the name of what it was asked for."""


def policy_of(role: str) -> dict[str, Any]:
    text = (KUBERNETES_FOLDER / f"s3-policy-{role}.json").read_text()
    policy: dict[str, Any] = json.loads(text.replace("EXAMPLE-BUCKET", s3.BUCKET))
    return policy


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@dataclass
class Bucket:
    """A server of its own whose administrator can make users."""

    admin: S3
    iam: Any
    users: dict[tuple[str, ...], Credentials]

    def as_user(self, *roles: str, prefix: str = PREFIX) -> S3:
        """The store as somebody with these policies, and no other right, sees it."""
        settings = S3Settings(endpoint_url=self.admin.endpoint, bucket=s3.BUCKET, prefix=prefix)
        if roles not in self.users:
            name = "-".join(roles)
            self.iam.create_user(UserName=name)
            for role in roles:
                self.iam.attach_user_policy(UserName=name, PolicyArn=f"arn:aws:iam:::policy/{role}")
            key = self.iam.create_access_key(UserName=name)["AccessKey"]
            self.users[roles] = Credentials(key["AccessKeyId"], key["SecretAccessKey"])
            eventually(lambda: _is_known(S3(settings, self.users[roles], attempts=1)))
        return S3(settings, self.users[roles])


def _is_known(store: S3) -> bool:
    try:
        store.check_access()
    except StorageDeniedError:
        return False
    return True


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    plan, home = s3._plan, tmp_path_factory.mktemp("bucket")

    def with_users(directory: Path, credentials: Credentials) -> Any:
        server = plan(directory, credentials)
        others = [word for word in server.command if not word.startswith("-s3.iam")]
        return replace(server, command=[*others, "-s3.iam.readOnly=false"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "_plan", with_users)
        with s3.embedded_s3(home, PREFIX) as admin:
            pair = s3.embedded_credentials(home / "s3")
            iam: Any = boto3.client(
                "iam",
                endpoint_url=admin.endpoint,
                region_name="us-east-1",
                aws_access_key_id=pair.access_key,
                aws_secret_access_key=pair.secret_key,
            )
            for role in ROLES:
                iam.create_policy(PolicyName=role, PolicyDocument=json.dumps(policy_of(role)))
            yield Bucket(admin, iam, {})


def note_requests(store: S3, seen: set[Request]) -> S3:
    """Add what the store is asked for from now on."""

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        name = f"arn:aws:s3:::{'/'.join(filter(None, (params['Bucket'], params.get('Key'))))}"
        seen.add(("s3:" + _RIGHTS.get(model.name, model.name), name))

    store._client.meta.events.register("provide-client-params.s3", note)
    return store


def unused(policy: dict[str, Any], requests: set[Request]) -> list[Request]:
    """The rights that a policy gives and that nobody has asked for."""
    return [
        (right, resource)
        for statement in policy["Statement"]
        if statement["Effect"] == "Allow"
        for right in listed(statement["Action"])
        for resource in listed(statement["Resource"])
        if not any(right == asked and fnmatchcase(name, resource) for asked, name in requests)
    ]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, cifar10: DatasetRef, home: Path) -> None:
    """A data set of a few images and one outside source, so that it is stored and read in no time."""
    whole = load_file(home / "datasets" / f"{cifar10.digest}.safetensors")
    few: Arrays = {name: whole[name][:64].copy() for name in SPECS["cifar10"].sha256}
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in few.items()}
    classes = SPECS["cifar10"].classes
    monkeypatch.setitem(SPECS, "tiny", Spec("tiny", classes, sums))
    monkeypatch.setattr("nightshift.data.sources.cifar10.OUTSIDE_SOURCES", {"elsewhere": lambda scratch: dict(few)})


class Torn(io.BytesIO):
    """A file that can no longer be read after its first part."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 64 * MIB:
            raise OSError("the disk is gone")
        return super().read(size)


def train_and_publish(workspace: Workspace, run_id: str) -> ModelRef:
    """The first part of a night, from the data set to the published version and the report."""
    dataset = pack(workspace, fetch(workspace, "tiny"))
    config = small_config(max_train_images=64, checkpoint_every_steps=1, keep_last=1, triton=True)
    checkpoint = train_alone(workspace, run_id, config, dataset)
    evaluation = evaluate(workspace, checkpoint, dataset)
    model = publish_model(workspace, checkpoint, dataset, evaluation)
    publish_report(workspace, checkpoint, evaluation, model, None, price_per_hour=None)
    return model


def pack_images_of_the_team(workspace: Workspace, folder: Path, count: int = 60) -> None:
    """The part of a night with `retrain` that one with CIFAR-10 does not have."""
    write_images(folder, range(count))
    config = DatasetConfig(source=str(folder / "images"), image_size=32)
    packed = pack_snapshot(workspace, make_snapshot(workspace.store, "parts", config))
    note_trained(workspace.store, "parts", Trained(run_id="run", snapshot=packed.digest, config_digest="0" * 64))


def do_what_nights_rarely_do(workspace: Workspace) -> None:
    """What comes with large checkpoints, a damaged data set, sweeps, a failing disk and lost responses."""
    store = workspace.store
    dataset = pack(workspace, fetch(workspace, "tiny"))
    (workspace.home / "datasets" / f"{dataset.digest}.safetensors").unlink()
    store.put(dataset.key, b"damaged")
    pack(workspace, fetch(workspace, "tiny"))
    stored.begin(store, stored.plan("sweep", "tutorial", {"seed": [1, 2]}))
    stored.begin(store, stored.plan("sweep", "tutorial", {"seed": [1, 2]}))
    store.upload("checkpoints/run/1000-0.pt", io.BytesIO(bytes(17 * MIB)))
    store.download_bytes("checkpoints/run/1000-0.pt")
    theirs = workspace.home / "theirs.pth"
    torch.save(build_model("simple_cnn", 10).state_dict(), theirs)
    train_alone(workspace, "begun", small_config(start="pretrained", weights=str(theirs)), dataset)
    for torn in ("checkpoints/run/1001-0.pt", dataset.key, f"weights/{'0' * 64}"):
        with pytest.raises(OSError, match="disk is gone"):
            store.upload(torn, Torn(bytes(65 * MIB)))
    store.put("probe/0123456789abcdef", b"third")
    store.get("probe/0123456789abcdef")


def leave_orphans(store: S3) -> set[str]:
    """What killed processes leave behind, of each kind."""
    objects = {
        "reports/no-such-run/report.html",
        "models/tiny/unfinished/weights.pth",
        "checkpoints/no-such-run/7-1.pt",
        f"datasets/parts/parts/{'1' * 64}.parquet",
        f"datasets/parts/snapshots/{'1' * 64}.json",
        f"datasets/shards/{'1' * 64}",
        f"weights/{'1' * 64}",
    }
    uploads = {
        "checkpoints/no-such-run/8-1.pt",
        "models/tiny/unfinished/model.pt2",
        f"datasets/{'0' * 64}/packed.safetensors",
        f"weights/{'2' * 64}",
    }
    for key in objects:
        store.put(key, b"nobody's")
    for key in uploads:
        begin_upload(store, key)
    return objects | uploads


@pytest.mark.usefixtures("tiny")
def test_a_night_has_the_rights_it_needs_and_each_role_no_other(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[Request]] = {role: set() for role in ROLES}
    trainer = note_requests(bucket.as_user("train"), asked["train"])
    workspace = Workspace(trainer, tmp_path, lease_seconds=60, save_retry_seconds=5)
    model = train_and_publish(workspace, "run")
    pack_images_of_the_team(workspace, tmp_path)
    do_what_nights_rarely_do(workspace)
    with pytest.raises(StorageDeniedError, match=r"champion\.json"):
        gate.promote(trainer, model, GateSettings())

    night = replace(workspace, store=bucket.as_user("train", "promote"))
    assert gate.promote(night.store, model, GateSettings()).promoted
    serving.serve(night.store, "tiny")
    train_and_publish(night, "another")
    promoter = note_requests(bucket.as_user("promote"), asked["promote"])
    promoter.check_access()
    champions.promote_by_hand(promoter, "tiny", "another")
    serving.serve(promoter, "tiny")
    assert champions.roll_back(promoter, "tiny").version == "run"
    serving.serve(promoter, "tiny")
    bucket.admin.delete(CHAMPION)
    rebuilt = rebuild(promoter, "tiny").champion
    assert rebuilt
    assert rebuilt.version == "run"

    left = {*leave_orphans(bucket.admin), serving.model_key("tiny", 1), serving.model_key("tiny", 2)}
    janitor = note_requests(bucket.as_user("gc"), asked["gc"])
    found = orphans.find(janitor, timedelta(0))
    assert left <= set(found.keys)
    assert set(orphans.collect(janitor, found).keys) == set(found.keys)
    # Younger than a minute it is not found.
    orphans.collect(janitor, orphans.Orphans(list(janitor.list("probe/")), []))
    monkeypatch.setattr(index, "_WORTH", 1)
    for damage in (b"", b"damaged"):
        bucket.admin.put(index.KEY, damage)
        index.renew(janitor)
        assert len(index.Known(trainer)) == 2

    train_and_publish(night, "unwanted")
    begin_upload(bucket.admin, "checkpoints/unwanted/9-1.pt")
    begin_upload(bucket.admin, "models/tiny/unwanted/model.pt2")
    remover = note_requests(bucket.as_user("delete"), asked["delete"])
    deletion.delete(remover, "unwanted")
    assert not any("unwanted" in item.key for item in bucket.admin.list(""))

    pack_images_of_the_team(workspace, tmp_path, 80)
    left = {*leave_orphans(bucket.admin), serving.model_key("tiny", 3)}
    bucket.admin.put("probe/0123456789abcdef", b"left")
    keeper = note_requests(bucket.as_user("keep"), asked["keep"])
    monkeypatch.setattr(retention, "CHAMPIONS", 1)
    monkeypatch.setattr(retention, "_COMPARED", timedelta(0))
    assert champions.promote_by_hand(bucket.admin, "tiny", "another").version == "another"
    serving.serve(bucket.admin, "tiny")
    digest = read_history(keeper, "parts").entries[0].digest
    spent = retention.find(keeper, KeepSettings(models=1, snapshots=1))
    assert ("tiny", "run") in spent.retired
    sweep = list(keeper.list("sweeps/"))
    retention._let_go(keeper, replace(spent, sweeps=sweep, snapshots=[("parts", digest)]))
    bucket.admin.put(index.KEY, b"damaged")
    retention.tidy(keeper, KeepSettings(models=1), timedelta(0))
    orphans.collect(keeper, orphans.Orphans(list(keeper.list("probe/")), []))
    gone = {item.key for item in bucket.admin.list("")}
    assert serving.problem(bucket.admin, "tiny") is None
    assert not any(key.startswith(("sweeps/", "runs/run", "models/tiny/run/")) or key in left for key in gone)

    assert {role: unused(policy_of(role), asked[role]) for role in ROLES} == {role: [] for role in ROLES}


def written(store: S3, key: str) -> None:
    store.put(key, b"another's")


def deleted(store: S3, key: str) -> None:
    store.delete(key)


@pytest.mark.parametrize(
    ("roles", "action", "keys"),
    [
        (["train"], written, [CHAMPION, COPY, "notes.txt"]),
        (["train", "promote"], written, ["notes.txt"]),
        (["promote"], written, [CARD, "models/tiny/run/weights.pth", "runs/run.json", "notes.txt"]),
        (["train"], written, ["triton/tiny/config.pbtxt", "triton/tiny/1/model.onnx"]),
        (["gc"], deleted, ["triton/tiny/config.pbtxt"]),
        (["train", "promote"], written, [index.KEY]),
        (["gc"], written, [CHAMPION, COPY, CARD, "models/tiny/run/weights.pth", "runs/run.json", "notes.txt"]),
        (
            ["train", "promote"],
            deleted,
            [
                *(CHAMPION, COPY, CARD, "models/tiny/run/weights.pth", "runs/run.json", "reports/run/report.html"),
                *("datasets/parts/history.json", "datasets/parts/snapshots/d.json", "datasets/shards/d", "notes.txt"),
            ],
        ),
        (["keep"], written, [CARD, "models/tiny/run/weights.pth", "reports/run/report.html", "notes.txt"]),
        (["keep"], deleted, [CHAMPION, COPY, "datasets/d/packed", "datasets/parts/history.json", "notes.txt"]),
        (["delete"], written, [CHAMPION, COPY, CARD, "models/tiny/run/weights.pth", "notes.txt"]),
        (["delete"], deleted, [CHAMPION, COPY, "sweeps/s.json", "datasets/d/packed", "notes.txt"]),
        (
            ["gc"],
            deleted,
            [
                *(CHAMPION, COPY, CARD, "runs/run.json", "sweeps/s.json", "datasets/d/packed", "notes.txt"),
                "datasets/parts/history.json",
            ],
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "+".join(value[:2]),
)
def test_nobody_but_who_must_can_write_or_delete_what_a_night_has_made(
    bucket: Bucket, roles: list[str], action: Callable[[S3, str], None], keys: list[str]
) -> None:
    store = bucket.as_user(*roles)
    for key in keys:
        bucket.admin.put(key, b"ours")
        with pytest.raises(StorageDeniedError, match=key):
            action(store, key)
        assert bucket.admin.get(key)[0] == b"ours"


def test_no_role_reaches_beyond_the_prefix(bucket: Bucket) -> None:
    bucket.admin.at("s3://nightshift/runs/run.json")[0].put("runs/run.json", b"another project's")
    for role in ROLES:
        with pytest.raises(StorageDeniedError):
            bucket.as_user(role, prefix="").get("runs/run.json")
