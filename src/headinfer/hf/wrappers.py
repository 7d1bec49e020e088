"""Finds the transformers model in a wrapper of torch.compile() or peft, whose calls run the forward of that model."""

from __future__ import annotations

from typing import Any

from headinfer.errors import UnsupportedError
from headinfer.hf.compat import PreTrainedModel

__all__ = ["unwrapped"]


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model in a wrapper, or the model itself. Adapters in it stay active.

    Raises:
        UnsupportedError: it is another wrapper, or no model of transformers.
    """
    while not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        compiled = getattr(model, "_orig_mod", None)  # of torch.compile()
        if compiled is not None:
            model = compiled
        elif callable(getattr(model, "get_base_model", None)):  # of peft
            adapter = getattr(model, "active_peft_config", None)
            if getattr(adapter, "is_prompt_learning", False):
                raise UnsupportedError(
                    f"{name} adds virtual tokens ({type(adapter).__name__}), which it keeps in a cache or embeddings "
                    "of its own: headinfer serves adapters that change weights, such as LoRA"
                )
            model = model.get_base_model()
        else:
            raise UnsupportedError(
                f"{name} is no model of transformers: if it wraps one, pass that one, a PreTrainedModel"
            )
    return model
