"""JSON and timestamps as Go writes them."""

import json
import struct
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.simulator import gojson


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-05, "0.00001"),  # recorded: layer_norm_rms_epsilon
        (1.5e-06, "0.0000015"),
        (1e-07, "1e-7"),
        (-2.5e-09, "-2.5e-9"),
        (100000.0, "100000"),
        (1e16, "10000000000000000"),
        (1e21, "1e+21"),
        (0.0, "0"),
        (0.25, "0.25"),
    ],
)
def test_numbers_are_written_as_go_writes_them(value, text):
    assert gojson.encode(value).decode() == text
    assert float(text) == value


def test_markup_is_escaped_and_other_letters_are_not():
    """The recorded templates hold ``\\u003c|im_start|\\u003e``."""
    assert gojson.encode("<|é|> & \u2028").decode() == r'"\u003c|é|\u003e \u0026 \u2028"'


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text().filter(lambda text: text.isprintable()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_is_written_reads_back_as_the_same_values(value):
    assert json.loads(gojson.encode(value)) == value


def digits(value: float) -> int:
    return len(Decimal(repr(value)).normalize().as_tuple().digits)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@example(999999995904.0)  # 1e12 in single precision: longer written out, but one digit
def test_a_single_precision_number_keeps_its_value_in_the_fewest_digits(value):
    short = gojson.shortest_float32(value)
    assert struct.pack("<f", short) == struct.pack("<f", value)
    assert digits(short) <= digits(value)


def test_other_values_are_refused():
    with pytest.raises(TypeError, match="no JSON for object"):
        gojson.encode(object())
    with pytest.raises(ValueError, match="no JSON for inf"):
        gojson.encode(float("inf"))


@pytest.mark.parametrize(
    ("unix_ns", "text"),
    [
        (1795401674164454188, "2026-11-23T02:41:14.164454188Z"),  # recorded
        (1795401674050749880, "2026-11-23T02:41:14.05074988Z"),  # no trailing zeros
        (1795401674000000000, "2026-11-23T02:41:14Z"),
    ],
)
def test_timestamps_have_as_many_digits_as_they_need(unix_ns, text):
    assert gojson.timestamp(unix_ns) == text


@given(st.floats(-1, 1))
def test_a_double_is_rounded_to_single_precision_first(value):
    """Nine digits of the double itself may belong to the next single-precision number."""
    assert gojson.shortest_float32(value) == gojson.shortest_float32(struct.unpack("<f", struct.pack("<f", value))[0])
