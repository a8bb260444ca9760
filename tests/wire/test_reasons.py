"""Paths are taken out of what a site tells the server, and nothing else is."""

from __future__ import annotations

import pytest

from offsite_fl.wire.reasons import FOLDER, without_folders


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("bundle /srv/clinic/x: a shard is short", f"bundle {FOLDER}: a shard is short"),
        ("[Errno 2] No such file: '/home/J Doe/x.csv'", f"[Errno 2] No such file: {FOLDER}"),
        ("no rename: '/a/b' -> '/c/d'", f"no rename: {FOLDER} -> {FOLDER}"),
        ("see ~/data/x, please", f"see {FOLDER}, please"),
        ("at (/tmp/a/b).", f"at ({FOLDER})."),
        (r"at C:\Users\doe\x.txt, line 3", f"at {FOLDER}, line 3"),
        (r"on \\server\share\x", f"on {FOLDER}"),
    ],
)
def test_paths_are_hidden(text: str, left: str) -> None:
    assert without_folders(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "expected q_proj/v_proj, got 1 / 2",
        "file shards/adapter-0.safetensors is missing",
        "'../../etc' isn't a digest",
        "see https://example.org/x",
        "norm is 1e+06, the bound is 50",
    ],
)
def test_everything_else_stays(text: str) -> None:
    assert without_folders(text) == text


def test_known_paths_may_have_blanks() -> None:
    text = "bundle /srv/J Doe/cache/incoming/1: short; /srv/J Doe/cache is full"
    found = without_folders(text, ["/srv/J Doe", "/srv/J Doe/cache", ""])
    assert found == f"bundle {FOLDER}: short; {FOLDER} is full"
