"""LoRA goes in, comes out, merges, and leaves no trace."""

import copy

import pytest
import torch

from offsite_fl.config import LoraOptions
from offsite_fl.errors import ConfigError, UpdateError
from offsite_fl.tuning.lora import (
    add_lora,
    added,
    check_rank,
    expected_factors,
    first_components,
    merge_lora,
    padded,
    target_weights,
    trained_names,
    unmoved,
)


def ends(model):
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return {0: blocks[0], 1: blocks[-1]}


def filled(lora, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in lora.tensors().items()}


def test_shapes_are_known_before_any_factor_is_made(pico, family):
    model = pico(family)
    lora = add_lora(ends(model), LoraOptions(rank=3))
    made = [(name, tuple(p.shape)) for name, p in lora.parameters().items()]
    lora.remove()
    assert list(expected_factors(ends(model), LoraOptions(rank=3)).items()) == made
    assert {shape[0] for name, shape in expected_factors(ends(model), LoraOptions(2**40)).items() if "_A" in name} == {
        2**40
    }


def test_a_rank_is_bounded_by_the_largest_linear():
    shapes = {
        "q.lora_A.weight": (4, 9),
        "q.lora_B.weight": (4, 4),
        "v.lora_A.weight": (4, 2),
        "v.lora_B.weight": (9, 4),
    }
    check_rank(shapes)
    with pytest.raises(ConfigError, match=r"lora-rank = 5 is more than .*: set it to 4 or less"):
        check_rank({name: (5, s[1]) if "_A" in name else (s[0], 5) for name, s in shapes.items()})


def test_in_load_merge_and_out_again(pico, family, pico_batch):
    model, options = pico(family), LoraOptions(rank=3, alpha=6.0)
    inputs = {name: pico_batch[name] for name in ("input_ids", "attention_mask")}
    before = {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    modules = {n: id(m) for n, m in model.named_modules()}
    plain = model(**inputs).logits
    lora = add_lora(ends(model), options, seed=1)
    assert torch.equal(model(**inputs).logits, plain)  # every B is zero
    factors = filled(lora)
    lora.load(factors)
    tuned = model(**inputs).logits
    assert not torch.equal(tuned, plain)
    lora.remove()
    assert {n: id(m) for n, m in model.named_modules()} == modules
    for name, parameter in model.named_parameters():
        identity, value, required = before[name]
        assert id(parameter) == identity and parameter.requires_grad == required and torch.equal(parameter, value)
    assert not any(hasattr(block, "peft_config") for block in ends(model).values())
    assert torch.equal(model(**inputs).logits, plain)

    merged = merge_lora(ends(model), factors, options)
    own = {f"adapter.{k}.{n}": p for k, block in ends(model).items() for n, p in block.named_parameters()}
    assert merged.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            assert torch.equal(parameter, before_by_slot(before, model, parameter))
            parameter.copy_(merged[name])
    torch.testing.assert_close(model(**inputs).logits, tuned, rtol=1e-4, atol=1e-4)


def before_by_slot(before, model, parameter):
    return next(value for identity, value, _ in before.values() if identity == id(parameter))


def test_merge_is_base_plus_scaled_product(pico_llama):
    options = LoraOptions(rank=2, alpha=8.0, targets=("q_proj",))
    name = "adapter.1.self_attn.q_proj"
    factors = filled(add_lora(ends(pico_llama), options))
    model = pico_llama.__class__(pico_llama.config)
    weights = {n: p.detach().clone() for n, p in ends(model)[1].named_parameters()}
    merged = merge_lora(ends(model.to(torch.bfloat16)), factors, options)
    base = weights["self_attn.q_proj.weight"].bfloat16().float()
    product = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], base + 8 / 2 * product)
    assert all(t.dtype == torch.float32 for t in merged.values())
    assert torch.equal(merged["adapter.1.mlp.up_proj.weight"], weights["mlp.up_proj.weight"].bfloat16().float())


def test_conv1d_counts_as_linear(pico):
    model = pico("gpt2")
    lora = add_lora(ends(model), LoraOptions(rank=2))
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.tensors().items()}
    assert shapes["adapter.0.attn.c_attn.lora_A.weight"] == (2, 32)
    assert shapes["adapter.0.attn.c_attn.lora_B.weight"] == (96, 2)
    assert len(shapes) == 2 * 4 * 2  # blocks x linears (c_attn, c_proj, c_fc, c_proj) x factors


def test_two_parties_start_the_same_from_one_seed(pico):
    first, second = (pico("llama", seed=s) for s in (0, 1))
    torch.manual_seed(5)
    a = add_lora(ends(first), LoraOptions(), seed=7).tensors()
    torch.manual_seed(6)
    b = add_lora(ends(second), LoraOptions(), seed=7).tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    c = add_lora(ends(pico("llama")), LoraOptions(), seed=8).tensors()
    assert not torch.equal(a["adapter.0.mlp.up_proj.lora_A.weight"], c["adapter.0.mlp.up_proj.lora_A.weight"])
    for name, tensor in a.items():
        if name.endswith("lora_B.weight"):
            assert tensor.abs().max() == 0
        else:  # uniform in +-1/sqrt(in)
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound


