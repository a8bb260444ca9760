"""Strategies by name, Flower's and our own, with the options of their constructors: ``fedadam:eta=0.01,beta-1=0.9``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from offsite_fl.config import kebab
from offsite_fl.emulators.spec import MethodHelp, OptionHelp
from offsite_fl.errors import ConfigError
from offsite_fl.registry import Registry, near

from .ditto import Ditto
from .fedbiot import FedBiOT
from .fednova import FedNova
from .fedot import FedOT
from .fedper import FedPer
from .ffa_lora import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA
from .rolora import RoLoRA
from .scaffold import Scaffold

# How an option's text is read, by its type.
_READ: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: {"true": True, "false": False}.__getitem__,
}
RECORD_KEYS = ("weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key")  # for code, not for a spec

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
    "scaffold": Scaffold,
    "fednova": FedNova,
    "fedper": FedPer,
    "fedot": FedOT,
    "fedbiot": FedBiOT,
    "ditto": Ditto,
    "flora": FLoRA,
    "flexlora": FlexLoRA,
    "ffa-lora": FFALoRA,
    "rolora": RoLoRA,
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


def describe_strategies() -> tuple[MethodHelp, ...]:
    """Every known strategy by name, with the first line of its docstring and its options."""
    return tuple(_describe(name, STRATEGIES[name]) for name in STRATEGIES)


def _describe(name: str, build: Callable[..., Strategy]) -> MethodHelp:
    summary = (inspect.getdoc(build) or "").partition("\n")[0]
    options = (
        OptionHelp(key, _kind(p).__name__, None if p.default is p.empty else str(p.default))
        for key, p in _options(build).items()
    )
    return MethodHelp(name, summary, tuple(options))


def _options(build: Callable[..., Strategy]) -> dict[str, inspect.Parameter]:
    """The scalar arguments of a strategy's constructor by their key in a spec.

    A constructor that takes ``**`` has those of the class above it as well.
    """
    found: dict[str, inspect.Parameter] = {}
    for kind in inspect.getmro(build) if inspect.isclass(build) else ():
        construct = vars(kind).get("__init__")
        if construct is None:
            continue
        hints, parameters = inspect.get_annotations(construct, eval_str=True), inspect.signature(construct).parameters
        for name, parameter in parameters.items():
            if hints.get(name) in _READ and name not in RECORD_KEYS:
                found.setdefault(kebab(name), parameter.replace(annotation=hints[name]))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def _convert(text: str, parameter: inspect.Parameter, where: str) -> Any:
    kind = _kind(parameter)
    try:
        return _READ[kind](text)
    except (ValueError, KeyError):
        raise ConfigError(f"{where} = {text!r} must be of type {kind.__name__}") from None


def _kind(parameter: inspect.Parameter) -> type:
    found: type = parameter.annotation
    return found
