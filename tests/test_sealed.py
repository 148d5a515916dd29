import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax import sealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
CONTENTS = st.dictionaries(st.text().filter(lambda key: key != sealed.KEY), VALUES)


@given(CONTENTS)
def test_what_was_sealed_is_read_again_as_json_has_it(content):
    text = json.dumps(sealed.seal(content)).encode()
    assert json.dumps(sealed.parse(text)) == json.dumps(content)


def test_a_file_keeps_tuples_numbers_and_what_is_not_finite(tmp_path):
    sealed.write(tmp_path / "a.json", {"a": (1, 0.1), "b": math.nan}, indent=1)
    found = sealed.read(tmp_path / "a.json")
    assert found["a"] == [1, 0.1]
    assert math.isnan(found["b"])


def test_the_form_does_not_matter_the_content_does():
    content = sealed.seal({"loss": 2.5, "step": 3})
    turned = {key: content[key] for key in reversed(content)}
    assert sealed.unseal(turned) == {"loss": 2.5, "step": 3}
    with pytest.raises(ValueError, match="not that of its content"):
        sealed.unseal({**content, "loss": 2.6})


@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_changes_nothing(place, bit):
    text = bytearray(json.dumps(sealed.seal({"loss": 2.123456789, "name": "c4"})).encode())
    text[place % len(text)] ^= 1 << bit
    try:
        found = sealed.parse(bytes(text))
    except ValueError:
        return
    assert found == {"loss": 2.123456789, "name": "c4"}


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{}", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_sealed_content_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - each says it in its own words
        sealed.parse(text)
