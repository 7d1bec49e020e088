"""Fields of a checkpoint's configs that must not decide how headinfer runs a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headinfer.hf.compat import PreTrainedModel

__all__ = ["decode_one_text", "leave_out_outputs", "use_cache_by_default"]

# Fields of a generation config that choose another way of decoding than one token after another of one text.
_DECODING = (
    "assistant_early_exit",
    "cache_implementation",
    "constraints",
    "dola_layers",
    "force_words_ids",
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "use_mtp",
)
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


def use_cache_by_default(model: PreTrainedModel) -> Callable[[], None]:
    """Change `use_cache: false` in the configs of a model, which training often leaves there. A call can still say so.

    Returns:
        A function that restores the configs.
    """
    changed = [config for config in _configs(model) if getattr(config, "use_cache", None) is False]
    for config in changed:
        config.use_cache = True

    def restore() -> None:
        for config in changed:
            config.use_cache = False

    return restore


def leave_out_outputs(model: PreTrainedModel) -> None:
    """Change the configs of a model so that calls return hidden states and the like only if they ask for them."""
    for config in _configs(model):
        for name in _OUTPUTS:
            if getattr(config, name, None):
                setattr(config, name, False)


def decode_one_text(model: PreTrainedModel) -> None:
    """Change the generation config of a model so that generate() writes one text, one token after another.

    The commands stream one answer, so they need this. What changes probabilities, such as repetition_penalty, stays.
    """
    config = model.generation_config
    defaults = type(config)()
    for name in _DECODING:
        setattr(config, name, getattr(defaults, name, None))


def _configs(model: PreTrainedModel) -> list[Any]:
    """Return the config of a model, that of its text model, and the generation_config if it has one."""
    found = [model.config, model.config.get_text_config(decoder=True), getattr(model, "generation_config", None)]
    return [config for config in found if config is not None]
