"""Each exported file is what the model is, for whoever loads it without nightshift."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models as networks
from nightshift.checkpoints.payload import read_weights
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError, ExportError
from nightshift.judging import evaluation
from nightshift.publishing import export
from nightshift.publishing.export import FORMATS, Format
from nightshift.publishing.publish import export_run, publish_model
from nightshift.records.run import read_record
from nightshift.records.versions import read_card, read_file
from nightshift.refs import DatasetRef, ModelRef
from nightshift.workspace import Workspace

Candidates = tuple[Workspace, dict[int, ModelRef]]

WITHOUT_NIGHTSHIFT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nightshift", "tasks", "flows"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import numpy as np, onnxruntime, safetensors.torch, torch
from models.quick_cnn import QuickCNN

images = torch.from_numpy(np.load("images.npy")).to(memory_format=torch.channels_last)
found = {}
with torch.no_grad():
    for name, weights in (
        ("state_dict", torch.load("state_dict", weights_only=True)),
        ("safetensors", safetensors.torch.load_file("safetensors")),
    ):
        model = QuickCNN().to(memory_format=torch.channels_last).eval()
        model.load_state_dict(weights)
        found[name] = model(images)
    found["pt2"] = torch.export.load("pt2").module()(images)
session = onnxruntime.InferenceSession("onnx")
found["onnx"] = torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])
np.savez("found.npz", **{name: logits.numpy() for name, logits in found.items()})
"""


def test_each_format_predicts_the_same_in_a_process_without_nightshift(
    candidates: Candidates, cifar10: DatasetRef, tmp_path: Path
) -> None:
    workspace, models = candidates
    record, _ = read_record(workspace.store, models[3].run_id)
    config, dataset = record.train_config(), open_dataset(workspace, cifar10)
    for name in FORMATS:
        (tmp_path / name).write_bytes(export_run(workspace, record, name))
    images = batches.to_input(dataset.test_images[:1000], *batches.normalizer(dataset, config))
    np.save(tmp_path / "images.npy", images.numpy())
    shutil.copytree(Path(str(networks.__file__)).parent, tmp_path / "models")
    plain = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_NIGHTSHIFT], cwd=tmp_path, capture_output=True, text=True
    )
    assert plain.returncode == 0, plain.stderr
    weights = read_weights(workspace.store, record.checkpoints[-1])
    expected = evaluation.predict(evaluation.load_model(config, weights, 10), images)
    found = {name: torch.from_numpy(logits) for name, logits in np.load(tmp_path / "found.npz").items()}
    assert set(found) == set(FORMATS)
    for name, logits in found.items():
        assert torch.equal(logits.argmax(1), expected.argmax(1)), name
        if FORMATS[name].exact:
            assert torch.equal(logits, expected), name
        else:
            assert torch.allclose(logits.softmax(1), expected.softmax(1), rtol=0, atol=1e-5), name


def test_a_version_has_each_file_the_card_lists_and_weights_of_plain_tensors(candidates: Candidates) -> None:
    workspace, models = candidates
    card = read_card(workspace.store, "cifar10", models[1].version)
    assert set(card.files) == {"weights.pth", "weights.safetensors", "model.pt2", "predictions.safetensors"}
    for file_name, listed in card.files.items():
        assert len(read_file(workspace.store, card, file_name)) == listed.bytes


class Lossy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_a_file_that_does_not_do_what_the_model_does_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Format(
        write=lambda model, inputs: b"", run=lambda body, fresh, inputs: fresh(inputs) + inputs[:, :, 0, 0], exact=False
    )
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(ExportError, match="another one"):
        export.export(Lossy(), Lossy(), torch.randn(4, 3, 8, 8), "pt2")


def test_a_network_that_cannot_be_traced_is_told_and_its_training_is_kept() -> None:
    class Branching(Lossy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    with pytest.raises(ExportError, match="cannot be exported as pt2"):
        export.export(Branching(), Branching(), torch.randn(4, 3, 8, 8), "pt2")


def test_pickles_of_whole_models_are_no_format() -> None:
    with pytest.raises(ConfigError, match="The formats are: state_dict, safetensors, pt2, onnx"):
        export.export(Lossy(), Lossy(), torch.randn(4, 3, 8, 8), "pickle")


def test_what_is_published_never_changes(candidates: Candidates, cifar10: DatasetRef) -> None:
    workspace, models = candidates
    record, _ = read_record(workspace.store, models[1].run_id)
    checkpoint = record.ref(record.checkpoints[-1])
    evaluated = evaluation.evaluate(workspace, checkpoint, cifar10)
    key = models[1].key + "card.json"
    body = workspace.store.get(key)[0]
    assert publish_model(workspace, checkpoint, cifar10, evaluated) == models[1]
    other = evaluated.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(ConfigError, match="train under another run id"):
        publish_model(workspace, checkpoint, cifar10, other)
    assert workspace.store.get(key)[0] == body
    assert json.loads(body)["version"] == models[1].version
