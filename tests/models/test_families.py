"""Every family of model x what offsite-tuning does with one: find, split, bundle, tune, plug in, compress."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from PIL import Image as Pillow
from torch import nn

from offsite_fl.bundle import Bundle
from offsite_fl.config import TuneConfig
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import Context, Emulator, describe_emulators, parse_emulator, start
from offsite_fl.emulators.applies import why_not
from offsite_fl.emulators.report import planned_network
from offsite_fl.errors import ModelError, OffsiteError, UpdateError
from offsite_fl.models.blocks import block_list, find_blocks
from offsite_fl.models.network import adapter_parameters, plan_network
from offsite_fl.models.split import Split
from offsite_fl.models.tasks import CLASSIFICATION, NEXT_TOKEN, build_model, task_of
from offsite_fl.owner import ModelOwner
from offsite_fl.update import Update
from tests.conftest import make_tokenizer

from .families import DEPTH, FAMILIES, Batch, batch_for, build, handing_on, output_of, processor_of

NAMES = sorted(FAMILIES)
ENDS, MIDDLE = (0, 5), (1, 2, 3, 4)


@dataclass(frozen=True)
class Parties:
    """An owner, the bundle with 1 + 2 + 1 blocks that it made, and a data owner who opened it."""

    owner: ModelOwner
    bundle: Bundle
    data_owner: DataOwner


@cache
def model_of(name: str) -> nn.Module:
    """The family's pico model; shared, so whoever changes it puts it back."""
    return build(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parties]:
    """Parties by family, each made when a test first asks."""
    home = tmp_path_factory.mktemp("families")

    class Made(dict[str, Parties]):
        def __missing__(self, name: str) -> Parties:
            owner = ModelOwner(model_of(name), processor_of(FAMILIES[name]), Split(first=1, last=1))
            bundle = owner.make_bundle("layer-drop:keep=2", home / name)
            self[name] = Parties(owner, bundle, DataOwner.open(bundle, device="cpu"))
            return self[name]

    return Made()


def context_of(name: str) -> Context:
    """Two batches of calibration data, with labels where the model predicts tokens or classes."""
    batches = []
    for seed in (1, 2):
        batch = batch_for(name, rows=4, seed=seed)
        if FAMILIES[name].task in NEXT_TOKEN:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if FAMILIES[name].task in CLASSIFICATION:
            batch["labels"] = torch.tensor([0, 1, 1, 0])
        batches.append(batch)
    model = model_of(name)
    return Context(model, find_blocks(model), ENDS, MIDDLE, tuple(batches), tuple(batches))


