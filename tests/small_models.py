"""Small models of Hugging Face, in folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from swarmtrain.run import RunFile, parse_run

_ROTARY = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY, "tie_word_embeddings": False},
    "qwen3": {**_ROTARY, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 288, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    # Logits and scores are capped, every second layer sees a window, norms begin at 0, the head is tied.
    "gemma2": {**_ROTARY, "head_dim": 8, "sliding_window": 32, "final_logit_softcapping": 2.0},
    # Both halves of a block read its input, a part of each head is turned, the head has another name.
    "gpt_neox": {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
"""Configurations: three families that are listed, tied and untied, and two that are not, unlike each other and them."""

_EXPERTS = {**_ROTARY, "num_hidden_layers": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False}
_DEEPSEEK = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "olmoe": {**_EXPERTS, "num_experts": 4},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    "gpt_oss": {**_EXPERTS, "head_dim": 8, "num_local_experts": 4, "sliding_window": 32},
    "granitemoe": {**_EXPERTS, "num_local_experts": 4},
}
"""Configurations of mixtures of experts, whose experts are one tensor."""


def saved(family: str, folder: Path, **changes: Any) -> Any:
    """Write a model of `family`, with random weights, into `folder`; return transformers' model."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **(CONFIGS | MIXTURES).get(family, {}) | changes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Norms are not all the same, and logits not too small to be capped.
            parameter.data += torch.randn_like(parameter) * (0.05 if "norm" in name else 0.02)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model.eval()


def run_of(base: str, model: str = "", **tables: str) -> RunFile:
    """Return a run file that trains the model in folder `base`, with more keys of `[model]` and other tables."""
    tokenizer = "" if "tokenizer" in model else 'tokenizer = "bytes"\n'
    sections = "".join(f"[{name}]\n{keys}\n" for name, keys in tables.items() if name != "run")
    return parse_run(
        f"[run]\ntotal_tokens = 100_000\n{tables.get('run', '')}\n"
        f'[model]\nsource = "huggingface"\nbase = "{base}"\ncontext_tokens = 24\n{tokenizer}{model}\n{sections}',
        "run.toml",
    )
