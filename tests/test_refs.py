"""References: what crosses a task boundary or names a run is checked, whoever wrote it."""

import string
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from nightshift.config.recipes import recipe_names
from nightshift.errors import ConfigError
from nightshift.ids import new_run_id, parse_run_id
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef

ALNUM = string.ascii_letters + string.digits
RUN_IDS = st.builds(str.__add__, st.sampled_from(ALNUM), st.text(ALNUM + "._-", max_size=99)).filter(
    lambda text: ".." not in text
)
SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
SHARES, LOSSES = st.floats(0, 1), st.floats(allow_nan=False, allow_infinity=False)
LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=100)

REFS = {
    DatasetRef: st.builds(DatasetRef, name=LINES, digest=SHA256, key=LINES, source=LINES),
    CheckpointRef: st.builds(CheckpointRef, run_id=RUN_IDS, key=LINES, sha256=SHA256),
    Evaluation: st.builds(Evaluation, accuracy=SHARES, loss=LOSSES, weights_sha256=SHA256, key=LINES),
    ModelRef: st.builds(
        ModelRef,
        name=RUN_IDS,
        version=RUN_IDS,
        run_id=RUN_IDS,
        key=LINES,
        test_accuracy=SHARES,
        weights_sha256=SHA256,
    ),
}
ANY_REF = st.one_of(*REFS.values())


def sha256_field(ref: BaseModel) -> str:
    return next(name for name in type(ref).model_fields if name in ("digest", "sha256", "weights_sha256"))


@given(RUN_IDS)
def test_a_name_of_letters_digits_dots_and_dashes_is_a_run_id(text: str) -> None:
    assert parse_run_id(text) == text


@given(RUN_IDS, st.characters(exclude_characters=ALNUM + "._-"), st.data())
def test_one_other_character_anywhere_makes_it_none(text: str, character: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(text)))
    with pytest.raises(ConfigError, match="run id"):
        parse_run_id((text[:position] + character + text[position:])[:100])


@given(RUN_IDS, RUN_IDS)
def test_two_dots_in_a_row_make_it_none(before: str, after: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        parse_run_id(f"{before[:49]}..{after[:49]}")


@given(RUN_IDS, st.sampled_from("._-"))
def test_it_begins_with_a_letter_or_a_digit(text: str, first: str) -> None:
    with pytest.raises(ConfigError, match="run id"):
        parse_run_id(first + text[:99])


NO_RUN_IDS = ["", "a" * 101, "a/b", "/a", "..", "a/../b", "a\\b", ".a", "a\n", "a b", "é", "٣", "a\0"]


@pytest.mark.parametrize("text", NO_RUN_IDS)
def test_what_could_not_be_part_of_a_key_is_refused_and_shown(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_run_id(text)
    assert repr(text) in str(refusal.value)


def test_a_run_id_has_up_to_100_characters() -> None:
    assert parse_run_id("a" * 100) == "a" * 100


@pytest.mark.parametrize("recipe", recipe_names())
def test_new_run_ids_are_valid_and_distinct_and_name_recipe_and_day(recipe: str) -> None:
    names = [new_run_id(recipe, datetime(2026, 1, 2, tzinfo=UTC)) for _ in range(1000)]
    assert len(set(names)) == len(names)
    assert all(parse_run_id(name).startswith(f"{recipe}-20260102-") for name in names)


@given(ANY_REF)
def test_a_ref_survives_json(ref: BaseModel) -> None:
    assert type(ref).model_validate_json(ref.model_dump_json()) == ref


@given(ANY_REF)
def test_a_ref_cannot_be_changed(ref: BaseModel) -> None:
    for name, value in ref:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(ref, name, value)


@given(ANY_REF)
def test_a_ref_refuses_fields_it_does_not_know(ref: BaseModel) -> None:
    with pytest.raises(ValidationError, match="unheard_of"):
        type(ref).model_validate({**ref.model_dump(), "unheard_of": 1})


@pytest.mark.parametrize(
    "wrong", [str.upper, lambda sha: sha[1:], lambda sha: sha + "0", lambda sha: f"{sha}\n", lambda sha: "g" + sha[1:]]
)
@given(ref=ANY_REF)
def test_a_ref_refuses_what_is_no_sha256(wrong: Any, ref: BaseModel) -> None:
    name = sha256_field(ref)
    # Its first digit is a letter, so that capitals make a difference.
    value = wrong("a" + getattr(ref, name)[1:])
    with pytest.raises(ValidationError, match="not a sha256"):
        type(ref).model_validate({**ref.model_dump(), name: value})


@given(st.one_of(REFS[CheckpointRef], REFS[ModelRef]))
def test_a_ref_refuses_a_run_id_that_reaches_out_of_its_place(ref: BaseModel) -> None:
    with pytest.raises(ConfigError, match="run id"):
        type(ref).model_validate({**ref.model_dump(), "run_id": "../other"})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("step", -1), ("step", 2**53), ("token", 10**400), ("bytes", 0.5), ("key", "a\nb"), ("key", "x" * 1001)],
)
@given(ref=REFS[CheckpointRef])
def test_a_ref_refuses_a_value_out_of_its_bounds(field: str, wrong: Any, ref: BaseModel) -> None:
    with pytest.raises(ValidationError, match=field):
        type(ref).model_validate({**ref.model_dump(), field: wrong})
