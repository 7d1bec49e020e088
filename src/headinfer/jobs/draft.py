"""A draft model, which guesses what another model will write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from headinfer.errors import UsageError
from headinfer.hf.compat import PreTrainedModel
from headinfer.hf.enable import enable
from headinfer.hf.models import ModelSource, resolve
from headinfer.plan.guesses import MOST_GUESSES

__all__ = ["check_draft", "loaded_draft"]


def check_draft(name: str | None, source: ModelSource, tokenizer: Any) -> ModelSource | None:
    """Check that a draft model can guess for a model.

    Args:
        name: where the draft model is; None for none.
        source: the model.
        tokenizer: its tokenizer.

    Returns:
        The draft model; None for none.

    Raises:
        UsageError: there is no such model, or it has another vocabulary.
    """
    if name is None:
        return None
    draft = resolve(name)
    sizes = [one.config.get_text_config(decoder=True).vocab_size for one in (draft, source)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the draft model {name} has a vocabulary of {sizes[0]:,} tokens, and the model one of {sizes[1]:,}: "
            "choose a smaller model of the same family"
        )
    if not source.is_random and draft.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"the draft model {name} has another tokenizer than the model: choose a smaller model of the same family"
        )
    return draft


@contextmanager
def loaded_draft(draft: ModelSource | None, dtype: torch.dtype, device: str) -> Iterator[PreTrainedModel | None]:
    """Load a draft model and enable headinfer on it within the block; None for none.

    Its KV of the text is in host memory too. It guesses at most as many tokens as a decode step verifies.
    """
    if draft is None:
        yield None
        return
    model = draft.load(dtype=dtype, device=device, seed=0)
    settings = model.generation_config
    settings.num_assistant_tokens = min(settings.num_assistant_tokens or MOST_GUESSES, MOST_GUESSES)
    with enable(model, guesses="off"):
        yield model
