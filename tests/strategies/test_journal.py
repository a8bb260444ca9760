"""Names of nodes: one node a name, for what sites keep between rounds goes by it."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.strategies.journal import Journal


def journal(*names: tuple[int, str]) -> Journal:
    found = Journal()
    for node, name in names:
        found.learn(node, RecordDict({"config": ConfigRecord({"client": name})}))
    return found


def test_the_second_of_a_name_is_refused_while_the_first_is_there() -> None:
    found = journal((1, "a"), (2, "a"), (3, "b"))
    refused = found.namesakes([1, 2, 3, 4], {1, 2, 3, 4})
    assert refused.keys() == {2} and "another site is called a too" in refused[2]
    assert (found.nodes[1], found.nodes[2], found.nodes[3]) == ("a", "a (node 2)", "b")


def test_a_site_that_was_started_anew_takes_its_name_over() -> None:
    found = journal((1, "a"), (2, "a"))
    found.ledger.add(1, "metrics", "up", "a (node 2)", 5)
    found.rounds.append(RoundRecord(3, clients={"a": {"num-examples": 1}}))
    assert not found.namesakes([2], {2})
    assert found.nodes[2] == "a" and found.last_used(2, "num-examples") == 3
    assert found.ledger.total(node="a") == 5
    # Should the first one come back, it is the second now.
    assert found.namesakes([1, 2], {1, 2}).keys() == {1} and found.last_used(1, "num-examples") == 0


def test_a_name_that_its_node_gave_up_goes_to_the_next_one() -> None:
    """A node may say another name in every reply; that must not end the run of the others."""
    found = journal((1, "a"), (2, "a"), (3, "a"), (1, "b"))
    assert found.namesakes([1, 2, 3], {1, 2, 3}).keys() == {3}
    assert [found.nodes[node] for node in (1, 2, 3)] == ["b", "a", "a (node 3)"]
