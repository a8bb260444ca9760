from __future__ import annotations

import pytest

from offsite_fl.errors import ConfigError
from offsite_fl.registry import Registry, near


def test_near_puts_close_names_first_and_lists_all() -> None:
    assert near("quantise", ["quantize", "layer-drop"]) == "did you mean 'quantize'? Known: layer-drop, quantize"
    assert near("xyz", ["quantize", "layer-drop"]) == "Known: layer-drop, quantize"
    assert near("xyz", []) == "Known: none"


def test_register_returns_the_thing_and_files_it() -> None:
    tools: Registry[type] = Registry("tool")

    @tools.register("saw")
    class Saw:
        pass

    assert tools["saw"] is Saw
    assert "saw" in tools and "plane" not in tools


def test_iteration_is_sorted_whatever_the_order_of_registration() -> None:
    letters: Registry[int] = Registry("letter")
    for name in "cab":
        letters.register(name)(ord(name))
    assert list(letters) == ["a", "b", "c"]


def test_a_taken_name_raises_and_leaves_the_first() -> None:
    tools: Registry[int] = Registry("tool")
    tools.register("saw")(1)
    with pytest.raises(ConfigError, match="tool 'saw' is registered twice"):
        tools.register("saw")(2)
    assert tools["saw"] == 1


def test_an_unknown_name_raises_with_the_near_ones() -> None:
    tools: Registry[int] = Registry("tool")
    tools.register("hammer")(1)
    with pytest.raises(ConfigError, match=r"unknown tool 'hamer'; did you mean 'hammer'\? Known: hammer"):
        tools["hamer"]
