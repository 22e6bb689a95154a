"""What a user gives: settings, fields, names, the project file, images. A mistake is a sentence."""

import contextlib
import io
import os
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nightshift.cli.config import parse_overrides
from nightshift.config.project import load_project
from nightshift.data.images import open_image
from nightshift.data.names import checked_config
from nightshift.errors import NightshiftError, UserError
from nightshift.ids import parse_run_id
from nightshift.settings import Settings, _variables
from tests.fuzz import mutations
from tests.fuzz.conftest import FUZZ

TEXT = st.one_of(
    st.sampled_from([value for value in mutations.VALUES if isinstance(value, str)]).map(
        lambda text: text.replace("\x00", "").encode(errors="surrogatepass").decode(errors="replace")
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(("inf", "nan", "-1", "1e400", "{", "[]", "true", "~nosuchuser", "s3://", "http://", "/dev/null")),
)
FIELDS = st.sampled_from(sorted({*checked_config("quick").flat(), "lr", "epochs", "model", "nonsense", ""}))
PROJECT = b'[deployments.nightly]\ncron = "0 2 * * *"\ntimezone = "Europe/Berlin"\n'


@FUZZ
@given(
    chosen=st.dictionaries(st.sampled_from(sorted(_variables(Settings))), TEXT, max_size=4),
    dotenv=st.binary(max_size=60),
)
def test_settings_of_any_content_are_read_or_refused_in_a_sentence(
    chosen: dict[str, str], dotenv: bytes, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path_factory.mktemp("settings")
    (where / ".env").write_bytes(dotenv)
    with monkeypatch.context() as patched, mock.patch.dict(os.environ, chosen):
        patched.chdir(where)
        with contextlib.suppress(UserError):
            Settings.load()


@FUZZ
@given(
    fields=st.lists(st.builds("{}={}".format, FIELDS, TEXT), max_size=4),
    recipe=st.sampled_from(("quick", "tutorial", "x")),
)
def test_fields_of_any_content_make_a_config_or_a_sentence(fields: list[str], recipe: str) -> None:
    with contextlib.suppress(UserError):
        checked_config(recipe, parse_overrides(fields))


@FUZZ
@given(text=TEXT)
def test_a_run_id_of_any_content_is_taken_or_refused_in_a_sentence(text: str) -> None:
    with contextlib.suppress(UserError):
        assert parse_run_id(text) == text


@FUZZ
@given(body=st.one_of(st.binary(max_size=200), mutations.bytes_of(PROJECT)))
def test_a_project_file_of_any_content_is_read_or_refused_in_a_sentence(
    body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("project") / "nightshift.toml"
    path.write_bytes(body)
    with contextlib.suppress(UserError):
        load_project(path)


def _images() -> list[bytes]:
    found = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (200, 100, 50)).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


@FUZZ
@given(body=st.sampled_from(_images()).flatmap(mutations.bytes_of))
def test_an_image_of_any_content_is_opened_or_refused_in_a_sentence(body: bytes) -> None:
    with contextlib.suppress(NightshiftError):
        open_image(body)
