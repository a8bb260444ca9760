"""Divisions of rows: disjoint, complete, the same for the same seed, and of the kind that was asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.comparing.partitions import PARTITIONS, check_shares, parse_partition
from offsite_fl.errors import ConfigError

OWNERS = ("a", "b", "c", "d")
ROWS = Dataset.from_dict({"text": [str(i) for i in range(200)], "owner": [OWNERS[i // 50] for i in range(200)]})
SPECS = (
    "iid",
    "dirichlet:alpha=0.3",
    "pathological:classes=1",
    "pathological:classes=2",
    "natural",
    "size",
    "size:growth=square",
    "size:growth=exponential",
)


def owners(share: list[int]) -> Counter[str]:
    return Counter(OWNERS[i // 50] for i in share)


def test_every_kind_is_tried_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(PARTITIONS)


@pytest.mark.parametrize("spec", SPECS)
def test_every_row_is_with_exactly_one_client(spec: str) -> None:
    shares = parse_partition(spec).divide(ROWS, 4, seed=3)
    assert sorted(row for share in shares for row in share) == list(range(200))
    assert all(shares) and len(shares) == 4
    assert shares == parse_partition(spec).divide(ROWS, 4, seed=3)


@pytest.mark.parametrize("spec", ["iid", "dirichlet:alpha=0.3", "size"])
def test_another_seed_divides_otherwise(spec: str) -> None:
    partition = parse_partition(spec)
    assert [sorted(s) for s in partition.divide(ROWS, 4, 0)] != [sorted(s) for s in partition.divide(ROWS, 4, 1)]


def test_iid_is_equal_shares_of_every_domain() -> None:
    for share in parse_partition("iid").divide(ROWS, 4, seed=0):
        # 50 of 200 without replacement, 12.5 of each domain, standard deviation 2.7: five of them are out of reach.
        assert len(share) == 50 and all(abs(count - 12.5) < 13 for count in owners(share).values())
        assert len(owners(share)) == 4


def test_natural_and_one_class_each_are_one_domain_a_client() -> None:
    natural = parse_partition("natural").divide(ROWS, 4, seed=5)
    assert [owners(share) for share in natural] == [Counter({owner: 50}) for owner in OWNERS]
    one = parse_partition("pathological").divide(ROWS, 4, seed=5)
    assert sorted(tuple(owners(share)) for share in one) == [(owner,) for owner in OWNERS]


def test_two_classes_are_two_domains_a_client() -> None:
    assert all(len(owners(s)) == 2 for s in parse_partition("pathological:classes=2").divide(ROWS, 4, 0))


def test_a_small_alpha_is_more_skewed_than_a_large_one() -> None:
    def largest(alpha: float) -> float:
        shares = parse_partition(f"dirichlet:alpha={alpha},min-rows=1").divide(ROWS, 4, seed=0)
        return sum(max(owners(share).values()) / len(share) for share in shares) / 4

    assert largest(0.1) > largest(100.0) + 0.2


def test_linear_sizes_are_1_to_4_tenths() -> None:
    assert [len(share) for share in parse_partition("size").divide(ROWS, 4, 0)] == [20, 40, 60, 80]


def test_too_few_clients_for_the_classes() -> None:
    with pytest.raises(ConfigError, match="leave some of 4 to nobody"):
        parse_partition("pathological").divide(ROWS, 2, 0)


def test_rows_that_cannot_be_divided_so() -> None:
    with pytest.raises(ConfigError, match="can't be divided"):
        parse_partition("dirichlet:alpha=0.01,min-rows=60").divide(ROWS, 4, 0)


@pytest.mark.parametrize(
    ("shares", "said"),
    [([[0, 1], [1]], "row 1 is with two clients"), ([[0], []], "client 1 has no rows"), ([[0], [1]], "1 of 3 rows")],
)
def test_faulty_divisions_are_seen(shares: list[list[int]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_shares(shares, 3)


@pytest.mark.parametrize("spec", ["dirichlett", "iid:alpha=1", "dirichlet:alpha", "size:growth=cubic", ""])
def test_specs_that_are_wrong(spec: str) -> None:
    with pytest.raises(ConfigError):
        parse_partition(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("dirichlet:alpha=1,alpha=2", "'alpha' is given twice"),
        ("dirichlet:0.3", r"'0\.3' in partition spec 'dirichlet:0\.3' isn't an option"),
    ],
)
def test_wrong_specs_are_named(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_partition(spec)
