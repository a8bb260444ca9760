"""The training loop against a plain one written here, and what it leaves behind."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from offsite_fl.config import TuneConfig
from offsite_fl.data.loader import make_loader
from offsite_fl.errors import ConfigError, DataError, OffsiteError, UpdateError
from offsite_fl.evaluation.loss import evaluate_loss
from offsite_fl.tuning.lora import add_lora
from offsite_fl.tuning.tune import planned_steps, tune


def examples(rows=8, seed=0, mixed=True):
    """Rows of different lengths and answer spans, so that batches differ in their number of predicted tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for row in range(rows):
        length = 6 + row % 5 if mixed else 10
        one = torch.randint(4, 64, (length,), generator=generator).tolist()
        ids.append(one)
        labels.append([-100] * (row % 3 if mixed else 0) + one[row % 3 if mixed else 0 :])
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def ends(model):
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return {0: blocks[0], 1: blocks[-1]}


def adapter(model):
    return {f"adapter.{k}.{n}": p for k, block in ends(model).items() for n, p in block.named_parameters()}


def quick(**settings):
    return TuneConfig(**({"lr": 0.01, "batch_size": 4, "device": "cpu", "progress": False} | settings))


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def plain_loop(model, trained, data, config, steps):
    """What tune must do, in the plainest torch: full logits, one batch a step."""
    loader = make_loader(data, config.batch_size, pad_id=0, shuffle=True, seed=config.seed)
    batches = [b for _ in range(math.ceil(steps / len(loader))) for b in loader][:steps]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(trained.values(), lr=config.lr, weight_decay=0.0, foreach=False)
    losses = []
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_plain_loop(pico, optimizer):
    config = quick(optimizer=optimizer, max_steps=3, clip_norm=0.5, seed=4)
    mine, plain = pico("llama"), pico("llama")
    result = tune(mine, adapter(mine), examples(), config)
    losses = plain_loop(plain, adapter(plain), examples(), config, 3)
    assert [step for step, _ in result.history] == [1, 2, 3]
    assert [loss for _, loss in result.history] == pytest.approx(losses, rel=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(mine.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_only_the_adapter_changes_and_all_modes_come_back(pico, family):
    model = pico(family)
    model.get_input_embeddings().requires_grad_(True)
    before, required = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    ends(model)[0].train()
    modes = [m.training for m in model.modules()]
    trained = adapter(model)
    result = tune(model, trained, examples(4), quick(max_steps=1))
    inside = {id(p) for p in trained.values()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in inside), name
        assert parameter.grad is None
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert [m.training for m in model.modules()] == modes
    assert result.tensors.keys() == trained.keys()
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, trained[name]) and tensor.data_ptr() != trained[name].data_ptr()
        assert tensor.dtype == torch.float32


def test_lora_moves_and_nothing_else_does(pico_llama):
    config = quick(max_steps=2, lora_rank=2, lora_alpha=4.0, lora_dropout=0.1)
    before = state(pico_llama)
    lora = add_lora(ends(pico_llama), config.lora, seed=0)
    start = lora.tensors()
    result = tune(pico_llama, lora.parameters(), examples(), config)
    for name, tensor in result.tensors.items():
        assert not torch.equal(tensor, start[name]), name
    for name in {n.rpartition(".lora_")[0] for n in start}:
        delta = result.tensors[f"{name}.lora_B.weight"] @ result.tensors[f"{name}.lora_A.weight"]
        assert delta.abs().max() > 0, name
    lora.remove()
    assert same(state(pico_llama), before)


def test_the_seed_decides_everything(pico):
    def run(seed, noise):
        torch.manual_seed(noise)
        model = pico("gpt2", resid_pdrop=0.3)
        result = tune(model, adapter(model), examples(), quick(max_steps=3, seed=seed))
        return result

    first, again, other = run(1, 10), run(1, 20), run(2, 10)
    assert same(first.tensors, again.tensors) and first.history == again.history
    assert first.history != other.history
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = pico("gpt2")
    tune(model, adapter(model), examples(), quick(max_steps=1))
    assert torch.equal(torch.rand(2), expected)


def test_accumulated_half_batches_equal_one_batch(pico):
    results = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = pico("llama")
        config = quick(batch_size=size, gradient_accumulation=parts, epochs=2, optimizer="sgd", lr=0.1)
        results.append(tune(model, adapter(model), examples(), config))
    for other in results[1:]:
        assert other.steps == 4 and other.tokens == results[0].tokens
        assert [v for _, v in other.history] == pytest.approx([v for _, v in results[0].history], rel=1e-5)
        for name, tensor in results[0].tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_rounds_of_a_spanning_schedule_equal_one_run(pico, schedule):
    settings = {"optimizer": "sgd", "lr": 0.1, "schedule": schedule, "warmup_steps": 2, "schedule_steps": 7}
    whole = pico("llama")
    tune(whole, adapter(whole), examples(), quick(max_steps=7, **settings))
    parts = pico("llama")
    for offset, steps in ((0, 3), (3, 1), (4, 3)):
        tune(parts, adapter(parts), examples(), quick(max_steps=steps, schedule_offset=offset, **settings))
    assert same(state(parts), state(whole))


def test_nothing_is_kept_below_the_first_trained_block(pico_llama):
    seen = {}
    for index, block in enumerate(pico_llama.model.layers):
        block.register_forward_hook(lambda m, a, out, i=index: seen.__setitem__(i, out.requires_grad))
    last = {f"adapter.0.{n}": p for n, p in pico_llama.model.layers[-1].named_parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tune(pico_llama, last, examples(4, mixed=False), quick(max_steps=1))
        few = len(saved)
        saved.clear()
        tune(pico_llama, adapter(pico_llama), examples(4, mixed=False), quick(max_steps=1))
    assert seen == dict.fromkeys(range(6), True)  # of the second run; the first is judged by what it saved
    assert few < len(saved) / 3
    tune(pico_llama, last, examples(4), quick(max_steps=1))
    assert seen == {0: False, 1: False, 2: False, 3: False, 4: False, 5: True}


def test_frozen_parameters_never_get_gradients(pico_llama):
    trained = {id(p) for p in adapter(pico_llama).values()}
    touched = set()
    for parameter in pico_llama.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: touched.add(id(p)))
    tune(pico_llama, adapter(pico_llama), examples(), quick(max_steps=1))
    assert touched == trained


def test_best_values_on_validation_are_kept_and_patience_ends_the_run(pico):
    model = pico("llama")
    held, config = examples(6, seed=9), quick(lr=0.03, max_steps=40, eval_every=2, patience=2, validation_share=0.1)
    result = tune(model, adapter(model), examples(), config, validation=held)
    assert result.stopped_early and result.steps < 40
    losses = [loss for _, loss in result.validation_history]
    assert [step for step, _ in result.validation_history] == list(range(2, result.steps + 1, 2))
    assert result.validation_loss == min(losses) and result.best_step == 2 * (1 + losses.index(min(losses)))
    assert result.steps == result.best_step + 2 * config.patience
    assert same({n: p.detach() for n, p in adapter(model).items()}, result.tensors)
    loader = make_loader(held, 4, pad_id=0)
    assert evaluate_loss(model, loader).loss == pytest.approx(result.validation_loss, rel=1e-6)


def test_patience_needs_something_to_watch(pico_llama):
    trained = {n: p for n, p in pico_llama.named_parameters() if ".layers.0." in n}
    with pytest.raises(ConfigError, match="patience needs data to watch"):
        tune(pico_llama, trained, examples(6), quick(patience=2))


def test_own_validation_split(pico_llama):
    result = tune(pico_llama, adapter(pico_llama), examples(10), quick(epochs=2, batch_size=2, validation_share=0.2))
    assert result.examples == 8 and result.steps == 8
    assert [step for step, _ in result.validation_history] == [4, 8] and not result.stopped_early


def test_proximal_gradient_by_hand(pico):
    settings = {"max_steps": 1, "optimizer": "sgd", "lr": 0.1, "clip_norm": 0.0, "gradient_accumulation": 2}
    plain, near = pico("llama"), pico("llama")
    received = {n: p.detach() + 0.05 for n, p in adapter(near).items()}
    free = tune(plain, adapter(plain), examples(), quick(**settings))
    held = tune(near, adapter(near), examples(), quick(proximal_mu=3.0, **settings), received=received)
    assert held.history == free.history  # the term isn't part of the loss that is reported
    for name, tensor in free.tensors.items():
        # gradient of mu/2 * ||A - A_received||^2 is mu * (A - A_received) = -3 * 0.05
        torch.testing.assert_close(held.tensors[name], tensor - 0.1 * 3.0 * -0.05, rtol=1e-4, atol=1e-5)
    with pytest.raises(UpdateError, match="on one side only"):
        tune(near, adapter(near), examples(), quick(proximal_mu=1.0), received={})


def test_proximal_term_holds_lora_back(pico):
    moved = []
    for mu in (0.0, 50.0):
        model = pico("llama")
        lora = add_lora(ends(model), quick(lora_rank=2).lora, seed=0)
        config = quick(max_steps=8, lora_rank=2, proximal_mu=mu, optimizer="sgd", lr=0.3)
        tensors = tune(model, lora.parameters(), examples(), config).tensors
        stems = {n.rpartition(".lora_")[0] for n in tensors}
        moved.append(sum((tensors[f"{s}.lora_B.weight"] @ tensors[f"{s}.lora_A.weight"]).norm() for s in stems))
    assert 0 < moved[1] < 0.9 * moved[0]


def test_checkpointing_changes_nothing_but_memory(pico):
    results = []
    for on in (False, True):
        model, calls = pico("llama"), []
        model.model.layers[2].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(tune(model, adapter(model), examples(), quick(max_steps=2, gradient_checkpointing=on)))
        assert len(calls) == (4 if on else 2) + 1  # 2 steps, each twice if recomputed; and one to probe the head
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert same(results[0].tensors, results[1].tensors)


def test_bf16_autocast_and_frozen_bf16(pico):
    exact = pico("llama")
    reference = tune(exact, adapter(exact), examples(), quick(max_steps=3))
    for settings in (
        {"precision": "bf16"},
        {"frozen_dtype": "bfloat16"},
        {"precision": "bf16", "frozen_dtype": "bfloat16"},
    ):
        model = pico("llama")
        result = tune(model, adapter(model), examples(), quick(max_steps=3, **settings))
        assert result.train_loss == pytest.approx(reference.train_loss, abs=0.1)
        assert all(p.dtype == torch.float32 for p in adapter(model).values())
        assert all(t.dtype == torch.float32 for t in result.tensors.values())


def test_full_fine_tuning_of_a_tied_model(pico):
    model = pico("gpt2")
    everything = dict(model.named_parameters())
    before = state(model)
    first = tune(model, everything, examples(), quick(max_steps=6))
    assert first.history[-1][1] < first.history[0][1]
    assert "lm_head.weight" not in everything  # tied to the embedding, so it travels once
    assert not any(torch.equal(before[n], t) for n, t in first.tensors.items())


def test_counts():
    assert planned_steps(9, quick(batch_size=4)) == 3
    assert planned_steps(9, quick(batch_size=4, gradient_accumulation=2, epochs=3)) == 6
    assert planned_steps(30, quick(batch_size=1, epochs=0.1)) == 3
    assert planned_steps(30, quick(batch_size=4, epochs=0.01)) == 1
    assert planned_steps(9, quick(max_steps=50, epochs=1)) == 50


def test_tokens_and_losses_are_counted(pico_llama):
    data = examples(4)
    result = tune(pico_llama, adapter(pico_llama), data, quick(epochs=2))
    assert result.tokens == 2 * sum(map(len, data["input_ids"])) and result.examples == 4 and result.steps == 2
    assert result.train_loss == pytest.approx(sum(loss for _, loss in result.history) / 2)
    assert result.metrics["tokens"] == result.tokens and result.metrics["steps"] == 2.0
    assert "validation-loss" not in result.metrics and result.seconds > 0


def test_nan_is_an_error_that_names_the_step(pico_llama):
    with torch.no_grad():
        pico_llama.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(OffsiteError, match=r"loss is nan in step 1 of 2; lower lr \(now 0.01\)"):
        tune(pico_llama, adapter(pico_llama), examples(), quick(epochs=1))
    assert not pico_llama.training and all(p.grad is None for p in pico_llama.parameters())


def test_a_trained_tensor_without_gradient_is_an_error(pico_llama):
    pico_llama.unused = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(OffsiteError, match="no gradient reaches"):
        tune(pico_llama, {"adapter.0.unused": pico_llama.unused}, examples(), quick(max_steps=1))


def test_wrong_calls(pico, pico_llama):
    with pytest.raises(ConfigError, match="isn't a parameter of the network"):
        tune(pico_llama, adapter(pico("llama")), examples(), quick())
    with pytest.raises(ConfigError, match="no tensor is to be trained"):
        tune(pico_llama, {}, examples(), quick())
    with pytest.raises(ConfigError, match="needs a GPU"):
        tune(pico_llama, adapter(pico_llama), examples(), quick(precision="fp16"))
    silent = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, -100]]})
    with pytest.raises(DataError, match="no token to predict"):
        tune(pico_llama, adapter(pico_llama), silent, quick())


def test_progress_is_shown_when_asked_for(pico_llama, capsys):
    tune(pico_llama, adapter(pico_llama), examples(), quick(max_steps=1, progress=True))
    tune(pico_llama, adapter(pico_llama), examples(), quick(max_steps=1))
    assert "nan" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu(pico, precision):
    model, reference = pico("llama"), pico("llama")
    result = tune(model, adapter(model), examples(), quick(max_steps=3, device=None, precision=precision))
    expected = tune(reference, adapter(reference), examples(), quick(max_steps=3))
    assert result.train_loss == pytest.approx(expected.train_loss, abs=0.1)
    frozen = model.model.layers[2].mlp.up_proj.weight
    assert frozen.is_cuda and frozen.dtype == torch.bfloat16
    assert all(t.device.type == "cpu" and t.dtype == torch.float32 for t in result.tensors.values())
