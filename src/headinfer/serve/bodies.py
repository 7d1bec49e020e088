"""The JSON bodies of requests: reading and checking them, and the fields that all of them have.

A field that is unknown or not supported is an error, since ignoring it would give another answer than was asked for.
Fields that have only one supported value may have that value, as clients send it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from headinfer.jobs.sampling import Sampling
from headinfer.serve.http_errors import HttpError
from headinfer.utils.values import real_number, shown

__all__ = ["Body", "ChatTool", "FunctionTool", "GenerationBody", "StreamOptions", "Zero", "json_body", "session_of"]

B = TypeVar("B", bound=BaseModel)
Zero = Annotated[float, Field(ge=0, le=0)]
"""A number that can only be 0, as clients send it for what is not supported."""

# What a value must be, by the type of pydantic's error.
_NEEDED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_too_long": "of at most {max_length} characters",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_long": "of at most {max_length} entries",
    "too_short": "a list that is not empty",
    "union_tag_invalid": "one of {expected_tags}",
}


class Body(BaseModel):
    """An object of a request. Other fields than its own are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _temperature(value: float) -> float:
    return real_number(value, "temperature", low=0.001, high=100, allows_zero=True)


class StreamOptions(Body):
    """How a stream is sent.

    Attributes:
        include_usage: whether the last chunk has the numbers of tokens.
        include_obfuscation: OpenAI's padding of chunks; it is not supported.
    """

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class FunctionTool(Body):
    """A function that the model may call: its name, what it does, and the JSON Schema of its arguments."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class ChatTool(Body):
    """A tool, as chat templates take it."""

    type: Literal["function"]
    function: FunctionTool


class GenerationBody(Body):
    """The fields of every request for an answer.

    Attributes:
        model: the name of the model that is served, if it is given.
        stream: whether the answer is sent as it is generated.
        metadata: the client's own texts. "session" names a document or session.
        where: whether the answer says where in the document it came from.
        others: as in `Sampling`, or as OpenAI has them.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, AfterValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    where: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    def sampling(self, default: Sampling) -> Sampling:
        """Return how tokens are chosen, with the server's options for what the request leaves open."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        fields: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": None if stop is None else tuple(stop),
            "ignore_eos": self.ignore_eos,
            "seed": self.seed,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        chosen = dataclasses.replace(default, **given)
        if "" in chosen.stop:
            raise HttpError(400, "stop has an empty text: give the text that ends an answer", param="stop")
        if not chosen.temperature:  # without samples these have no effect, and clients send them all the same
            chosen = dataclasses.replace(chosen, top_k=None, top_p=None, min_p=None)
        return chosen


def json_body(kind: type[B]) -> Callable[[Request], Awaitable[B]]:
    """Return a dependency of FastAPI that reads the JSON body of a request.

    It raises HttpError 400 with one sentence and the name of the field if the body is not such an object.
    """

    async def read(request: Request) -> B:
        media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media != "application/json":  # what a form of another site cannot send without asking
            raise HttpError(415, "the request is not JSON: send it with Content-Type: application/json")
        try:
            value = from_json(await request.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HttpError(400, f"the request is not JSON ({error}): send a JSON object") from None
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise _mistake(value, error.errors(include_url=False)) from None

    return read


def _mistake(body: Any, details: Sequence[ErrorDetails]) -> HttpError:
    """Return what is wrong with a body as one sentence.

    Of the alternatives of a field, the one that fits best counts: that whose mistake is deepest.
    """
    named = [(_path(body, one), one) for one in details]
    path, detail = max(named, key=lambda pair: (pair[0].count(".") + pair[0].count("["), _rank(pair[1])))
    if not path:
        return HttpError(400, "the request is no JSON object: send one")
    kind = detail["type"]
    if kind == "missing":
        message = f"{path} is missing: give it"
    elif kind == "extra_forbidden":
        message = f"{path} is unknown or not supported: leave it out"
    elif kind == "union_tag_not_found":
        message = f"{path} has no {detail['ctx']['discriminator']}: give it".replace("'", "")
    elif kind == "value_error":
        message = str(detail["ctx"]["error"])
    else:
        alternatives = [one for other, one in named if other == path and _rank(one) == _rank(detail)]
        needed = dict.fromkeys(_needed(one) for one in alternatives)
        value = detail["ctx"]["tag"] if kind == "union_tag_invalid" else detail["input"]
        what = f"{path} is {shown(value)}" if kind != "too_long" else path
        message = f"{what}: it must be {' or '.join(needed)}"
    return HttpError(400, message, param=path)


def _rank(detail: ErrorDetails) -> int:
    """Return how much a mistake tells: a wrong value most, then a wrong type, then a field that is missing."""
    return 0 if detail["type"] == "missing" else 1 if detail["type"].endswith("_type") else 2


def _needed(detail: ErrorDetails) -> str:
    template = _NEEDED.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else f"valid ({detail['msg']})"


def _path(body: Any, detail: ErrorDetails) -> str:
    """Return the name of a field as a client writes it, such as messages[0].content.

    pydantic names the alternatives of a field too. Those are not in the body.
    """
    value = body
    path = ""
    for step in detail["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
            value = value[step]
        elif isinstance(value, Mapping) and step in value:
            path += f".{step}"
            value = value[step]
    if detail["type"] == "missing":
        path += f".{detail['loc'][-1]}"
    return path.removeprefix(".")[:200]


def session_of(named: Mapping[str, str] | None, file_ids: Sequence[str] = ()) -> str | None:
    """Return the session that a request is about: of its metadata, or of the files in its messages.

    Raises:
        HttpError: it names several.
    """
    in_metadata = (named or {}).get("session")
    names = list(dict.fromkeys([*([in_metadata] if in_metadata is not None else []), *file_ids]))
    if len(names) > 1:
        raise HttpError(400, "the request names several documents, and an answer is about one: name one of them")
    return names[0] if names else None
