"""Properties that hold for whatever a user can write: settings, names, times, shapes and contents of files.

Hypothesis draws the same 50 examples every time.
"""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rnode_plugin import get_recipe
from rnode_plugin.errors import ConfigError, DataError
from rnode_plugin.experiments.data.folders import assign
from rnode_plugin.experiments.files import check_path_name
from rnode_plugin.experiments.recipes.recipe import Recipe, as_text
from rnode_plugin.experiments.text import duration, significant

RECIPE = get_recipe("digits")
PATHS = [path for path, _ in RECIPE.settings()]

settings.register_profile(
    "ours", max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ours")

NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(min_value=10**300, max_value=10**320)).map(str)
TEXTS = st.one_of(
    st.text(max_size=12), NUMBERS, st.sampled_from(["none", "auto", "true", "1,2,3", "rk4", "dopri5"])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["data", "solver", "method"])), inner, max_size=3
        ),
    ),
    max_leaves=8,
)


@given(path=st.one_of(st.sampled_from(PATHS), st.text(max_size=10)), text=TEXTS)
def test_a_setting_is_taken_and_written_or_refused(path: str, text: str) -> None:
    try:
        changed = RECIPE.override([f"{path}={text}"])
    except ConfigError:
        return
    assert Recipe.from_plain(changed.to_plain()) == changed
    value = dict(changed.settings())[path.strip()]
    assert dict(RECIPE.override([f"{path}={as_text(value)}"]).settings())[path.strip()] == value


@given(
    group=st.sampled_from(["data", "model", "solver", "optimizer", "training", "regularizers", "name"]), value=JSON
)
@example("optimizer", {"lr": 10**400})
@example("regularizers", {"kinetic": -(10**400)})
def test_any_plain_data_is_a_recipe_or_refused(group: str, value: object) -> None:
    plain = RECIPE.to_plain()
    plain[group] = (
        {**plain[group], **value} if isinstance(plain[group], dict) and isinstance(value, dict) else value
    )
    try:
        recipe = Recipe.from_plain(plain)
    except ConfigError:
        pass
    else:
        assert Recipe.from_plain(recipe.to_plain()) == recipe


def test_data_that_is_nested_deep_is_refused() -> None:
    nested: dict = {}
    for _ in range(3000):
        nested = {"a": nested}
    for group, value in (("data", nested), ("regularizers", {"kinetic": nested}), ("name", nested)):
        with pytest.raises(ConfigError):
            Recipe.from_plain({**RECIPE.to_plain(), group: value})


@given(name=st.one_of(st.text(max_size=120), st.text(string.ascii_letters + "./\\-_ ~:", max_size=20)))
def test_a_name_that_passes_is_one_folder_below(name: str) -> None:
    try:
        check_path_name(name, "recipe")
    except ConfigError:
        return
    below = Path("/runs") / name
    assert below.parent == Path("/runs")
    assert below.resolve().parent == Path("/runs").resolve()
    assert not name.startswith((".", "-", "~"))


@given(value=st.floats(allow_nan=False, allow_infinity=False), digits=st.integers(1, 6))
def test_numbers_as_text_are_near_the_number(value: float, digits: int) -> None:
    text = significant(value, digits)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=10.0**-digits * 5.01, abs=0)


@given(seconds=st.floats(0, 1e9))
def test_times_as_text_have_no_sixty(seconds: float) -> None:
    assert not any(part in duration(seconds) for part in ("60.0 s", " 60 s", " 60 min"))


@given(
    st.lists(
        st.text("abtrainvl/._", min_size=1, max_size=20).filter(lambda n: n.strip("/.")), max_size=20, unique=True
    )
)
def test_every_picture_is_in_one_part(names: list[str]) -> None:
    try:
        parts = assign(names, where="here")
    except DataError:
        return
    assert len(parts) == len(names)
    assert {"train", "val"} <= set(parts) <= {"train", "val", None}
    assert parts == assign(names, where="here")
