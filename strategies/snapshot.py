"""The state of any Flower strategy as plain data: arrays by name and a JSON table. No pickle.

Flower strategies have no method for saving their state, so their attributes are walked: numpy arrays and tensors,
ArrayRecords, scalars, and lists and tables of these, in the strategy and in the strategies that it wraps. Objects
with ``state_dict`` and ``load_state_dict`` (privacy accountants) are asked for theirs. What isn't data, such as
functions, is left to the constructor; so are attributes that a class lists in ``NOT_STATE``, which every run or round
sets anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from offsite_fl.errors import CheckpointError

Arrays = dict[str, npt.NDArray[Any]]
S = TypeVar("S")
# Where an operator may change his mind between two parts of a run.
FREE_TO_CHANGE = frozenset({"min_available_nodes"})


class _NotData(Exception):
    """A value that isn't state: it belongs to the code."""


def take(strategy: Strategy, prefix: str = "base") -> tuple[dict[str, Any], Arrays]:
    """State of ``strategy`` as a JSON table and the arrays that it names, whose names start with ``prefix``."""
    arrays: Arrays = {}
    return _take_attributes(strategy, prefix, arrays), arrays


def put(strategy: Strategy, table: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Give ``strategy``, made by the same constructor call, the state that :func:`take` took."""
    for name, node in table.items():
        current = getattr(strategy, name, None)
        if "strategy" in node:
            if not isinstance(current, Strategy):
                raise CheckpointError(f"the checkpoint has a wrapped strategy in {name!r}, this run's has none there")
            put(current, node["strategy"], arrays)
        elif "state_dict" in node:
            if current is None:
                raise CheckpointError(f"the checkpoint has state for {name!r}, this run's strategy has none there")
            current.load_state_dict(_read(node["state_dict"], arrays))
        else:
            setattr(strategy, name, _read(node, arrays))


def settings(strategy: Strategy) -> dict[str, Any]:
    """Class and scalar settings of a strategy and of those it wraps, taken before a run, to compare two runs by."""
    table: dict[str, Any] = {"class": type(strategy).__name__}
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            table |= {f"{name}.{key}": inner for key, inner in settings(value).items()}
        elif isinstance(value, (bool, int, float, str)) and name not in FREE_TO_CHANGE:
            table[name] = value
    return table


def rollback_point(strategy: Strategy) -> Callable[[], None]:
    """Remember the attributes of a strategy and of those it wraps; the result puts them back.

    Arrays are kept by reference: Flower's strategies replace them and don't write into them.
    """
    kept = [(s, {name: _shallow(value) for name, value in vars(s).items()}) for s in nested(strategy)]

    def restore() -> None:
        for target, attributes in kept:
            vars(target).clear()
            vars(target).update(attributes)

    return restore


def nested(strategy: Strategy) -> list[Strategy]:
    """The strategy and all that it wraps, the outermost first."""
    inner = [value for value in vars(strategy).values() if isinstance(value, Strategy)]
    return [strategy, *(found for each in inner for found in nested(each))]


def nested_of(strategy: Strategy, kind: Callable[..., S]) -> list[S]:
    """Those of :func:`nested` that are of a ``kind``: a class, abstract ones too, which ``type[S]`` would leave out."""
    wanted = cast(type[S], kind)
    return [found for found in nested(strategy) if isinstance(found, wanted)]


def _shallow(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list) else value


def _take_attributes(strategy: Strategy, path: str, arrays: Arrays) -> dict[str, Any]:
    table = {}
    for name, value in vars(strategy).items():
        if name in getattr(strategy, "NOT_STATE", ()):
            continue
        found: Arrays = {}
        try:
            table[name] = _take_attribute(value, f"{path}.{name}", found)
        except _NotData:
            continue
        arrays |= found
    return table


def _take_attribute(value: Any, path: str, arrays: Arrays) -> dict[str, Any]:
    if isinstance(value, Strategy):
        return {"strategy": _take_attributes(value, path, arrays)}
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return {"state_dict": _take(value.state_dict(), path, arrays)}
    return _take(value, path, arrays)


def _take(value: Any, path: str, arrays: Arrays) -> dict[str, Any]:
    if value is None or isinstance(value, (bool, int, str)):
        return {"value": value}
    if type(value) is float:
        return {"value": value} if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise _NotData
        arrays[path] = np.asarray(value)
        return {"array" if isinstance(value, np.ndarray) else "scalar": path}
    if isinstance(value, torch.Tensor):
        arrays[path] = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        return {"tensor": path, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, ArrayRecord):
        return {"record": [[k, _take(a.numpy(), f"{path}.{k}", arrays)["array"]] for k, a in value.items()]}
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int)) and not isinstance(key, bool) for key in value):
            raise _NotData
        return {"dict": [[key, _take(item, f"{path}.{key}", arrays)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take(item, f"{path}.{i}", arrays) for i, item in enumerate(value)]}
    raise _NotData


def _read(node: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    kind = next(iter(node))
    body = node[kind]
    if kind == "value":
        return body
    if kind == "float":
        return float(body)
    if kind == "array":
        return arrays[body]
    if kind == "scalar":
        return arrays[body][()]
    if kind == "tensor":
        raw = torch.from_numpy(arrays[body].copy())
        return raw.view(getattr(torch, node["dtype"])).reshape(node["shape"])
    if kind == "record":
        return ArrayRecord({key: Array(arrays[path]) for key, path in body})
    if kind == "dict":
        return {key: _read(item, arrays) for key, item in body}
    if kind in ("list", "tuple"):
        items = [_read(item, arrays) for item in body]
        return items if kind == "list" else tuple(items)
    raise CheckpointError(f"the checkpoint holds a value of the unknown kind {kind!r}")
