"""What goes back and what it stands for: whole states, one of two factors, fresh factors."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord

from offsite_fl.config import TuneConfig
from offsite_fl.errors import WireError
from offsite_fl.wire.codecs import encode
from offsite_fl.wire.replies import FreshFactors, beginning, for_reply, read_reply, references

A, B, W = "adapter.0.q.lora_A.weight", "adapter.0.q.lora_B.weight", "adapter.0.q.weight"
SENT = {A: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), B: torch.tensor([[5.0, 6.0]])}
TUNED = {A: torch.tensor([[10.0, 20.0]]), B: torch.tensor([[50.0]])}  # at rank 1 of 2
NOTES = ConfigRecord({"wire.codec": "fp32"})


def test_beginning() -> None:
    run, small = TuneConfig(lora_rank=2), TuneConfig(lora_rank=1)
    assert beginning(SENT, run, run) is SENT
    cut = beginning(SENT, small, run)
    assert cut[A].tolist() == [[1.0, 2.0]] and cut[B].tolist() == [[5.0]]
    full = {W: torch.ones(1, 2)}  # under fresh factors what came is an adapter, which has no components
    assert beginning(full, small, TuneConfig(lora_rank=2, lora_fresh=True)) is full
    assert beginning(full, TuneConfig(), TuneConfig()) is full


@pytest.mark.parametrize("whole", [False, True])
def test_full_adapters_go_back_in_the_order_of_the_message(whole: bool) -> None:
    received = {"adapter.1.b": torch.zeros(1), W: torch.zeros(1, 2)}
    tuned = {W: torch.ones(1, 2), "adapter.1.b": torch.ones(1)}
    reply = for_reply(tuned, received, TuneConfig(), whole=whole)
    assert list(reply) == list(received) and all(bool((t == 1).all()) for t in reply.values())


def test_factors_go_back_at_the_run_s_rank() -> None:
    both = for_reply(TUNED, SENT, TuneConfig(lora_rank=2), whole=False)
    assert both[A].tolist() == [[10.0, 20.0], [0.0, 0.0]] and both[B].tolist() == [[50.0, 0.0]]
    only = for_reply(TUNED, SENT, TuneConfig(lora_rank=2, lora_train="b"), whole=False)
    assert list(only) == [B] and only[B].tolist() == [[50.0, 0.0]]
    whole = for_reply(TUNED, SENT, TuneConfig(lora_rank=2, lora_train="b"), whole=True)
    assert list(whole) == [A, B] and torch.equal(whole[A], SENT[A])
    fresh = for_reply(TUNED, {W: torch.ones(1, 2)}, TuneConfig(lora_rank=2, lora_fresh=True), whole=False)
    assert torch.equal(fresh[A], both[A]) and torch.equal(fresh[B], both[B])


def test_references() -> None:
    found = references({W: torch.ones(1, 2), A: torch.ones(1, 2)}, {W: torch.tensor([[7.0, 8.0]])})
    assert found[W].tolist() == [[7.0, 8.0]] and found[A].tolist() == [[0.0, 0.0]]


def test_one_factor_is_read_with_the_other_as_it_was_sent() -> None:
    zeros = {name: torch.zeros_like(t) for name, t in SENT.items()}
    new = {B: torch.tensor([[-1.0, -2.0]])}
    lie = {A: torch.full((2, 2), float("nan")), **new}
    for reply in (new, lie):
        arrays = encode(reply, reply)[0]
        state = read_reply(arrays, NOTES, "fp32", zeros, SENT, "b")
        assert list(state) == [A, B] and torch.equal(state[A], SENT[A]) and torch.equal(state[B], new[B])
    with pytest.raises(WireError, match="1 missing tensor"):
        read_reply(encode({A: SENT[A]}, SENT)[0], NOTES, "fp32", zeros, SENT, "b")
    with pytest.raises(WireError, match="1 missing tensor"):
        read_reply(encode(new, new)[0], NOTES, "fp32", zeros, SENT, "both")


@pytest.mark.parametrize("flipped", [False, True])
def test_fresh_factors_are_read_as_the_adapter_they_stand_for(flipped: bool) -> None:
    factors = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[3.0], [4.0]])}
    sent = {W: torch.tensor([[10.0, 20.0], [30.0, 40.0]]), "adapter.0.n": torch.tensor([1.0])}
    form = FreshFactors({name: torch.zeros_like(t) for name, t in factors.items()}, {W: flipped}, scale=0.5)
    state = form.read(encode(factors, factors)[0], NOTES, "fp32", sent)
    # half of B A = [[3, 6], [4, 8]], or of its transpose
    change = [[1.5, 2.0], [3.0, 4.0]] if flipped else [[1.5, 3.0], [2.0, 4.0]]
    assert torch.equal(state[W], sent[W] + torch.tensor(change))
    assert torch.equal(state["adapter.0.n"], sent["adapter.0.n"])
    with pytest.raises(WireError, match="2 missing tensors"):
        form.read(encode(sent, sent)[0], NOTES, "fp32", sent)
