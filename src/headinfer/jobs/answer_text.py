"""The text of an answer, which its tokens determine one after another, and which ends before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from headinfer.hf.compat import StoppingCriteria

__all__ = ["AnswerText", "StopCriterion"]

_WINDOW_TOKENS = 8
_LONGEST_CHARACTER_BYTES = 4


class AnswerText:
    """Decodes the tokens of one answer, and passes text on as soon as it is known to be part of the answer.

    Text is known if its characters are complete and it cannot be the beginning of a stop string. The answer is a
    function of its tokens: it does not matter how many of them put() takes at once. An answer ends with the token that
    completes a stop string, and its text ends before that string. A stop string that is a token of the tokenizer's
    vocabulary of added tokens, such as <|im_end|>, ends an answer too.

    transformers' TextStreamer decodes everything since the last newline again for each token. This class decodes a
    window of a few tokens: a tokenizer needs only the neighbours of a token to decode its spaces and bytes.

    Args:
        tokenizer: the model's tokenizer.
        stop: the stop strings.
        on_text: called with each part of the text.
        has_special: whether special tokens are part of the text.

    Attributes:
        text: the text that was passed on.
        token_ids: the tokens, up to the one that completes a stop string.
        stopped_by: the stop string that ended the answer; None if none did.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] = lambda text: None,
        *,
        has_special: bool = False,
    ) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = stop
        self._on_text = on_text
        self._has_special = has_special
        added = tokenizer.get_added_vocab() if stop else {}
        self._stop_tokens = {added[one]: one for one in stop if one in added}
        self._shown: list[int] = []
        self._held: list[int] = []
        self._pending = ""
        self._complete = [(0, 0)]  # after how many tokens the text is complete, and how many characters it has

    def put(self, ids: Iterable[int]) -> None:
        """Take further tokens. Those after the end of the answer are dropped."""
        for token in ids:
            if self.stopped_by is not None:
                return
            if token in self._stop_tokens:
                self._take(at_end=True)
                self._end_with(self._stop_tokens[token], len(self._pending))
            else:
                self._held.append(token)
            self.token_ids.append(token)
            self._take(at_end=False)

    def end(self) -> None:
        """Pass on the rest of the text: the answer has no further tokens."""
        self._take(at_end=True)
        self._pass_on(len(self._pending))

    def kept(self) -> tuple[list[int], str]:
        """Return the tokens that are part of the answer as a whole, and the text of the answer after them.

        Both together are the answer. There is such a text only if a stop string begins within a token.
        """
        if self.stopped_by is None:
            return self.token_ids, ""
        tokens, characters = max(known for known in self._complete if known[1] <= len(self.text))
        return self.token_ids[:tokens], self.text[characters:]

    def _take(self, *, at_end: bool) -> None:
        """Decode the tokens that are held, if their characters are complete, and look for stop strings."""
        if not self._held or self.stopped_by is not None:
            return
        before = self._decode(self._shown)
        after = self._decode(self._shown + self._held)
        text = after[len(before) :]
        if text.endswith("\ufffd") and len(self._held) < _LONGEST_CHARACTER_BYTES and not at_end:
            return  # the first bytes of a character
        self._shown = (self._shown + self._held)[-_WINDOW_TOKENS:]
        self._held = []
        self._pending += text
        self._complete.append((len(self.token_ids), len(self.text) + len(self._pending)))
        found = [(at + len(one), at, one) for one in self._stop if (at := self._pending.find(one)) >= 0]
        if found:
            _, at, one = min(found)
            self._end_with(one, at)
        else:
            self._pass_on(len(self._pending) - _begun(self._pending, self._stop))

    def _end_with(self, stop: str, at: int) -> None:
        """End the answer with a stop string, before a place in the pending text."""
        if self.stopped_by is None:
            self._pass_on(at)
            self._pending = ""
            self.stopped_by = stop

    def _pass_on(self, characters: int) -> None:
        text = self._pending[:characters]
        self._pending = self._pending[characters:]
        if text:
            self.text += text
            self._on_text(text)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not self._has_special)
        return text


def _begun(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = 0
    for one in stop:
        for length in range(min(len(one) - 1, len(text)), longest, -1):
            if text.endswith(one[:length]):
                longest = length
                break
    return longest


class StopCriterion(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of generate() whose answer has a stop string, on any number of new tokens a pass.

    Unlike transformers' stop_strings it makes no table of the whole vocabulary, and also finds a string that ends
    within the new tokens.

    Args:
        tokenizer: the model's tokenizer.
        stop: the stop strings.
        prompt_tokens: tokens of each row that precede its answer, padding included.
    """

    takes_several_tokens = True  # read by hf/guesses.py

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._seen = prompt_tokens
        self._rows: list[AnswerText] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows have ended, a bool tensor [B], after the tokens input_ids [B, T]."""
        if not self._rows:
            self._rows = [AnswerText(self._tokenizer, self._stop) for _ in range(input_ids.shape[0])]
        new_ids = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, ids in zip(self._rows, new_ids, strict=True):
            row.put(ids)
        ended = [row.stopped_by is not None for row in self._rows]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
