"""Which tensors are the head, and that they are named, cut off, filled and plugged in by name."""

from __future__ import annotations

import pytest
import torch

from offsite_fl.errors import ModelError, UpdateError
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.head import HEAD, choose_head, is_head, read_head
from offsite_fl.models.network import (
    NetworkPlan,
    adapter_parameters,
    build_network,
    expected_tensors,
    fill_network,
    plan_network,
    shared_tensors,
)
from offsite_fl.models.plug import adapter_tensors, plug_in, swapped_in
from offsite_fl.models.tasks import task_of
from tests.conftest import make_pico
from tests.pico_classifiers import KINDS, make_classifier

HEADS = {
    "vit": ("classifier.weight", "classifier.bias"),
    "dinov2": ("classifier.weight", "classifier.bias"),
    "bert": ("classifier.weight", "classifier.bias"),
    "roberta": (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ),
    "distilbert": ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"),
    "llama": ("score.weight",),
}


def chosen(model, head="auto"):
    return choose_head(model, find_blocks(model).path, task_of(model) or "", head)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_head_is_what_lies_outside_the_base_model(kind):
    assert chosen(make_classifier(kind)) == HEADS[kind]


def test_no_head_for_other_tasks_or_where_none_is_wanted(pico_llama):
    assert chosen(pico_llama) == ()
    assert chosen(make_classifier("bert"), "none") == ()


def test_a_head_by_names_of_parameters_or_modules():
    bert = make_classifier("bert")
    pooler = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert chosen(bert, ["classifier", "bert.pooler"]) == (*pooler, "classifier.weight", "classifier.bias")
    assert chosen(bert, ["classifier.bias"]) == ("classifier.bias",)
    for wrong in ("clasifier", "bert.encoder.layer.0"):
        with pytest.raises(ModelError, match=f"{wrong}.*no parameter outside the blocks"):
            chosen(bert, [wrong])
    with pytest.raises(ModelError, match="did you mean"):
        chosen(bert, ["clasifier"])


def test_a_tied_tensor_is_no_head():
    model = make_pico("gpt2")  # its output layer is the embedding
    with pytest.raises(ModelError, match="tied to"):
        chosen(model, ["transformer.wte.weight"])


def test_a_classifier_without_classes_has_no_head():
    model = make_classifier("vit", num_labels=0, id2label={}, label2id={})
    with pytest.raises(ModelError, match="num_labels"):
        chosen(model)


def plan_of(model, head):
    blocks = find_blocks(model)
    stack = model.get_submodule(blocks.path)
    return blocks, plan_network(model, blocks, (0, 3), {1: 0}, [stack[1]], [1], head=head)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_network_of_a_plan_has_the_head_among_its_adapter(kind):
    model = make_classifier(kind)
    head = HEADS[kind]
    blocks, plan = plan_of(model, head)
    assert NetworkPlan.from_json(plan.to_json()) == plan and plan.to_json()["head"] == list(head)
    expected = expected_tensors(plan)
    assert {name for name in expected if is_head(name)} == {HEAD + path for path in head}
    assert not {"shared." + path for path in head} & expected.keys()
    stack = model.get_submodule(blocks.path)
    tensors = shared_tensors(model, blocks, head)
    for prefix, index in (("adapter.0.", 0), ("adapter.1.", 3), ("emulator.0.", 1)):
        tensors |= {prefix + name: t for name, t in stack[index].state_dict().items()}
    network = build_network(plan)
    fill_network(network, plan, {name: t.clone() for name, t in tensors.items()})
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert set(head) <= trained
    live = adapter_parameters(network, plan)
    assert list(live)[-len(head) :] == [HEAD + path for path in head]
    for path in head:
        assert torch.equal(network.get_parameter(path), model.get_parameter(path))


def test_a_plan_without_a_head_is_written_as_before(pico_llama):
    blocks = find_blocks(pico_llama)
    stack = pico_llama.get_submodule(blocks.path)
    plan = plan_network(pico_llama, blocks, (0, 5), {2: 0}, [stack[2]], [2])
    assert set(plan.to_json()) == {"task", "config", "blocks_path", "layout", "linears"}
    assert NetworkPlan.from_json(plan.to_json()).head == ()


@pytest.mark.parametrize("head", [[], ["a", "a"], "classifier", [1], ["x"] * 300, {"a": 1}, None])
def test_a_foreign_head_must_be_a_short_list_of_names(head):
    with pytest.raises(ModelError, match="head must be a list"):
        read_head(head)


@pytest.mark.parametrize(
    "path", ["bert.encoder.layer.0.output.dense.bias", "nothing.weight", "bert.embeddings.position_ids"]
)
def test_a_foreign_plan_names_parameters_outside_the_blocks_only(path):
    _, plan = plan_of(make_classifier("bert"), HEADS["bert"])
    foreign = NetworkPlan.from_json(plan.to_json() | {"head": [path]})
    with pytest.raises(ModelError, match="no parameter outside the blocks"):
        expected_tensors(foreign)


def test_plug_in_writes_head_and_blocks_or_nothing():
    model = make_classifier("vit")
    blocks, head = find_blocks(model), HEADS["vit"]
    live = adapter_tensors(model, blocks, (0, 3), head)
    new = {name: p.detach() + 1 for name, p in live.items()}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(UpdateError, match=r"missing: adapter\.head\.classifier\.weight"):
        plug_in(model, blocks, (0, 3), {n: t for n, t in new.items() if not is_head(n)}, head)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with swapped_in(model, blocks, (0, 3), new, head):
        changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {"classifier.weight", "classifier.bias"} <= changed
    assert {name.rpartition(".")[0].split(".")[2] for name in changed - set(head)} == {"0", "3"}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
