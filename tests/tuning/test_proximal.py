"""The proximal term against dense algebra; its gradient is real (fault 12)."""

import pytest
import torch

from offsite_fl.errors import UpdateError
from offsite_fl.tuning.proximal import Proximal


def parameters(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


DENSE = {"adapter.0.w": (5, 7), "adapter.1.norm": (4,)}
LORA = {"adapter.0.q.lora_A.weight": (2, 7), "adapter.0.q.lora_B.weight": (5, 2)}


def test_dense_value_and_gradient():
    now, start = parameters(DENSE, 0), parameters(DENSE, 1)
    value = Proximal(now, start)()
    expected = sum(((now[n] - start[n]) ** 2).sum() for n in DENSE)
    torch.testing.assert_close(value, expected)
    value.backward()
    for name in DENSE:
        torch.testing.assert_close(now[name].grad, (2 * (now[name] - start[name])).detach())


def test_lora_value_and_gradient_equal_the_merged_ones():
    shapes = DENSE | LORA
    now, start = parameters(shapes, 0), parameters(shapes, 1)
    value = Proximal(now, start, scale=4.0)()
    value.backward()
    found = {name: p.grad.clone() for name, p in now.items()}
    for parameter in now.values():
        parameter.grad = None
    (b, a), (b0, a0) = ([p["adapter.0.q.lora_B.weight"], p["adapter.0.q.lora_A.weight"]] for p in (now, start))
    dense = (4.0 * (b @ a - b0 @ a0)).square().sum() + sum((now[n] - start[n]).square().sum() for n in DENSE)
    dense.backward()
    torch.testing.assert_close(value, dense, rtol=1e-5, atol=1e-4)
    for name, parameter in now.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-3, msg=name)


def test_zero_at_the_start_and_alive_once_moved():
    now = parameters(DENSE | LORA, 0)
    term = Proximal(now, now, scale=2.0)
    assert term().item() == 0
    term().backward()
    assert all(p.grad.abs().max() == 0 for p in now.values())
    with torch.no_grad():
        for parameter in now.values():
            parameter += 0.01
    term().backward()
    assert all(p.grad.abs().max() > 0 for p in now.values())


def test_small_moves_keep_their_digits():
    now = parameters(LORA, 0)
    term = Proximal(now, now)
    with torch.no_grad():
        now["adapter.0.q.lora_B.weight"][0, 0] += 2.0**-12
    exact = (2.0**-24 * now["adapter.0.q.lora_A.weight"][0].double().square().sum()).item()
    assert term().item() == pytest.approx(exact, rel=1e-3)  # expanded squares would give noise of about 1e-6


def test_received_must_fit():
    now = parameters(DENSE, 0)
    with pytest.raises(UpdateError, match=r"'adapter.1.norm' is on one side"):
        Proximal(now, {"adapter.0.w": now["adapter.0.w"]})
    with pytest.raises(UpdateError, match=r"'adapter.1.norm' has shape \(3,\), the trained one \(4,\)"):
        Proximal(now, now | {"adapter.1.norm": torch.zeros(3)})
