"""The network a client runs: the full model's class with fewer or other blocks, described by plain data.

The owner writes a :class:`NetworkPlan` with :func:`plan_network`; anyone can rebuild the network from the plan and the
tensors alone (:func:`build_network`, :func:`fill_network`). Both parties use the same two functions, so their logits
are the same by construction. Tensors are named by slot, never by the full model's block index:
``adapter.{k}.{path}``, ``emulator.{b}.{path}`` and, outside the blocks, ``adapter.head.{path}`` for what is trained
and ``shared.{path}`` for everything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped,unused-ignore]
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from offsite_fl.errors import ModelError
from offsite_fl.models.blocks import BlockList, Blocks, block_list
from offsite_fl.models.caching import has_cache
from offsite_fl.models.cut_config import FORBIDDEN_CONFIG_KEYS, cut_config
from offsite_fl.models.head import check_head, head_parameters, read_head, slot_of_outside
from offsite_fl.models.likeness import check_alike
from offsite_fl.models.linears import QuantizedLinear, apply_linears, describe_linears
from offsite_fl.models.outside import outside_blocks
from offsite_fl.models.overrides import DEPTH_TABLES, HUB_BACKBONES, NAMES_ALONE
from offsite_fl.models.tasks import TASKS, build_model, check_task, task_of
from offsite_fl.registry import near

MAX_PLACES = 4096
MAX_BUFFER_BYTES = 2**30
MAX_CONFIG_NUMBER = 2**40
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class Place:
    """One block of the network in forward order: which part it belongs to and which block of that part it is."""

    role: Literal["adapter", "emulator"]
    slot: int

    @property
    def prefix(self) -> str:
        """Start of the slot names of its tensors, e.g. ``adapter.0.``."""
        return f"{self.role}.{self.slot}."


@dataclass(frozen=True)
class TensorSpec:
    """Shape of an expected tensor and its dtype; None stands for any of fp32, fp16 and bf16."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class NetworkPlan:
    """Everything but the tensors: the task, a transformers config, the places, and the structure of emulator blocks.

    ``linears[b]`` describes emulator block ``b`` (see :mod:`offsite_fl.models.linears`); the same slot at two places
    means that both run the same weights. ``head`` are the paths of the tensors outside the blocks that are trained.
    """

    task: str
    config: Mapping[str, Any]
    blocks_path: str
    layout: tuple[Place, ...]
    linears: tuple[Mapping[str, Any], ...]
    head: tuple[str, ...] = ()

    def adapter_places(self) -> dict[int, int]:
        """Adapter slot to its index in the network's list of blocks."""
        return {place.slot: index for index, place in enumerate(self.layout) if place.role == "adapter"}

    def to_json(self) -> dict[str, Any]:
        """A JSON object; :meth:`from_json` reads it back."""
        plain: dict[str, Any] = {
            "task": self.task,
            "config": dict(self.config),
            "blocks_path": self.blocks_path,
            "layout": [[place.role, place.slot] for place in self.layout],
            "linears": [dict(table) for table in self.linears],
        }
        # Left out where there is none, so that such bundles keep their form and their digest.
        return plain | ({"head": list(self.head)} if self.head else {})

    @classmethod
    def from_json(cls, data: Any) -> NetworkPlan:
        """Read a plan from a foreign file; ``ModelError`` says which part isn't as it must be."""
        keys = {"task", "config", "blocks_path", "layout", "linears"}
        if not isinstance(data, dict) or set(data) - {"head"} != keys:
            raise ModelError(f"network plan must be an object with exactly the keys {sorted(keys)}, and head or not")
        if data["task"] not in TASKS:
            raise ModelError(f"network plan: unknown task {data['task']!r}; {near(str(data['task']), TASKS)}")
        if not isinstance(data["blocks_path"], str):
            raise ModelError("network plan: blocks_path must be text")
        layout = _read_layout(data["layout"])
        linears = data["linears"]
        slots = {place.slot for place in layout if place.role == "emulator"}
        if not isinstance(linears, list) or not all(isinstance(t, dict) for t in linears):
            raise ModelError("network plan: linears must be a list of objects")
        if slots != set(range(len(linears))):
            raise ModelError(
                f"network plan: {len(linears)} emulator blocks are described, the layout names {sorted(slots)}"
            )
        _check_config(data["config"])
        head = read_head(data["head"]) if "head" in data else ()
        return cls(data["task"], data["config"], data["blocks_path"], layout, tuple(linears), head)


