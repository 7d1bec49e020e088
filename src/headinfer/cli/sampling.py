"""The options that choose tokens and end answers, in one place for all commands that generate."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from headinfer.cli.options import SAMPLING_PANEL, guesses_option, number, real, text_option
from headinfer.jobs.sampling import Sampling

__all__ = ["System", "takes_sampling"]

System = Annotated[
    str, text_option("--system", "The system prompt, which the model's chat template writes before everything else.")
]


def _sampling(
    # The bounds keep logits in the range of float32.
    temperature: Annotated[
        float,
        real(
            "--temperature",
            "0 decodes greedily. A value above 0 samples.",
            low=0.001,
            high=100,
            allows_zero=True,
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        number(
            "--top-k",
            "Sample from the k most likely tokens.",
            show_default="the model's",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        real(
            "--top-p",
            "Sample from the fewest tokens whose probabilities sum to p.",
            low=0,
            high=1,
            show_default="the model's",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        real(
            "--min-p",
            "Sample from the tokens that are at least this number times as likely as the most likely one.",
            low=0,
            high=1,
            show_default="the model's",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        real(
            "--repetition-penalty",
            "A value above 1 discourages repetition.",
            low=0.01,
            high=100,
            show_default="the model's",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        text_option(
            "--stop",
            "Text that ends an answer and is not part of it. May be given more than once.",
            show_default=False,
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Never choose a token that ends an answer, so that it has --max-new-tokens tokens unless it is "
            "stopped.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = False,
    seed: Annotated[
        int,
        number(
            "--seed",
            "Seed of sampling, and of random weights unless a session has their seed.",
            low=0,
            high=2**63 - 1,
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = 0,
    guesses: Annotated[
        Any,
        guesses_option(
            "Guess that text repeats what came before, and verify several tokens in one pass: auto (if it pays), off, "
            "or the most guesses of a pass.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = "auto",
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            help="A smaller model of the same family, whose guesses the model verifies. It reads the whole text too. "
            "It does not serve several questions that are answered together.",
            metavar="MODEL",
            show_default="none",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None,
) -> Sampling:
    return Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        seed=seed,
        guesses=guesses,
        draft=draft,
    )


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options above. It gets them as one Sampling, in its parameter `sampling`."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "sampling"]
    shared = inspect.signature(_sampling, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        sampling = _sampling(**{name: given.pop(name) for name in shared})
        command(**given, sampling=sampling)

    vars(run)["__signature__"] = signature.replace(parameters=[*own, *shared.values()])
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared.values())}
    return run
