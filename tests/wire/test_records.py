"""Records from another party: what they claim is held against what they are."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from offsite_fl.errors import WireError
from offsite_fl.wire.records import count_bytes, flag, numpy_array, only_arrays, only_config, only_metrics, text, texts


def test_the_only_record_of_a_kind() -> None:
    content = RecordDict({"a": ArrayRecord(), "m": MetricRecord({"x": 1}), "c": ConfigRecord({"k": 1})})
    assert only_arrays(content)[0] == "a" and only_metrics(content)[1]["x"] == 1 and only_config(content)[0] == "c"
    content["b"] = ArrayRecord()
    with pytest.raises(WireError, match="exactly one ArrayRecord, found 2"):
        only_arrays(content)
    with pytest.raises(WireError, match="exactly one MetricRecord, found 0"):
        only_metrics(RecordDict())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_values_come_back(shape: tuple[int, ...], order: str) -> None:
    values = np.asarray(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape), order=order)
    assert np.array_equal(numpy_array(Array(values), "t", "float32", shape), values)


def forged(shape: tuple[int, ...], dtype: str, inside: np.ndarray) -> Array:
    """An array whose record says one thing and whose bytes another."""
    return Array(dtype, shape, "numpy.ndarray", Array(inside).data)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (forged((2,), "float32", np.zeros((1, 2), np.float32)), "the header says float32"),
        (forged((2,), "float32", np.zeros(2, np.int32)), "the header says int32"),
        (forged((2,), "float32", np.zeros(2, ">f4")), "the header says >f4"),
        (forged((2,), "float32", np.zeros(200_000, np.float32)), "has 800128 bytes, 8 and a header"),
        (Array("float32", (2,), "numpy.ndarray", b"x" * 136), "damaged bytes"),
        (Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + b"(" * 128), "damaged bytes"),
        (Array("float32", (2,), "numpy.ndarray", b""), "has 0 bytes"),
        (Array("float32", (2,), "pickle", b"x" * 136), "serialisation 'pickle'"),
    ],
)
def test_forged_arrays_are_refused(array: Array, message: str) -> None:
    with pytest.raises(WireError, match=message):
        numpy_array(array, "t", "float32", (2,))


def test_a_header_that_claims_terabytes_takes_no_memory() -> None:
    data = Array(np.zeros(2, np.float32)).data.replace(b"(2,)", b"(2000000000000,)")
    with pytest.raises(WireError, match=r"the header says|damaged"):
        numpy_array(Array("float32", (2,), "numpy.ndarray", data), "t", "float32", (2,))


def test_texts_are_made_fit_for_a_log() -> None:
    assert text("a\nb\x1b[31m\tc", "reason") == "a b [31m c"
    assert len(text("x" * 10_000, "reason")) == 2000
    with pytest.raises(WireError, match="reason must be text, got 5"):
        text(5, "reason")
    assert texts(["a", "b"], "files") == ["a", "b"]
    with pytest.raises(WireError):
        texts("ab", "files")
    with pytest.raises(WireError):
        flag(1, "held")


def test_bytes_are_counted_for_what_flower_can_t_count() -> None:
    config = ConfigRecord({"empty": "", "list": [], "n": 1, "yes": True, "name": "ab"})
    with pytest.raises((ValueError, IndexError)):
        config.count_bytes()
    counted = count_bytes(RecordDict({"c": config, "m": MetricRecord({"x": 1.0}), "a": ArrayRecord([np.zeros(2)])}))
    # keys 5+4+1+3+4, values 0+0+8+1+2; key 1 + 8; key "0" + header 128 + 16
    assert counted == {"config": 28, "metrics": 9, "arrays": 145}


def test_looking_into_a_message_keeps_nothing_of_it_alive() -> None:
    """Flower's own views of a content refer to themselves, so they'd hold its arrays until Python looks for cycles."""
    content = RecordDict(
        {"arrays": ArrayRecord({"a": Array(np.zeros(3))}), "m": MetricRecord({"x": 1}), "c": ConfigRecord({"y": 2})}
    )
    array = weakref.ref(content["arrays"]["a"])
    gc.disable()
    try:
        only_arrays(content), only_metrics(content), only_config(content)
        count_bytes(content)
        del content
        assert array() is None
    finally:
        gc.enable()