def _read_layout(data: Any) -> tuple[Place, ...]:
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_PLACES:
        raise ModelError(f"network plan: layout must be a list of 1 to {MAX_PLACES} places")
    places = []
    for entry in data:
        good = isinstance(entry, list) and len(entry) == 2 and entry[0] in ("adapter", "emulator")
        if not good or type(entry[1]) is not int or not 0 <= entry[1] < MAX_PLACES:
            raise ModelError(f"network plan: {entry!r} isn't a place like ['adapter', 0]")
        places.append(Place(entry[0], entry[1]))
    adapters = [place.slot for place in places if place.role == "adapter"]
    if adapters != list(range(len(adapters))) or not adapters:
        raise ModelError(f"network plan: adapter slots must run 0, 1, ... in forward order, got {adapters}")
    return tuple(places)


def _check_config(config: Any, where: str = "config") -> None:
    if not isinstance(config, dict) or (where == "config" and not isinstance(config.get("model_type"), str)):
        raise ModelError(f"network plan: {where} must be an object with a model_type")
    own_backbone = config.get("model_type") == "timm_backbone"
    for key, value in config.items():
        if key in FORBIDDEN_CONFIG_KEYS or key.startswith("_") or (key in HUB_BACKBONES and not own_backbone):
            raise ModelError(f"network plan: {where} may not carry {key!r}")
        if isinstance(value, dict):
            _check_config(value, f"{where}.{key}")
        elif key in NAMES_ALONE and isinstance(value, str) and not PLAIN_NAME.fullmatch(value):
            raise ModelError(f"network plan: {where}.{key} = {value!r} must be a plain name, no address or path")
        elif isinstance(value, (int, float)) and abs(value) > MAX_CONFIG_NUMBER:
            raise ModelError(f"network plan: {where}.{key} = {value} is absurdly large")


def plan_network(
    model: nn.Module,
    blocks: Blocks,
    adapter: Sequence[int],
    layout: Mapping[int, int],
    emulator: Sequence[nn.Module],
    origins: Sequence[int],
    task: str | None = None,
    head: Sequence[str] = (),
) -> NetworkPlan:
    """Describe the network of ``adapter`` blocks and ``emulator`` blocks (owner's side; nothing is copied).

    Args:
        model: the full model; ``blocks`` is where its blocks are.
        adapter: indices of the adapter blocks in the full model.
        layout: full-model position to index into ``emulator``, for every place that the emulator runs.
        emulator: the emulator's blocks; ``origins[b]`` is the full-model block that block ``b`` was made from.
        task: key of :data:`~offsite_fl.models.tasks.TASKS`; None finds the one that the model's class belongs to.
        head: paths of the tensors outside the blocks that are trained, see :mod:`offsite_fl.models.head`.

    Raises:
        ModelError: if a client couldn't rebuild the network from the config: the model's class isn't in transformers'
            tables, the config doesn't say how many blocks there are, or a block would be built unlike the owner's.
    """
    modules = block_list(model, blocks)
    slot_of = {index: slot for slot, index in enumerate(sorted(adapter))}
    places: list[Place] = []
    sources: list[int] = []
    for position in sorted([*slot_of, *layout]):
        if position in slot_of:
            places.append(Place("adapter", slot_of[position]))
            sources.append(position)
        else:
            places.append(Place("emulator", layout[position]))
            sources.append(origins[layout[position]])
    linears = tuple(describe_linears(b, modules[o]) for b, o in zip(emulator, origins, strict=True))
    found = known_task(model, task)
    config = cut_config(model, blocks, sources, found)
    check_head(model, blocks.path, head)
    plan = NetworkPlan(found, config, blocks.path, tuple(places), linears, tuple(head))
    # Through JSON and back: what the owner uses is exactly what a client will read.
    plan = NetworkPlan.from_json(json.loads(json.dumps(plan.to_json())))
    with torch.device("meta"):
        check_alike(model, blocks, _bare(plan), sources)
    return plan


def known_task(model: nn.Module, task: str | None = None) -> str:
    """``task`` if it is given, else that of the model's class; ``ModelError`` if there is none."""
    found = check_task(task) if task is not None else task_of(model)
    if found is None:
        raise ModelError(
            f"a client couldn't build {type(model).__name__}: it is none of the classes that transformers builds from "
            f"a config for {', '.join(TASKS)}. A class of your own must be registered with AutoConfig and its Auto "
            "class; a wrapped model must be unwrapped"
        )
    return found


