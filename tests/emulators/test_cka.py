"""Pooled states against what transformers returns, linear CKA against its formula and against cases by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from offsite_fl.emulators.base import Context
from offsite_fl.emulators.cka import POOLINGS, Pooling, entering_state, linear_cka, pool, pooled_states
from offsite_fl.errors import EmulatorError

MakeContext = Callable[..., Context]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_cka(x: Tensor, y: Tensor) -> float:
    """The formula letter by letter."""
    count = len(x)
    h = torch.eye(count, dtype=torch.float64) - torch.ones(count, count, dtype=torch.float64) / count

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return (h @ a @ a.T @ h * (h @ b @ b.T @ h)).sum()

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def test_one_feature_by_hand() -> None:
    """Centred, x = (1, 0, -1) and y = (1, 1, -2): (x'y)^2 / (x'x y'y) = 9 / (2 * 6)."""
    x, y = torch.tensor([[6.0], [5.0], [4.0]]), torch.tensor([[1.0], [1.0], [-2.0]])
    assert linear_cka(x, y) == pytest.approx(0.75, abs=1e-12)


def test_unrelated_features_give_zero() -> None:
    x, y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert linear_cka(x, y) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_formula(seed: int) -> None:
    x, y = noise(7, 5, seed=seed), noise(7, 12, seed=seed + 100)
    y[:, :5] += x * seed
    assert linear_cka(x, y) == pytest.approx(plain_cka(x, y), rel=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-12)
    assert 0 < linear_cka(x, y) < 1


def test_rotation_scaling_and_shift_change_nothing_but_stretching_does() -> None:
    x, y = noise(9, 6), noise(9, 6, seed=1) + noise(9, 6)
    turn = torch.linalg.qr(noise(6, 6, seed=2)).Q
    expected = linear_cka(x, y)
    assert linear_cka(x @ turn, y) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(x, -1e6 * y) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(x + 50, y @ turn * 3 - 7) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(x, x @ turn) == pytest.approx(1.0, abs=1e-12)
    stretched = x.clone()
    stretched[:, 0] *= 10
    assert abs(linear_cka(stretched, y) - expected) > 1e-2


def test_examples_that_all_look_alike_or_are_not_finite() -> None:
    alike = noise(1, 3).expand(4, 3) * 1e3 / 3
    for x, y in ((alike, noise(4, 3)), (noise(4, 3), alike), (noise(1, 3), noise(1, 3))):
        with pytest.raises(EmulatorError, match="all look alike"):
            linear_cka(x, y)
    broken = noise(4, 3)
    broken[2, 1] = float("inf")
    with pytest.raises(EmulatorError, match="aren't finite"):
        linear_cka(noise(4, 3), broken)


HIDDEN = torch.tensor([[[1.0, 8.0], [4.0, 2.0], [-7.0, 90.0]], [[3.0, 0.0], [5.0, 1.0], [1.0, 5.0]]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
BY_HAND: dict[Pooling, list[list[float]]] = {
    "mean": [[2.5, 5.0], [3.0, 2.0]],
    "mean_all": [[-2 / 3, 100 / 3], [3.0, 2.0]],
    "max": [[4.0, 90.0], [5.0, 5.0]],
    "max_nonpad": [[4.0, 8.0], [5.0, 5.0]],
    "last": [[4.0, 2.0], [1.0, 5.0]],
    "mean_weighted": [[(1 + 8) / 3, (8 + 4) / 3], [(3 + 10 + 3) / 6, (0 + 2 + 15) / 6]],
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_by_hand(pooling: Pooling) -> None:
    assert_close(pool(HIDDEN, MASK, pooling), torch.tensor(BY_HAND[pooling], dtype=torch.float64))


def test_left_padding() -> None:
    """Places count from the start of the row: weights 2 and 3 here."""
    mask = torch.tensor([[False, True, True], [True, True, True]])
    expected = torch.tensor([(4 * 2 - 7 * 3) / 5, (2 * 2 + 90 * 3) / 5], dtype=torch.float64)
    assert_close(pool(HIDDEN, mask, "mean_weighted")[0], expected)
    assert pool(HIDDEN, mask, "last")[0].tolist() == [-7.0, 90.0]


@pytest.mark.parametrize("pooling", ["mean", "max_nonpad", "last", "mean_weighted"])
def test_what_stands_at_padding_counts_for_nothing(pooling: Pooling) -> None:
    broken = HIDDEN.clone()
    broken[0, 2] = float("nan")
    assert torch.equal(pool(broken, MASK, pooling), pool(HIDDEN, MASK, pooling))


def test_an_unknown_pooling_is_named() -> None:
    with pytest.raises(EmulatorError, match="unknown pooling 'median'; there are mean, max"):
        pool(HIDDEN, MASK, "median")  # type: ignore[arg-type]


def test_states_are_those_of_transformers(family: str, pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    """Its ``hidden_states``: the embeddings' first, then one a block, the last behind the final norm."""
    context = context_of(pico(family))
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    found = [entering_state(context), *pooled_states(context)]
    assert len(found) == 7
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in context.model.modules())
    for number, state in enumerate(found):
        expected = []
        for batch in context.calibration:
            inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
            hidden = context.model(**inputs, output_hidden_states=True).hidden_states[number].detach().double()
            for row, mask in zip(hidden, batch["attention_mask"], strict=True):
                weights = [float(t * real) for t, real in enumerate(mask.tolist(), start=1)]
                expected.append(sum(w * h for w, h in zip(weights, row, strict=True)) / sum(weights))
        assert state.dtype == torch.float64 and state.shape == (12, 32)
        assert_close(state, torch.stack(expected), rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]


def test_a_model_without_a_head_keeps_its_last_state(pico_llama: nn.Module, context_of: MakeContext) -> None:
    base = pico_llama.get_submodule("model")
    seen: list[Tensor] = []
    context = context_of(base)
    with base.layers[5].register_forward_hook(lambda *args: seen.append(args[2])):  # type: ignore[index, union-attr]
        base(**{name: value for name, value in context.calibration[0].items() if name != "labels"})
    expected = torch.stack([row[-1] for row in seen[0]]).double()
    rows = [0, 2, 3]  # row 1 is padded
    assert_close(pooled_states(context, "last")[5][rows], expected[rows].detach(), rtol=1e-6, atol=1e-6)


def test_training_mode_is_read_in_eval_mode(pico: Callable[..., nn.Module], context_of: MakeContext) -> None:
    model = pico("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    calm = pooled_states(context_of(model))
    again = pooled_states(context_of(model.train()))
    assert all(torch.equal(a, b) for a, b in zip(calm, again, strict=True))
    assert all(module.training for module in model.modules())


def test_no_text(pico_llama: nn.Module, context_of: MakeContext) -> None:
    for states in (pooled_states, entering_state):
        with pytest.raises(EmulatorError, match="needs calibration text"):
            states(context_of(pico_llama, calibration=()))  # type: ignore[operator]