def test_the_documentation_names_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("| family | blocks | peculiar |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    said = ",".join(cells).replace("LLaMA 2 and 3", "LLaMA 2, LLaMA 3").lower().split(",")
    assert {re.sub(r"[^a-z0-9]", "", name) for name in said} == {re.sub(r"[^a-z0-9]", "", name) for name in FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_task_are_found(name: str) -> None:
    row, model = FAMILIES[name], model_of(name)
    blocks = find_blocks(model)
    assert (blocks.path, blocks.depth, task_of(model)) == (row.path, DEPTH, row.task)
    with torch.device("meta"):
        assert find_blocks(build_model(row.task, copy.deepcopy(model.config))) == blocks  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_split_and_join_change_nothing(name: str) -> None:
    context, batch = context_of(name), batch_for(name)
    network, _ = planned_network(start(context), context)
    assert type(network) is type(context.model) and network is not context.model
    with torch.no_grad():
        expected = output_of(context.model, batch)
        torch.testing.assert_close(output_of(network, batch), expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.01  # else equality would prove little


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_computes_what_the_owner_sees(name: str, made: dict[str, Parties]) -> None:
    batch, parties = batch_for(name), made[name]
    with torch.no_grad(), handing_on(parties.owner.model, (2, 3)):  # layer-drop keeps the first and last of the middle
        expected = output_of(parties.owner.model, batch)
    with torch.no_grad():
        full, got = output_of(parties.owner.model, batch), output_of(parties.data_owner.model, batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(full, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_trains_the_adapter_alone_and_plugs_in(name: str, made: dict[str, Parties]) -> None:
    check_step(made[name].owner, made[name].data_owner, batch_for(name))


def check_step(owner: ModelOwner, data_owner: DataOwner, batch: Batch) -> None:
    """The gradient reaches the first block and nothing frozen; a step changes the adapter alone, which plugs in."""
    network = data_owner.model
    before = {n: t.clone() for n, t in network.state_dict().items()}
    adapter = adapter_parameters(network, data_owner.plan)
    output_of(network, batch).float().square().mean().backward()
    assert {id(p) for p in network.parameters() if p.grad is not None} <= {id(p) for p in adapter.values()}
    for slot in (0, 1):  # the gradient reaches the first block through the whole emulator
        assert sum(float(p.grad.abs().sum()) for n, p in adapter.items() if f".{slot}." in n and p.grad is not None) > 0
    torch.optim.SGD(adapter.values(), lr=0.1).step()
    network.zero_grad(set_to_none=True)
    check_adapter_alone(data_owner, before)
    tuned = data_owner.adapter()
    data_owner.reset()
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    check_plug_in(owner, data_owner, tuned)


def check_adapter_alone(data_owner: DataOwner, before: dict[str, torch.Tensor]) -> None:
    """Something changed in the data owner's network, and nothing outside the adapter."""
    plan = data_owner.plan
    inside = tuple(f"{plan.blocks_path}.{place}." for place in plan.adapter_places().values()) + plan.head
    changed = {n for n, t in data_owner.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(n.startswith(inside) for n in changed)


def check_plug_in(owner: ModelOwner, data_owner: DataOwner, tuned: dict[str, torch.Tensor]) -> None:
    """Exactly the adapter's tensors change, or none and an error; the model is put back."""
    before = {n: t.clone() for n, t in owner.model.state_dict().items()}
    inside = (*(f"{owner.blocks.path}.{index}." for index in ENDS), *owner.head)

    def changed() -> set[str]:
        return {n for n, t in owner.model.state_dict().items() if not torch.equal(t, before[n])}

    missing = dict(list(tuned.items())[1:])
    for spoiled in (missing, tuned | {"adapter.7.x": torch.zeros(1)}, {n: t * torch.nan for n, t in tuned.items()}):
        with pytest.raises(UpdateError):
            owner.plug_in(Update(spoiled, data_owner.bundle.digest, 1))
    assert not changed()
    original = owner.adapter()
    owner.plug_in(Update(tuned, data_owner.bundle.digest, 1))
    assert changed() and all(n.startswith(inside) for n in changed())
    assert all(torch.equal(owner.adapter()[n], t) for n, t in tuned.items())
    owner.plug_in(Update(original, data_owner.bundle.digest, 1))
    assert not changed()


@pytest.mark.parametrize("name", NAMES)
def test_tuning_by_the_data_owner(name: str, made: dict[str, Parties]) -> None:
    data_owner, before = made[name].data_owner, made[name].data_owner.adapter()
    data = Dataset.from_dict({"text": ["the cat sat on the mat. " * 3, "the dog lay there. " * 4], "label": [0, 1]})
    if FAMILIES[name].task == "image-classification":
        pictures = [Pillow.new("RGB", (20, 20), color) for color in ("red", "blue")]
        data = Dataset.from_dict({"image": pictures, "label": [0, 1]})
    config = TuneConfig(max_steps=1, block_size=16, batch_size=2, device="cpu")
    if FAMILIES[name].task not in (*NEXT_TOKEN, *CLASSIFICATION):
        with pytest.raises(ModelError, match="has no next-token loss"):
            data_owner.tune(data, config)
        assert all(torch.equal(data_owner.adapter()[n], t) for n, t in before.items())
        return
    network = {n: t.clone() for n, t in data_owner.model.state_dict().items()}
    update = data_owner.tune(data, config)
    check_adapter_alone(data_owner, network)
    assert update.tensors.keys() == before.keys()
    assert any(not torch.equal(update.tensors[n], t) for n, t in before.items())
    data_owner.reset()


@dataclass(frozen=True)
class Ready:
    """A method whose emulator is made already, so that a bundle needs no calibration data of the family's own kind."""

    emulator: Emulator

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        return self.emulator


def check_emulator(name: str, spec: str, folder: Path) -> None:
    """The emulator goes the whole way, or it refuses in the words that were told before it was built.

    The whole way: a bundle with it computes what the owner sees, the gradient reaches the first block through it, a
    step changes the adapter alone, and plug-in takes that or nothing.
    """
    context, method, batch = context_of(name), spec.split(":")[0], batch_for(name)
    before = [p.clone() for p in context.model.parameters()]
    reason = why_not(method, context.model, context.blocks)
    if reason:
        words = r"has no next-token loss|no block has an MLP channel or an attention head"
        with pytest.raises(OffsiteError, match=words):
            parse_emulator(spec).compress(start(context), context)
    else:
        emulator = parse_emulator(spec).compress(start(context), context)
        network, _ = planned_network(emulator, context)
        owner = ModelOwner(context.model, processor_of(FAMILIES[name]), Split(first=1, last=1))
        bundle = owner.make_bundle(Ready(emulator), folder / "bundle")  # type: ignore[arg-type]
        data_owner = DataOwner.open(bundle, device="cpu")
        with torch.no_grad():
            expected, got = output_of(network, batch), output_of(data_owner.model, batch)
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        check_step(owner, data_owner, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, context.model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_linears_can_be_factored_and_packed(name: str, tmp_path: Path) -> None:
    check_emulator(name, "low-rank:keep=0.5,mode=plain+quantize:bits=8,group=8", tmp_path)


@pytest.mark.parametrize("name", ["bert", "mamba", "mixtral", "t5", "vit"])
@pytest.mark.parametrize("spec", ["prune:keep=0.5", "crash:keep=2", "gradot:keep=0.6"])
def test_emulators_of_peculiar_families(name: str, spec: str, tmp_path: Path) -> None:
    check_emulator(name, spec, tmp_path)


SPECS = {
    "align": "align",
    "distill": "distill:steps=2",
    "gradient-match": "gradient-match:keep=2",
    "gradot": "gradot:keep=0.6",
    "loss-margin": "loss-margin:steps=2",
    "low-rank": "low-rank:keep=0.5",
    "prune": "prune:keep=0.5",
    "quantize": "quantize:bits=4,group=8",
    "scaleot": "scaleot:steps=2",
    "smooth": "smooth:keep=0.5",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [method.name for method in describe_emulators()])
def test_every_emulator_of_every_family(method: str, name: str, tmp_path: Path) -> None:
    check_emulator(name, SPECS.get(method, f"{method}:keep=2"), tmp_path)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "cohere", "t5", "bart", "llava"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(name: str, tied: bool) -> None:
    model: Any = build(name, tie_word_embeddings=True)
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    if not tied:  # what loading a checkpoint with a head of its own makes, whatever its config says (Flan-T5)
        head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3)))
    owner = ModelOwner(model, make_tokenizer(), Split(first=1, last=1))
    context = owner.context()
    network: Any
    network, _ = planned_network(start(context), context)
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) is tied
    with torch.no_grad():
        torch.testing.assert_close(output_of(network, batch_for(name)), output_of(model, batch_for(name)))


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_a_head_that_is_registered_before_its_embedding(kind: str) -> None:
    # RoBERTa's masked-LM head follows its body, XLM-RoBERTa's comes first: the tied tensor has another first name
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **(FAMILIES["roberta"].config | {"vocab_size": 64}))
    model: Any = build_model("masked-lm", config).eval()
    context = ModelOwner(model, make_tokenizer(), Split(first=1, last=1)).context()
    network, _ = planned_network(start(context), context)
    with torch.no_grad():
        torch.testing.assert_close(output_of(network, batch_for("roberta")), output_of(model, batch_for("roberta")))


@pytest.mark.parametrize(("name", "there"), [("t5", "relative_attention_bias"), ("modernbert", "attn_norm")])
def test_a_first_block_unlike_the_others_stays_first(name: str, there: str) -> None:
    model = model_of(name)
    blocks, stack = find_blocks(model), block_list(model, find_blocks(model))
    with pytest.raises(ModelError, match=rf"block 1 of the 6 .*as block 0 .*{there}.*first=1"):
        plan_network(model, blocks, (4, 5), {1: 0}, [stack[1]], (1,))
    plan_network(model, blocks, (4, 5), {0: 0, 3: 1}, [stack[0], stack[3]], (0, 3))


class Linear8bitLt(nn.Linear):
    """Named like bitsandbytes' layer, which isn't installed."""


def test_models_loaded_in_8_bits_are_refused() -> None:
    packed = build("llama2")
    first = block_list(packed, find_blocks(packed))[2]
    first.self_attn.o_proj = Linear8bitLt(32, 32, bias=False)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"block 2 .*o_proj is Linear8bitLt here and Linear there.*Load the model"):
        ModelOwner(packed, make_tokenizer(), Split(first=1, last=1))
    told: Any = build("llama2")
    told.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ModelError, match=r"loaded quantized.*load it in float32"):
        ModelOwner(told, make_tokenizer(), Split(first=1, last=1))


def test_images_reach_the_language_tower_through_the_emulator(made: dict[str, Parties]) -> None:
    # LLaVA with an image: 16 placeholders of the image token among the text, as its processor writes them
    parties, generator = made["llava"], torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((1, 16), 5), torch.randint(6, 64, (1, 6), generator=generator)], dim=1)
    batch: Batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=generator),
    }
    with torch.no_grad(), handing_on(parties.owner.model, (2, 3)):
        expected = output_of(parties.owner.model, batch)
    with torch.no_grad():
        torch.testing.assert_close(output_of(parties.data_owner.model, batch), expected, rtol=1e-5, atol=1e-5)
        other = output_of(parties.data_owner.model, batch | {"pixel_values": batch["pixel_values"] + 1})
    assert not torch.allclose(other, expected, atol=1e-3)


def test_saved_models_are_opened_by_their_own_task(tmp_path: Path) -> None:
    model: Any = build("bert")
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    owner = ModelOwner.from_pretrained(tmp_path, Split(first=1, last=1), device="cpu")
    assert (owner.task, type(owner.model)) == ("sequence-classification", type(model))
    assert torch.equal(output_of(owner.model, batch_for("bert")), output_of(model, batch_for("bert")))