def _bare(plan: NetworkPlan) -> nn.Module:
    """The network of ``plan`` with the blocks that its config makes."""
    values = {k: v for k, v in plan.config.items() if k != "model_type"}
    try:
        # By its own reading of files, which may know names that its constructor doesn't (timm's classes).
        config = _config_class(plan.config["model_type"]).from_dict(values)
        for key, value in values.items():  # T5's config doesn't take every tie_word_embeddings that it is given
            if isinstance(value, (bool, int, float, str)) and vars(config).get(key, value) != value:
                setattr(config, key, value)
        if has_cache(config):
            config.use_cache = False
        depth = _told_depth(config, len(plan.layout))
        # Before building: a foreign config mustn't make millions of blocks. Of two stacks the config tells one only.
        if depth != len(plan.layout) and depth > MAX_PLACES:
            raise ModelError(f"network plan: the config makes {depth} blocks, the layout has {len(plan.layout)}")
        network = _built(plan, config)
    except ModelError:
        raise
    except Exception as error:  # foreign data reaches many constructors; all their complaints mean the same here
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        raise ModelError(f"network plan: transformers can't build {plan.config['model_type']!r}: {reason}") from error
    blocks = _network_blocks(network, plan)
    if len(blocks) != len(plan.layout):
        raise ModelError(f"network plan: the config makes {len(blocks)} blocks, the layout has {len(plan.layout)}")
    return network


def _config_class(model_type: str) -> Any:
    """The class of configs of ``model_type``; making one with its defaults to ask it isn't always possible."""
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"network plan: transformers can't build {model_type!r}: it knows no model of this type")
    return CONFIG_MAPPING[model_type]


def _told_depth(config: Any, expected: int) -> int:
    """How many blocks a config says there are; ``expected`` where it doesn't say it in a usual place."""
    table, entry = DEPTH_TABLES.get(config.model_type, ("", ""))
    told = (getattr(config, table, None) or {}).get(entry) if table else getattr(config, "num_hidden_layers", expected)
    return told if isinstance(told, int) else expected


def _built(plan: NetworkPlan, config: Any) -> nn.Module:
    """The model of ``config``, its embeddings and its head tied as the plan says."""
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False) or _head_apart(plan)
    network = build_model(plan.task, config)
    if _head_apart(plan):
        head: Any = network.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return network


def _head_apart(plan: NetworkPlan) -> bool:
    """Whether encoder and decoder share an embedding and the head doesn't; transformers' one switch ties all three."""
    return plan.config.get("tie_encoder_decoder") is True and plan.config.get("tie_word_embeddings") is False


def _skeleton(plan: NetworkPlan) -> nn.Module:
    network = _bare(plan)
    blocks = _network_blocks(network, plan)
    width = getattr(network.config, "hidden_size", None)
    for index, place in enumerate(plan.layout):
        if place.role == "emulator":
            blocks[index] = apply_linears(blocks[index], plan.linears[place.slot], width)
    return network


def _network_blocks(network: nn.Module, plan: NetworkPlan) -> BlockList:
    try:
        found = network.get_submodule(plan.blocks_path)
    except AttributeError as error:
        raise ModelError(f"network plan: {type(network).__name__} has no {plan.blocks_path!r}") from error
    if not isinstance(found, BlockList):
        raise ModelError(f"network plan: {plan.blocks_path!r} isn't a list of blocks")
    return found


def place_blocks(network: nn.Module, plan: NetworkPlan) -> list[nn.Module]:
    """The network's blocks in forward order, one for each place of the plan."""
    return list(_network_blocks(network, plan))


def build_network(plan: NetworkPlan) -> nn.Module:
    """The network of ``plan`` with parameters on the meta device and real non-persistent buffers (rotary tables...)."""
    _meta_network(plan)  # refuses a plan whose buffers would fill the memory
    with init_empty_weights(include_buffers=False):
        network = _skeleton(plan)
    _tie(network, plan)
    return network


def _meta_network(plan: NetworkPlan) -> nn.Module:
    """The network of ``plan`` without any memory; ``ModelError`` if the buffers that it makes itself are too large.

    Rotary tables and masks are no tensors of a bundle: their sizes follow from the config, which comes from outside.
    """
    with torch.device("meta"):
        network = _skeleton(plan)
    _tie(network, plan)
    check_head(network, plan.blocks_path, plan.head)
    stored = set(network.state_dict())
    made = sum(t.numel() * t.element_size() for name, t in network.named_buffers() if name not in stored)
    if made > MAX_BUFFER_BYTES:
        raise ModelError(
            f"network plan: the config makes {made} bytes of buffers, at most {MAX_BUFFER_BYTES} are taken; "
            "it asks for too many positions or blocks"
        )
    return network