def test_only_factors_are_trained_and_only_in_the_adapter(pico_llama):
    lora = add_lora(ends(pico_llama), LoraOptions(targets=("q_proj", "mlp.up_proj")))
    paths = {name.split(".", 2)[2] for name in lora.parameters()}
    assert paths == {f"{p}.lora_{f}.weight" for p in ("self_attn.q_proj", "mlp.up_proj") for f in "AB"}
    trained = {id(p) for p in lora.parameters().values()}
    for index, block in enumerate(pico_llama.model.layers):
        wanted = trained if index in (0, 5) else {id(p) for p in block.parameters()}
        assert {id(p) for p in block.parameters() if p.requires_grad} == wanted & {id(p) for p in block.parameters()}


def test_unknown_targets_name_what_exists(pico_llama):
    with pytest.raises(ConfigError, match=r"'qproj' isn't in the adapter; did you mean 'q_proj'.*Known: down_proj"):
        add_lora(ends(pico_llama), LoraOptions(targets=("q_proj", "qproj")))
    assert "self_attn.q_proj.weight" in dict(ends(pico_llama)[0].named_parameters())


def test_factors_must_fit(pico_llama):
    lora = add_lora(ends(pico_llama), LoraOptions(rank=2, targets=("q_proj",)))
    good = filled(lora)
    name = "adapter.0.self_attn.q_proj.lora_A.weight"
    before = lora.tensors()
    for wrong, message in [
        ({n: t for n, t in good.items() if n != name}, f"missing LoRA factor '{name}'"),
        (good | {"adapter.7.x.lora_A.weight": good[name]}, "unknown LoRA factor 'adapter.7.x"),
        (good | {name: torch.zeros(3, 32)}, r"has shape \(3, 32\), must be \(2, 32\)"),
        (good | {name: torch.full((2, 32), torch.nan)}, "aren't finite"),
    ]:
        with pytest.raises(UpdateError, match=message):
            lora.load(wrong)
        with pytest.raises(UpdateError, match=message):
            merge_lora(lora_free(), wrong, LoraOptions(rank=2, targets=("q_proj",)))
    assert all(torch.equal(before[n], t) for n, t in lora.tensors().items())


def lora_free():
    from tests.conftest import make_pico

    return ends(make_pico("llama"))


def test_added_to_plain_values_as_peft_merges(pico, family):
    model, options = pico(family), LoraOptions(rank=3, alpha=6.0)
    blocks = ends(model)
    live = {f"adapter.{k}.{n}": p for k, block in blocks.items() for n, p in block.named_parameters()}
    values = {name: p.detach().clone() for name, p in live.items()}
    before = {name: value.clone() for name, value in values.items()}
    fresh = add_lora(copy.deepcopy(blocks), options).tensors()
    generator = torch.Generator().manual_seed(3)
    factors = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in fresh.items()}
    found = added(values, factors, target_weights(blocks, options), 6.0 / 3)
    expected = merge_lora(blocks, factors, options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert all(torch.equal(values[name], before[name]) for name in values)


def test_components_are_cut_and_filled_up():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, generator=generator), torch.randn(4, 3, generator=generator)
    factors = {"adapter.0.q.lora_A.weight": a, "adapter.0.q.lora_B.weight": b}
    cut = first_components(factors, 2)
    assert [tuple(t.shape) for t in cut.values()] == [(2, 5), (4, 2)]
    first_two = sum(torch.outer(b[:, i], a[i]) for i in range(2))
    grown = padded(cut, 3)
    assert {name: t.shape for name, t in grown.items()} == {name: t.shape for name, t in factors.items()}
    grown_a, grown_b = grown.values()
    torch.testing.assert_close(grown_b @ grown_a, first_two)
    assert grown_a[2].abs().max() == 0 and grown_b[:, 2].abs().max() == 0
    for same in (padded(factors, 3), first_components(factors, 3)):
        assert all(torch.equal(same[name], tensor) for name, tensor in factors.items())


def test_names_of_the_trained_factors():
    names = ["adapter.0.q.lora_A.weight", "adapter.0.q.lora_B.weight"]
    assert [trained_names(names, train) for train in ("both", "a", "b")] == [names, names[:1], names[1:]]
    assert trained_names(["adapter.0.q.weight"], "both") == ["adapter.0.q.weight"]


def test_a_head_goes_through_whole():
    """What is done to factors isn't done to the tensors of a head, which are trained whole (peft: modules_to_save)."""
    head, a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    names = ["adapter.0.q.lora_A.weight", "adapter.0.q.lora_B.weight", "adapter.head.score.weight"]
    factors = dict(zip(names, (a, b, head), strict=True))
    assert trained_names(names, "a") == [names[0], names[2]] and trained_names(names, "b") == names[1:]
    for changed in (first_components(factors, 1), padded(factors, 3), unmoved(factors)):
        assert changed[names[2]] is head
    assert first_components(factors, 1)[names[0]].shape == (1, 2) and padded(factors, 3)[names[1]].shape == (1, 3)
    assert not unmoved(factors)[names[0]].any()
    values = {"adapter.0.q.weight": torch.tensor([[1.0, 1.0]]), "adapter.head.score.weight": torch.zeros(1, 2)}
    merged = added(values, factors, {"adapter.0.q.weight": False}, 0.5)
    torch.testing.assert_close(merged["adapter.0.q.weight"], torch.tensor([[2.5, 2.0]]))  # 1 + 0.5 * (3, 2)
    assert torch.equal(merged["adapter.head.score.weight"], head)
