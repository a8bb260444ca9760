"""Flower's strategies by name, with the options of their constructors: ``fedadam:eta=0.01,beta-1=0.9``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from offsite_fl.config import kebab
from offsite_fl.errors import ConfigError
from offsite_fl.registry import Registry, near

STRATEGIES: Registry[Callable[..., Strategy]] = Registry("strategy")

for _name, _class in {
    "fedavg": flower.FedAvg,
    "fedavgm": flower.FedAvgM,
    "fedprox": flower.FedProx,
    "fedadam": flower.FedAdam,
    "fedadagrad": flower.FedAdagrad,
    "fedyogi": flower.FedYogi,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "bulyan": flower.Bulyan,
    "qfedavg": flower.QFedAvg,
}.items():
    STRATEGIES.register(_name)(_class)


def make_strategy(spec: str, **defaults: Any) -> Strategy:
    """Build the strategy that ``spec`` names; its options win over ``defaults``.

    ``ConfigError`` names an unknown strategy or option with the near ones, or a value of the wrong type.

    >>> make_strategy("fedavg:fraction-train=0.5").fraction_train
    0.5
    """
    name, _, rest = spec.partition(":")
    build = STRATEGIES[name.strip()]
    known = _options(build)
    given: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, text = option.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"strategy {name!r} has no option {option!r}; {near(key, known)}")
        parameter = known[key]
        given[parameter.name] = _convert(text, parameter, f"{name}:{key}")
    values = {key: value for key, value in defaults.items() if kebab(key) in known} | given
    missing = [key for key, p in known.items() if p.default is p.empty and p.name not in values]
    if missing:
        raise ConfigError(f"strategy {name!r} needs {', '.join(missing)}; for example {name}:{missing[0]}=0.1")
    return build(**values)


def _options(build: Callable[..., Strategy]) -> dict[str, inspect.Parameter]:
    """The scalar arguments of a strategy's constructor by their key in a spec."""
    hints = inspect.get_annotations(build.__init__, eval_str=True)
    parameters = inspect.signature(build).parameters
    return {
        kebab(name): parameters[name] for name, hint in hints.items() if name in parameters and hint in (int, float)
    }


def _convert(text: str, parameter: inspect.Parameter, where: str) -> float:
    kind = int if parameter.annotation in (int, "int") else float
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where} = {text!r} must be of type {kind.__name__}") from None