def expected_tensors(plan: NetworkPlan) -> dict[str, TensorSpec]:
    """Slot name to shape and dtype of every tensor that the network of ``plan`` needs; takes no memory for them."""
    network = _meta_network(plan)
    specs = {
        slot_of_outside(name, plan.head): TensorSpec(tuple(t.shape))
        for name, t in outside_blocks(network, plan.blocks_path).items()
    }
    for block, place in zip(place_blocks(network, plan), plan.layout, strict=True):
        exact = _exact_dtypes(block)
        for name, tensor in block.state_dict().items():
            specs[place.prefix + name] = TensorSpec(tuple(tensor.shape), exact.get(name))
    return specs


def _exact_dtypes(block: nn.Module) -> dict[str, torch.dtype]:
    """Tensors whose dtype is part of their meaning: packed weights, their scales, and whatever isn't floating."""
    exact = {n: t.dtype for n, t in block.state_dict().items() if not t.is_floating_point()}
    for path, module in block.named_modules():
        if isinstance(module, QuantizedLinear):
            exact[f"{path}.scales"] = module.scales.dtype
    return exact


def shared_tensors(model: nn.Module, blocks: Blocks, head: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Slot name to the full model's tensors outside the blocks (live references, tied ones once).

    ``adapter.head.{path}`` for those of the ``head``, else ``shared.{path}``.
    """
    return {slot_of_outside(name, head): t.detach() for name, t in outside_blocks(model, blocks.path).items()}


def fill_network(network: nn.Module, plan: NetworkPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put ``tensors`` into a network from :func:`build_network`, without copying them; strict.

    Afterwards only adapter parameters require gradients and the network is in eval mode. ``ModelError`` names what is
    missing, unknown or of the wrong shape. A slot that is used at two places becomes the same parameters at both.
    """
    expected = expected_tensors(plan)
    _check_fit(expected, tensors)
    cache: dict[str, torch.Tensor] = {}

    def take(name: str) -> torch.Tensor:
        if name not in cache:
            tensor = tensors[name]
            floating = tensor.is_floating_point() and expected[name].dtype is None
            cache[name] = nn.Parameter(tensor, requires_grad=False) if floating else tensor
        return cache[name]

    for block, place in zip(place_blocks(network, plan), plan.layout, strict=True):
        block.load_state_dict({n: take(place.prefix + n) for n in block.state_dict()}, strict=True, assign=True)
    first = {id(tensor): name for name, tensor in outside_blocks(network, plan.blocks_path).items()}
    every = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    # A tied tensor goes to all its names, since tying again may start from any of them.
    named = {name: take(slot_of_outside(first[id(tensor)], plan.head)) for name, tensor in every if id(tensor) in first}
    network.load_state_dict(named, strict=False, assign=True)
    _tie(network, plan)
    left = [name for name, p in network.named_parameters() if p.is_meta]
    if left:
        raise ModelError(f"network plan: these parameters got no values: {left[:3]}")
    network.requires_grad_(False)
    for parameter in adapter_parameters(network, plan).values():
        parameter.requires_grad_(True)
    network.eval()


def _check_fit(expected: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor]) -> None:
    for what, names in (("missing", expected.keys() - tensors.keys()), ("unknown", tensors.keys() - expected.keys())):
        if names:
            raise ModelError(f"{what} tensors for the network, for example {sorted(names)[:3]} ({len(names)} in all)")
    for name, spec in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != spec.shape:
            raise ModelError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the network needs {spec.shape}")
        if spec.dtype is not None and tensor.dtype != spec.dtype:
            raise ModelError(f"tensor {name!r} has dtype {tensor.dtype}, the network needs {spec.dtype}")


def _tie(network: Any, plan: NetworkPlan) -> None:
    if not hasattr(network, "tie_weights"):
        return
    head = network.get_output_embeddings() if _head_apart(plan) else None
    own = None if head is None else head.weight
    network.tie_weights()
    if head is not None:
        head.weight = own


def adapter_parameters(network: nn.Module, plan: NetworkPlan) -> dict[str, nn.Parameter]:
    """Slot name to live parameter for every adapter tensor of the network, the head's behind those of the blocks."""
    blocks = place_blocks(network, plan)
    inside = {
        f"adapter.{slot}.{name}": parameter
        for slot, index in plan.adapter_places().items()
        for name, parameter in blocks[index].named_parameters()
    }
    return inside | head_parameters(network, plan.head)
