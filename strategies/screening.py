"""Which replies may be averaged. A bad one is left out with its reason; it never reaches the wrapped strategy.

Flower's own strategies end the run at the first reply that doesn't fit the others.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from offsite_fl.errors import OffsiteError, WireError
from offsite_fl.wire import names
from offsite_fl.wire.codecs import decode, encode
from offsite_fl.wire.records import only_arrays, only_metrics

from .exchange import Answer, config_of
from .outgoing import Form

Tensors = Mapping[str, torch.Tensor]

# No data owner has more examples; sums of such weights stay exact, while huge ones would make every average zero.
MAX_WEIGHT = 1e12


@dataclass(frozen=True)
class Expected:
    """What a good train reply looks like.

    ``sent`` are the adapter values that the nodes got (after the codec). ``max_update_norm`` bounds the L2 norm of
    (reply - sent), over all tensors together.
    """

    sent: Tensors
    form: Form
    weight_key: str = names.NUM_EXAMPLES
    max_update_norm: float | None = None


@dataclass
class Screened:
    """Replies that passed, as messages in the wrapped strategy's form, and the rest by node with the reason."""

    good: list[tuple[int, Message]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def screen_train(answers: Iterable[Answer], expected: Expected) -> Screened:
    """Decode train replies to fp32 and keep those that have exactly the tensors asked for, finite, and sane metrics."""
    screened = Screened()
    for answer in answers:
        try:
            tensors, arrays_key = _tensors(answer.message, expected)
            key, metrics = _metrics(answer.message, expected.weight_key)
        except OffsiteError as error:
            screened.bad.append((answer.node, str(error)))
            continue
        except Exception as error:  # a foreign party built this reply: whatever it breaks is its own fault
            screened.bad.append((answer.node, f"malformed reply ({type(error).__name__}: {error})"))
            continue
        arrays = encode(tensors, tensors, "fp32")[0]
        screened.good.append((answer.node, _with(answer.message, {arrays_key: arrays, key: metrics})))
    return _agree(screened)


def screen_evaluate(answers: Iterable[Answer], weight_key: str) -> Screened:
    """Keep evaluate replies with sane metrics."""
    screened = Screened()
    for answer in answers:
        try:
            key, metrics = _metrics(answer.message, weight_key)
        except OffsiteError as error:
            screened.bad.append((answer.node, str(error)))
            continue
        except Exception as error:  # as above
            screened.bad.append((answer.node, f"malformed reply ({type(error).__name__}: {error})"))
            continue
        screened.good.append((answer.node, _with(answer.message, {key: metrics})))
    return _agree(screened)


def check_aggregate(arrays: ArrayRecord | None, like: Tensors) -> ArrayRecord:
    """The wrapped strategy's result in fp32 and in the order of ``like``; ``WireError`` says why it can't be used."""
    if arrays is None or not arrays:
        raise WireError("the strategy returned no arrays")
    for what, odd in (("lacks", like.keys() - arrays.keys()), ("has unknown", arrays.keys() - like.keys())):
        if odd:
            raise WireError(f"the aggregate {what} {len(odd)} tensors, for example {sorted(odd)[0]!r}")
    tensors = {}
    for name, tensor in like.items():
        value = torch.from_numpy(arrays[name].numpy()).to(torch.float32)
        if value.shape != tensor.shape:
            raise WireError(f"the aggregate of {name!r} has shape {tuple(value.shape)}, expected {tuple(tensor.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise WireError(f"the aggregate of {name!r} has values that aren't finite")
        tensors[name] = value
    return encode(tensors, tensors, "fp32")[0]


def _tensors(reply: Message, expected: Expected) -> tuple[dict[str, torch.Tensor], str]:
    key, arrays = only_arrays(reply.content)
    config = config_of(reply.content)
    form = expected.form
    digest = config.get(names.DIGEST, form.digest)
    if digest != form.digest:
        raise WireError(f"tuned another bundle ({_shown(digest)[:20]}), this run has {form.digest[:12]}")
    tensors = decode(arrays, config, form.reference, form.codec)
    squares = 0.0
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"tensor {name!r} has values that aren't finite")
        squares += float((tensor.double() - expected.sent[name].double()).square().sum())
    bound = expected.max_update_norm
    if bound is not None and math.sqrt(squares) > bound:
        raise WireError(f"the update's norm is {math.sqrt(squares):.4g}, the bound is {bound:.4g}")
    return tensors, key


def _metrics(reply: Message, weight_key: str) -> tuple[str, MetricRecord]:
    key, metrics = only_metrics(reply.content)
    if weight_key not in metrics:
        raise WireError(f"metric {weight_key!r} is missing; the reply has {_shown(sorted(metrics))}")
    for name, value in metrics.items():
        if isinstance(value, list) or not math.isfinite(value):
            raise WireError(f"metric {ascii(name)[:60]} is {_shown(value)}, must be one finite number")
    weight = metrics[weight_key]
    if isinstance(weight, list) or not 0 < weight <= MAX_WEIGHT:
        raise WireError(f"metric {weight_key!r} is {_shown(weight)}, must be above 0 and at most {MAX_WEIGHT:.0e}")
    return key, MetricRecord(dict(metrics))


def _agree(screened: Screened) -> Screened:
    """Give all good replies the same metric names, which Flower's averaging needs.

    A name that most replies have is required; one that only few have is left out of those few.
    """
    counts = Counter(name for _, message in screened.good for name in _metric_record(message))
    required = {name for name, count in counts.items() if 2 * count > len(screened.good)}
    agreed = Screened(bad=list(screened.bad))
    for node, message in screened.good:
        record = _metric_record(message)
        lacking = sorted(required - set(record))
        if lacking:
            agreed.bad.append((node, f"metric {lacking[0]!r} is missing, which the other replies have"))
            continue
        for name in set(record) - required:
            del record[name]
        agreed.good.append((node, message))
    return agreed


def _metric_record(message: Message) -> MetricRecord:
    return only_metrics(message.content)[1]


def _with(reply: Message, records: Mapping[str, ArrayRecord | MetricRecord]) -> Message:
    """A message with the metadata of ``reply`` and other content; the reply itself stays as it came."""
    message = copy.copy(reply)
    message.content = RecordDict(dict(records))
    return message


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def good_metrics(good: Sequence[tuple[int, Message]]) -> dict[int, dict[str, float]]:
    """Metrics of replies that passed, by node."""
    return {
        node: {name: float(value) for name, value in _metric_record(message).items() if not isinstance(value, list)}
        for node, message in good
    }
