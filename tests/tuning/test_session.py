"""accelerate's process-wide state is borrowed and given back."""

import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from offsite_fl.config import TuneConfig
from offsite_fl.tuning.session import borrowed_accelerator, own_randomness


@pytest.fixture(autouse=True)
def clean():
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def test_different_precisions_one_after_another():
    for precision in ("no", "bf16", "no"):
        with borrowed_accelerator(TuneConfig(precision=precision, device="cpu")) as accelerator:
            assert accelerator.mixed_precision == precision and accelerator.device == torch.device("cpu")
            with accelerator.autocast():
                assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    assert AcceleratorState._shared_state == PartialState._shared_state == {}


def test_an_accelerator_of_the_caller_survives(monkeypatch):
    mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(RuntimeError, match="mine"), borrowed_accelerator(TuneConfig(device="cpu")) as other:
        assert other.mixed_precision == "no" and other.gradient_accumulation_steps == 1
        raise RuntimeError("mine")
    assert mine.mixed_precision == "bf16" and mine.gradient_accumulation_steps == 4
    with mine.autocast():
        assert torch.is_autocast_enabled("cpu")


def test_threads_take_turns():
    inside, most, errors = [], [], []

    def work(precision):
        try:
            with borrowed_accelerator(TuneConfig(precision=precision, device="cpu")) as accelerator:
                inside.append(1)
                most.append(len(inside))
                assert accelerator.mixed_precision == precision
                inside.pop()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("no", "bf16", "no", "bf16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert errors == [] and most == [1, 1, 1, 1]


def test_random_state_comes_back():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with own_randomness(5, torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with own_randomness(5, torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
