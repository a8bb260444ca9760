"""Which replies may be averaged. A bad one is left out with its reason; it never reaches the wrapped strategy.

Flower's own strategies end the run at the first reply that doesn't fit the others.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from offsite_fl.config import Factors
from offsite_fl.errors import OffsiteError, WireError
from offsite_fl.wire import names
from offsite_fl.wire.codecs import encode
from offsite_fl.wire.records import only_arrays, only_metrics

from .exchange import Answer, config_of
from .norms import clipped, update_norm
from .outgoing import Form
from .work import Work

Tensors = Mapping[str, torch.Tensor]
Records = Mapping[str, ArrayRecord | MetricRecord]
# Takes the tensors of a good reply, all checked, and its weight.
Fold = Callable[[Tensors, float], object]

# No data owner has more examples; sums of such weights stay exact, while huge ones would make every average zero.
MAX_WEIGHT = 1e12


@dataclass(frozen=True)
class Expected:
    """What a good train reply looks like.

    ``sent`` are the adapter values that the nodes got (after the codec), ``beside`` what they got beside them.
    ``max_update_norm`` bounds the L2 norm of (reply - sent), over all tensors together; ``clip_update_norm`` scales it
    down instead. ``train``: the LoRA factors that this round trains. ``work``: what replies must tell of how far they
    went, if anything.
    """

    sent: Tensors
    form: Form
    weight_key: str = names.NUM_EXAMPLES
    max_update_norm: float | None = None
    train: Factors = "both"
    clip_update_norm: float | None = None
    beside: Tensors = field(default_factory=dict)
    work: Work | None = None


@dataclass
class Screened:
    """Replies that passed, as messages in the wrapped strategy's form, and the rest by node with the reason.

    ``norms``: L2 norm of (reply - sent) by node, before clipping.
    """

    good: list[tuple[int, Message]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    norms: dict[int, float] = field(default_factory=dict)

    @property
    def good_norms(self) -> list[float]:
        """The norms of the good ones."""
        return [self.norms[node] for node, _ in self.good]

    def without(self, bad: Mapping[int, str]) -> Screened:
        """``bad`` nodes moved from the good replies to the bad ones, with their reasons."""
        good = [(node, message) for node, message in self.good if node not in bad]
        return Screened(good, [*self.bad, *bad.items()], self.norms)


def screen_train(
    answers: Iterable[Answer], expected: Expected, fold: Fold | None = None, enough: int | None = None
) -> Screened:
    """Decode train replies to fp32 and keep those that have exactly the tensors asked for, finite, and sane metrics.

    What the server works out from a reply is in it as if it had come, from the values that count after clipping.
    With ``fold``, the tensors of a good reply go there and nowhere else: what is kept has the metrics alone. It counts
    even if it lacks a metric that most have, for then it is already folded in. Stops at ``enough`` good replies.
    """
    norms: dict[int, float] = {}

    def read(answer: Answer) -> Records:
        tensors, arrays_key = _tensors(answer.message, expected)
        key, metrics = _metrics(answer.message, expected.weight_key)
        if expected.work is not None:
            expected.work.check(metrics)
        norms[answer.node], tensors = _bounded(tensors, expected)
        tensors |= _derived(tensors, metrics, expected)
        if fold is None:
            return {arrays_key: encode(tensors, tensors, "fp32")[0], key: metrics}
        fold(tensors, float(metrics[expected.weight_key]))  # type: ignore[arg-type]
        return {key: metrics}

    agreed = _agree(_screen(answers, read, enough, norms), folded=fold is not None)
    return agreed if expected.work is None else agreed.without(expected.work.odd(good_metrics(agreed.good)))


def screen_evaluate(answers: Iterable[Answer], weight_key: str, enough: int | None = None) -> Screened:
    """Keep evaluate replies with sane metrics. Stops at ``enough`` good ones."""
    return _agree(_screen(answers, lambda answer: dict([_metrics(answer.message, weight_key)]), enough, {}))


def _screen(
    answers: Iterable[Answer], read: Callable[[Answer], Records], enough: int | None, norms: dict[int, float]
) -> Screened:
    """Each reply as ``read`` has it, or the reason why that can't be done."""
    screened = Screened(norms=norms)
    for answer in answers:
        try:
            screened.good.append((answer.node, with_records(answer.message, read(answer))))
        except OffsiteError as error:
            screened.bad.append((answer.node, str(error)))
        except Exception as error:  # a foreign party built this reply: whatever it breaks is its own fault
            screened.bad.append((answer.node, f"malformed reply ({type(error).__name__}: {error})"))
        del answer  # or it would stay in memory while the next one comes
        if len(screened.good) == enough:
            break
    return screened


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
    if config.get(names.ALGORITHM) != form.algorithm:
        ran, asked = config.get(names.ALGORITHM, "plain tuning"), form.algorithm or "plain tuning"
        raise WireError(f"ran {_shown(ran)}, this run asks for {asked}: sites need the client app of offsite_fl for it")
    tensors = form.read(arrays, config, expected.sent, expected.train)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"tensor {name!r} has values that aren't finite")
    return tensors, key


def _bounded(tensors: dict[str, torch.Tensor], expected: Expected) -> tuple[float, dict[str, torch.Tensor]]:
    """The update's norm, and the tensors within the bounds."""
    norm, bound, clip = update_norm(tensors, expected.sent), expected.max_update_norm, expected.clip_update_norm
    if bound is not None and norm > bound:
        raise WireError(f"the update's norm is {norm:.4g}, the bound is {bound:.4g}")
    return norm, tensors if clip is None else clipped(tensors, expected.sent, norm, clip)


def _derived(tensors: Tensors, metrics: MetricRecord, expected: Expected) -> dict[str, torch.Tensor]:
    told = {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}
    derived = expected.form.derived({**expected.sent, **expected.beside}, tensors, told)
    for name, tensor in derived.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"{name!r}, as it follows from the reply, has values that aren't finite")
    return derived


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


def _agree(screened: Screened, *, folded: bool = False) -> Screened:
    """Give all good replies the same metric names, which Flower's averaging needs.

    A name that most replies have is required, unless they are ``folded``; one that only few have is left out of those.
    """
    counts = Counter(name for _, message in screened.good for name in _metric_record(message))
    required = {name for name, count in counts.items() if 2 * count > len(screened.good)}
    agreed = Screened(bad=list(screened.bad), norms=screened.norms)
    for node, message in screened.good:
        record = _metric_record(message)
        lacking = sorted(required - set(record))
        if lacking and not folded:
            agreed.bad.append((node, f"metric {lacking[0]!r} is missing, which the other replies have"))
            continue
        for name in set(record) - required:
            del record[name]
        agreed.good.append((node, message))
    return agreed


def _metric_record(message: Message) -> MetricRecord:
    return only_metrics(message.content)[1]


def with_records(reply: Message, records: Records) -> Message:
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
