"""Train the small model on public text: shallow first, then grown."""

from __future__ import annotations

import torch
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from offsite_fl.config import TuneConfig
from offsite_fl.data.examples import to_examples
from offsite_fl.tuning.tune import tune
from simulations.pico.recipe import Recipe


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained LLaMA of the first stage's depth, with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.stages[0][0],
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def grow(model: LlamaForCausalLM, depth: int, seed: int = 0) -> LlamaForCausalLM:
    """A model of ``depth`` blocks that begins close to ``model``, or where it was.

    Where ``depth`` is a multiple of the blocks there are, each comes several times in a row, and what it writes into
    the stream is divided among its copies. Else new blocks go to both ends, as many to each, which write nothing yet.
    """
    shallow = model.config.num_hidden_layers
    config = LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": depth, "layer_types": None})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        grown = LlamaForCausalLM(config)
    rest = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    grown.load_state_dict(rest, strict=False)
    copies, ends = (depth // shallow, 0) if depth % shallow == 0 else (1, (depth - shallow) // 2)
    with torch.no_grad():
        for place, new in enumerate(grown.model.layers):
            inside = ends <= place < depth - ends
            if inside:
                new.load_state_dict(model.model.layers[(place - ends) // copies].state_dict())
            writers: tuple[nn.Linear, ...] = (new.self_attn.o_proj, new.mlp.down_proj)
            for linear in writers:
                linear.weight.mul_(1 / copies if inside else 0)
    return grown


def pretrain(recipe: Recipe, text: str, tokenizer: PreTrainedTokenizerBase, progress: bool = True) -> LlamaForCausalLM:
    """The finished model. Each stage goes on in the data and in the learning-rate schedule where the last one ended."""
    examples = to_examples(Dataset.from_dict({"text": [text]}), tokenizer, block_size=recipe.block_size)
    model, done = new_model(recipe, tokenizer), 0
    for depth, steps in recipe.stages:
        if depth != model.config.num_hidden_layers:
            model = grow(model, depth, recipe.seed)
        config = TuneConfig(
            max_steps=steps,
            lr=recipe.lr,
            batch_size=recipe.batch_size,
            block_size=recipe.block_size,
            weight_decay=recipe.weight_decay,
            schedule="linear",
            warmup_steps=recipe.warmup_steps,
            schedule_steps=recipe.steps,
            schedule_offset=done,
            seed=recipe.seed,
            device="cpu",  # bit for bit the same wherever it is made with the same libraries and threads
            progress=progress,
        )
        result = tune(model, dict(model.named_parameters()), examples, config, pad_id=tokenizer.pad_token_id)
        done += steps
        if progress:
            last = [loss for _, loss in result.history[-20:]]
            Console(stderr=True).print(
                f"pico: {depth} blocks, step {done} of {recipe.steps}, loss {sum(last) / len(last):.2f}, "
                f"{result.seconds:.0f} s"
            )
    model.train(False)
    return model
