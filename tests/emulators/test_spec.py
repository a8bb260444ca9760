"""The grammar of emulator specs: what is read, what is written back, and what the errors say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import pytest

from offsite_fl.emulators import base
from offsite_fl.emulators.base import METHODS, Chain, Context, Emulator, EmulatorMethod, register
from offsite_fl.emulators.layer_drop import LayerDrop
from offsite_fl.emulators.low_rank import LowRank
from offsite_fl.emulators.spec import describe_emulators, parse_emulator
from offsite_fl.errors import ConfigError
from offsite_fl.registry import Registry


@dataclass(frozen=True)
class Example(EmulatorMethod):
    """An example.

    More about it.
    """

    needed: int
    rate: float = 1e-4
    kind: Literal["a", "b"] = "a"
    parts: tuple[str, ...] = ()
    limit: int | None = 5
    fast: bool = False
    share: float | None = field(default=None, metadata={"none": "whatever fits"})

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        return emulator


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Example]]:
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    yield register("example")(Example)


def test_options_have_the_types_of_the_fields(example: type[Example]) -> None:
    method = parse_emulator("example:needed=3,rate=1e-3,kind=b,parts=q_proj/v_proj,limit=,fast=true")
    assert method == Example(3, 1e-3, "b", ("q_proj", "v_proj"), None, True)


@pytest.mark.parametrize(
    "method",
    [
        Example(1),
        Example(2, 1e20, "b", ("x", "y"), None, True),
        Example(3, rate=0.1 + 0.2),
        Example(4) + LayerDrop(keep=8) + LowRank(keep=0.25, mode="plain"),
    ],
)
def test_text_and_back(example: type[Example], method: EmulatorMethod) -> None:
    assert parse_emulator(str(method)) == method


def test_text_is_short() -> None:
    assert str(LayerDrop(keep=8)) == "layer-drop:keep=8"
    assert str(LowRank()) == "low-rank"
    assert str(parse_emulator(" layer-drop : keep = 8 + low-rank : keep=0.4 ")) == "layer-drop:keep=8+low-rank:keep=0.4"


def test_chains_are_flat() -> None:
    chain = Chain((LayerDrop(keep=2), Chain((LowRank(), LowRank(keep=0.25)))))
    assert chain.methods == (LayerDrop(keep=2), LowRank(), LowRank(keep=0.25))
    assert parse_emulator(chain) is chain


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layerdrop:keep=8", "unknown emulator 'layerdrop'; did you mean 'layer-drop'"),
        ("layer-drop:kep=8", "unknown setting 'layer-drop:kep'; did you mean 'keep'"),
        ("low-rank:mode=sequental", "did you mean 'sequential'"),
        ("low-rank:keep=half", "low-rank:keep = 'half' must be of type float"),
        ("low-rank:keep=1.5", "must be a share above 0 and at most 1"),
        ("low-rank:ridge=0", "ridge = 0.0 must be above 0"),
        ("low-rank:keep=0.5,bytes=many", "size 'many' can't be read"),
        ("layer-drop:8", "'8' in emulator spec 'layer-drop:8' isn't an option; write key=value"),
        ("layer-drop:keep=8,keep=9", "'keep' is given twice"),
        ("layer-drop:keep=8+", "empty part"),
        ("", "empty part"),
    ],
)
def test_what_is_wrong_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_emulator(spec)
    assert message in str(caught.value)


def test_descriptions_for_the_command_line(example: type[Example]) -> None:
    found = {method.name: method for method in describe_emulators()}
    assert {"layer-drop", "low-rank"} <= found.keys()
    assert found["example"].summary == "An example."
    assert [(o.key, o.type, o.default) for o in found["example"].options] == [
        ("needed", "int", None),
        ("rate", "float", "0.0001"),
        ("kind", "a|b", "a"),
        ("parts", "list of str", ""),
        ("limit", "int or none", "5"),
        ("fast", "bool", "false"),
        ("share", "float or none: whatever fits", ""),
    ]


def test_every_method_says_what_it_does() -> None:
    assert all(method.summary.endswith(".") for method in describe_emulators())


def test_only_frozen_dataclasses_register() -> None:
    @dataclass
    class Loose(EmulatorMethod):
        """Not frozen."""

        def compress(self, emulator: Emulator, context: Context) -> Emulator:
            return emulator

    with pytest.raises(ConfigError, match="must be a frozen dataclass"):
        register("loose")(Loose)
    assert "loose" not in METHODS


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "METHODS", Registry("emulator"))
    register("example")(Example)
    with pytest.raises(ConfigError, match="registered twice"):
        register("example")(Example)
