"""Round trips of every codec within its own error bound, and what decoding refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offsite_fl.errors import ConfigError, WireError
from offsite_fl.wire import names
from offsite_fl.wire.codecs import CODECS, decode, encode

ALL = ["fp32", "fp16", "bf16", "int8"]
# numpy's float16/bfloat16 constants: smallest normal 2**-14 and 2**-126, 10 and 7 bits of mantissa
HALF_LARGEST = 65504.0

values = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    elements=st.floats(-60000, 60000, width=32),
)


def travel(tensors: dict, reference: dict, codec: str) -> dict:
    """Encode, put through Flower's own serialisation of every array, decode."""
    arrays, config = encode(tensors, reference, codec)
    carried = ArrayRecord({k: Array(a.dtype, tuple(a.shape), a.stype, bytes(a.data)) for k, a in arrays.items()})
    return decode(carried, ConfigRecord.inflate(config.deflate()), reference, codec)


def bound(codec: str, x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    x64, slack = x.double(), 2.0**-23 * (x.double().abs() + reference.double().abs())
    if codec == "fp32":
        return torch.zeros_like(x64)
    if codec == "fp16":
        return torch.maximum(x64.abs() * 2.0**-11, torch.tensor(2.0**-25, dtype=torch.float64))
    if codec == "bf16":
        return torch.maximum(x64.abs() * 2.0**-8, torch.tensor(2.0**-134, dtype=torch.float64))
    scale = float((x64 - reference.double()).abs().max()) / 127 if x.numel() else 0.0
    return torch.full_like(x64, scale / 2 * (1 + 1e-9)) + slack


@pytest.mark.parametrize("codec", ALL)
@settings(max_examples=60, deadline=None)
@given(x=values, offset=st.floats(-100, 100, width=32))
def test_round_trip_stays_within_the_bound(codec: str, x: np.ndarray, offset: float) -> None:
    tensor = torch.from_numpy(np.asarray(x))
    reference = torch.full_like(tensor, offset)
    back = travel({"adapter.0.w": tensor}, {"adapter.0.w": reference}, codec)["adapter.0.w"]
    assert back.dtype == torch.float32 and back.shape == tensor.shape
    assert bool(((back.double() - tensor.double()).abs() <= bound(codec, tensor, reference)).all())


def test_int8_by_hand() -> None:
    # differences -2, 0.5, 254 - 2 = 252... scale 254 / 127 = 2, steps 127, -1, 0 (0.25 rounds to 0): 254, -2, 0
    reference = {"t": torch.tensor([10.0, 10.0, 10.0])}
    arrays, config = encode({"t": torch.tensor([264.0, 8.0, 10.5])}, reference, "int8")
    assert arrays["t"].numpy().tolist() == [127, -1, 0] and arrays["t"].dtype == "int8"
    assert config["wire.scale.t"] == 2.0
    assert decode(arrays, config, reference, "int8")["t"].tolist() == [264.0, 8.0, 10.0]


def test_bf16_is_bit_exact_for_every_finite_bf16_value() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    tensor = bits.view(torch.bfloat16)
    tensor = tensor[torch.isfinite(tensor)]
    back = travel({"t": tensor}, {"t": torch.zeros(tensor.shape)}, "bf16")["t"]
    assert torch.equal(back.to(torch.bfloat16).view(torch.int16), tensor.view(torch.int16))


def test_bf16_is_noted_by_name_because_flower_has_no_bfloat16() -> None:
    with pytest.raises(TypeError):  # the reason for the codec: this is what Flower does with bf16 itself
        ArrayRecord({"t": torch.zeros(2, dtype=torch.bfloat16)})
    arrays, config = encode({"t": torch.zeros(2)}, {"t": torch.zeros(2)}, "bf16")
    assert arrays["t"].dtype == "int16" and config["wire.dtype.t"] == "bfloat16"


def test_sizes_on_the_wire() -> None:
    tensors = {"t": torch.randn(100, 100)}
    sizes = {c: len(encode(tensors, {"t": torch.zeros(100, 100)}, c)[0]["t"].data) for c in ALL}
    assert {c: round(s / 10_000) for c, s in sizes.items()} == {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def test_every_registered_codec_is_in_this_matrix() -> None:
    assert sorted(CODECS) == sorted(ALL)
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        encode({}, {}, "int-8")


def test_order_and_names_are_the_reference_s() -> None:
    reference = {"b": torch.zeros(1), "a": torch.zeros(2)}
    arrays, config = encode({"a": torch.ones(2), "b": torch.ones(1)}, reference, "fp32")
    assert list(decode(arrays, config, reference, "fp32")) == ["b", "a"]


def test_fp16_overflow_names_the_tensor_and_the_way_out() -> None:
    with pytest.raises(WireError, match=r"'adapter.0.w'.*70000.*bf16 or fp32"):
        encode({"adapter.0.w": torch.tensor([70000.0])}, {"adapter.0.w": torch.zeros(1)}, "fp16")
    assert math.isfinite(HALF_LARGEST)
    encode({"t": torch.tensor([HALF_LARGEST])}, {"t": torch.zeros(1)}, "fp16")


@pytest.mark.parametrize(
    ("tensor", "codec", "message"),
    [
        (torch.zeros(3), "fp32", r"'t' has shape \(3,\), expected \(2,\)"),
        (torch.zeros(2, dtype=torch.int64), "fp32", "'t' has dtype 'int64', expected float32"),
        (torch.zeros(2, dtype=torch.float16), "fp32", "'t' has dtype 'float16', expected float32"),
        (torch.zeros(2), "int8", "'t' has dtype 'float32', expected int8"),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(tensor: torch.Tensor, codec: str, message: str) -> None:
    config = ConfigRecord({names.CODEC: codec})
    with pytest.raises(WireError, match=message):
        decode(ArrayRecord({"t": tensor}), config, {"t": torch.zeros(2)}, codec)


def test_missing_and_unknown_names_and_a_foreign_codec() -> None:
    arrays, config = encode({"t": torch.zeros(2)}, {"t": torch.zeros(2)}, "fp32")
    with pytest.raises(WireError, match="1 missing tensor: 'u'"):
        decode(arrays, config, {"t": torch.zeros(2), "u": torch.zeros(1)}, "fp32")
    with pytest.raises(WireError, match="1 unknown tensor: 't'"):
        decode(arrays, config, {}, "fp32")
    with pytest.raises(WireError, match="codec 'fp32', expected 'int8'"):
        decode(arrays, config, {"t": torch.zeros(2)}, "int8")


@pytest.mark.parametrize("scale", [None, -1.0, float("nan"), float("inf"), "1", 1])
def test_int8_scales_are_checked(scale: object) -> None:
    arrays, config = encode({"t": torch.ones(2)}, {"t": torch.zeros(2)}, "int8")
    del config["wire.scale.t"]
    if scale is not None:
        config["wire.scale.t"] = scale
    with pytest.raises(WireError, match="'t': its scale must be a finite number"):
        decode(arrays, config, {"t": torch.zeros(2)}, "int8")


def test_what_decoding_gives_can_be_written_to() -> None:
    for codec in ALL:
        back = travel({"t": torch.ones(3)}, {"t": torch.zeros(3)}, codec)["t"]
        back += 1  # a read-only view of the message's bytes would be silently shared
        assert torch.allclose(back, torch.full((3,), 2.0), atol=0.01)


def test_a_record_dict_takes_both_records() -> None:
    arrays, config = encode({"t": torch.ones(3)}, {"t": torch.zeros(3)}, "int8")
    assert set(RecordDict({names.ARRAYS: arrays, names.CONFIG: config})) == {"arrays", "config"}
