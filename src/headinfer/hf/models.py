"""Finds and loads the model that a MODEL argument names.

    FOLDER, HUB_NAME            a model that transformers can load
    embedded                    the small model that ships with headinfer (src/headinfer/embedded)
    random:NAME?layers=2&...    a model with the shape of a well-known one and random weights

Random models run any shape on any machine without a download. The query changes whole numbers of the config, by the
names of _SHORT_NAMES or those of the config. Their tokenizer has 256 bytes and 3 special tokens, and their vocabulary
has this size unless `vocab=` sets another one. The weights are drawn on the device that computes.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_accelerate_available
from transformers.utils.logging import disable_progress_bar

from headinfer.embedded import EMBEDDED, embedded_model
from headinfer.errors import UnsupportedError, UsageError, is_out_of_memory
from headinfer.hf.cache import HeadCache
from headinfer.hf.compat import PreTrainedConfig, PreTrainedModel, generation_config_path
from headinfer.hf.defaults import decode_one_text, leave_out_outputs
from headinfer.plan.families import check_family
from headinfer.plan.model_shape import MOST_LAYERS, ModelShape
from headinfer.utils.values import shown

__all__ = ["RANDOM_CONFIGS", "ModelSource", "byte_tokenizer", "first_line", "load_whole", "resolve"]

_LONGEST_REASON = 300  # characters
_MOST_TRIAL_TOKENS = 2**22  # of the vocabulary of a trial model
_FIRST_NUMBER = re.compile(r"(.*?\.)(\d+)\.")  # of the name of a weight: the index of a layer
_PREFIX = "random:"
_SHORT_NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, context: int, **more: Any
) -> dict[str, Any]:
    """Return fields of a config that names them as Llama does, and further fields."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        **more,
    }


RANDOM_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", _llama(32, 4096, 11008, 32, 32, 4096)),
    "llama-3-8b": ("llama", _llama(32, 4096, 14336, 32, 8, 8192)),
    "llama-3-70b": ("llama", _llama(80, 8192, 28672, 64, 8, 8192)),
    "mistral-7b": ("mistral", _llama(32, 4096, 14336, 32, 8, 32768, sliding_window=None)),
    "qwen2-7b": ("qwen2", _llama(28, 3584, 18944, 28, 4, 131072)),
    "qwen3-8b": ("qwen3", _llama(36, 4096, 12288, 32, 8, 40960, head_dim=128)),
    "gemma-3-4b": ("gemma3_text", _llama(34, 2560, 10240, 8, 4, 131072, head_dim=256, sliding_window=1024)),
    "tiny-llama": ("llama", _llama(4, 256, 512, 8, 4, 1048576)),
}
"""The shapes of random models by name: the family and the fields of its config."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer of bytes: ids 0 to 255 for bytes, then <|bos|>, <|eos|> and <|pad|>.

    Decoding the ids of any text gives the text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded. Only its config is in memory.

    Attributes:
        name: the folder, the hub name, or the MODEL argument of a random model.
        config: the config of the model.
        is_random: whether the weights are random.
    """

    name: str
    config: PreTrainedConfig
    is_random: bool

    def tokenizer(self) -> Any:
        """Load the tokenizer of the model.

        Raises:
            UsageError: the model has none that can be loaded.
        """
        if self.is_random:
            return byte_tokenizer()
        with transformers_reads(self.name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
            has_tokens = bool(tokenizer("a").input_ids)
        if not has_tokens:
            raise UsageError(
                f"the tokenizer of {self.name} has no tokens: add its tokenizer.json to the model's folder"
            )
        return tokenizer

    def check_ids(self, ids: Iterable[int]) -> None:
        """Check that the model has an embedding for each token id.

        Raises:
            UsageError: it has not.
        """
        size = int(self.config.get_text_config(decoder=True).vocab_size)
        largest = max(ids, default=0)
        if largest >= size:
            raise UsageError(
                f"the tokenizer of {self.name} gives the token id {largest:,}, and the model has {size:,} tokens: use "
                "the tokenizer that belongs to the model" + (", or a larger vocab" if self.is_random else "")
            )

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the weights in a dtype. They are counted on the meta device, without memory.

        Raises:
            UsageError: transformers cannot make a model of this config.
        """
        with transformers_reads(self.name, "config"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        return sum(math.prod(p.shape) * p.element_size() for p in model.parameters())

    def load(self, *, dtype: torch.dtype, device: str, seed: int, drawn_on: str | None = None) -> PreTrainedModel:
        """Load the model in eval mode.

        Args:
            dtype: the dtype of the weights.
            device: the device, such as "cpu" or "cuda:0". Weights go there without a copy in host memory: random ones
                are drawn on it, and stored ones are read onto it if accelerate is installed.
            seed: the seed of random weights, which depend on it and on the kind of the device alone.
            drawn_on: the device that draws random weights, one after the other; None: `device`.

        Raises:
            UsageError: the model cannot be loaded.
        """
        if self.is_random:
            torch.manual_seed(seed)
            with _drawing_on(drawn_on or device, device), torch.device(device):
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).to(device)
        else:
            disable_progress_bar()  # transformers shows one for local files too
            options = {"device_map": device} if device != "cpu" and is_accelerate_available() else {}
            model = load_whole(self.name, dtype=dtype, **options).to(device)
        leave_out_outputs(model)
        decode_one_text(model)
        return model.eval()


class _Draw(TorchDispatchMode):
    """Draws random numbers on a device, for tensors that are on another one.

    Args:
        device: the device that draws.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if not is_random or not args or not isinstance(args[0], torch.Tensor):
            return func(*args, **(kwargs or {}))
        drawn = torch.empty_like(args[0], device=self._device)
        func(drawn, *args[1:], **(kwargs or {}))
        return args[0].copy_(drawn)


def _drawing_on(device: str, target: str) -> AbstractContextManager[object]:
    """Return a context in which random weights of a model on the device `target` are drawn on another one."""
    return nullcontext() if device == target else _Draw(device)


def resolve(spec: str) -> ModelSource:
    """Read the config of the model that a MODEL argument names, and check that headinfer serves it.

    Args:
        spec: the argument: a folder, a hub name, `embedded`, or `random:NAME?layers=2&...`.

    Raises:
        UsageError: there is no such model, its config.json or generation_config.json is broken, or a field of a random
            model is out of range.
        UnsupportedError: the family or a layer of the model is not served.
    """
    if not spec.strip() or "\0" in spec:
        raise UsageError(f"{spec!r} is not the name of a model: give a folder, a hub name, or {EMBEDDED}")
    source = _random_source(spec) if spec.startswith(_PREFIX) else _stored_source(spec)
    check_family(source.config.model_type, source.config.get_text_config(decoder=True).model_type)
    try:
        ModelShape.from_config(source.config)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the config of {spec} is not that of a decoder: {error}") from error
    HeadCache(source.config)  # raises if a layer is not served
    if not source.is_random:
        _check_generation_config(source)
    return source


def _random_source(spec: str) -> ModelSource:
    """Return the model of `random:NAME?layers=2&...`."""
    name, _, query = spec.removeprefix(_PREFIX).partition("?")
    if name not in RANDOM_CONFIGS:
        raise UsageError(f"there is no built-in config {name!r}: choose one of {', '.join(RANDOM_CONFIGS)}")
    family, fields = RANDOM_CONFIGS[name]
    changes: dict[str, Any] = {"vocab_size": len(byte_tokenizer())}
    given: set[str] = set()
    for key, text in parse_qsl(query, keep_blank_values=True):
        try:
            value = int(text)
        except ValueError:
            raise UsageError(f"{spec}: {key}={text} is no whole number") from None
        if value < 1:
            raise UsageError(f"{spec}: {key}={text} must be positive")
        if value >= 2**63 or (key in ("layers", "num_hidden_layers") and value > MOST_LAYERS):
            raise UsageError(f"{spec}: {key}={shown(text)} is too large")
        field = _SHORT_NAMES.get(key, key)
        if field in given:
            raise UsageError(f"{spec}: {field} is given twice: give it once")
        given.add(field)
        changes[field] = value
    defaults = AutoConfig.for_model(family).to_dict()
    whole_numbers = {key for key, value in defaults.items() if value is None or type(value) is int}
    unknown = [key for key in changes if key not in whole_numbers]
    if unknown:
        raise UsageError(
            f"{spec}: the config of {family} has no field {unknown[0]} that is a whole number: use "
            f"{', '.join(_SHORT_NAMES)} or the name of such a field"
        )
    # The family's default ids of special tokens may be outside a small vocabulary. The tokenizer has its own.
    chosen = {**fields, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}
    hidden = chosen["hidden_size"]
    heads = chosen["num_attention_heads"]
    kv_heads = chosen["num_key_value_heads"]
    if heads % kv_heads or hidden % heads:
        raise UsageError(
            f"{spec}: hidden={hidden} must be a multiple of heads={heads}, and heads a multiple of kv_heads={kv_heads}"
        )
    head_dim = chosen.get("head_dim") or hidden // heads
    if head_dim % 2:
        raise UsageError(f"{spec}: the head_dim is {head_dim}: it must be even, for rotary embeddings")
    return ModelSource(spec, AutoConfig.for_model(family, **chosen), is_random=True)


def _stored_source(spec: str) -> ModelSource:
    """Return the model of a folder, a hub name or `embedded`."""
    if spec == EMBEDDED:
        spec = str(embedded_model())
    folder = Path(spec)
    if os.path.exists(folder) and not os.path.isfile(folder / "config.json"):
        raise UsageError(f"{spec} is not a model folder: it has no config.json")
    if os.path.exists(folder):
        with transformers_reads(spec, "config"):
            return ModelSource(spec, AutoConfig.from_pretrained(spec, trust_remote_code=False), is_random=False)
    try:
        config = AutoConfig.from_pretrained(spec, trust_remote_code=False)
    except (OSError, ValueError) as error:
        _refuse_custom_code(spec, error)
        raise UsageError(
            f"there is no model {spec!r}: it is not a local folder, and the hub does not provide it "
            f"({first_line(error)}), so try a folder, a hub name, or {_PREFIX}{next(iter(RANDOM_CONFIGS))}?layers=2"
        ) from error
    return ModelSource(spec, config, is_random=False)


def _refuse_custom_code(name: str, error: Exception) -> None:
    """Raise UnsupportedError if transformers could not load a part of a model because it needs code from its author."""
    if "trust_remote_code" in str(error):
        raise UnsupportedError(
            f"{name} needs Python code that is stored with the model, and headinfer does not run such code: choose a "
            "model of a family that transformers has itself, such as those in docs/models.md"
        ) from error


def _check_generation_config(source: ModelSource) -> None:
    """Check that transformers' generate() accepts the generation_config.json of a model, if there is one.

    A tiny model with the same vocabulary generates with it, so transformers itself says what it cannot use. If the file
    is no JSON, transformers ignores it, and with it the tokens that end an answer.

    Raises:
        UsageError: it does not. The message names the field.
    """
    path = generation_config_path(source.name)
    if path is None:
        return
    where = f"the generation_config.json of {source.name}"
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({first_line(error)}): correct or remove the file") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{where} is {shown(fields)}: it must be a JSON object; correct or remove the file")
    vocab = min(int(source.config.get_text_config(decoder=True).vocab_size), _MOST_TRIAL_TOKENS)
    failure = _trial_error(vocab, fields)
    if failure is None:
        return
    for field, value in fields.items():
        own = _trial_error(vocab, {field: value})
        if own is not None:
            raise UsageError(
                f"{where} cannot be used: {field} is {shown(value)} ({_reason(own)}); correct or remove this field"
            ) from own
    raise UsageError(f"{where} cannot be used ({_reason(failure)}): correct or remove the file") from failure


def _trial_error(vocab: int, fields: dict[str, Any]) -> Exception | None:
    """Return the error of generate() of a tiny model with a vocabulary and fields of a generation config, if any."""
    tiny = LlamaConfig(
        vocab_size=vocab,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    ids = torch.zeros(1, 2, dtype=torch.long)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(tiny).eval()
        try:
            model.generation_config = GenerationConfig.from_dict(fields)
            decode_one_text(model)
            for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 1.0}):
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=2,
                    tokenizer=byte_tokenizer(),
                    **sampling,
                )
        except Exception as error:  # of any type, and of transformers alone
            if is_out_of_memory(error):
                raise
            return error
    return None


def load_whole(name: str, **options: Any) -> PreTrainedModel:
    """Load a model with transformers, and check that every weight was in its files and that every layer is used.

    Args:
        name: the folder or the hub name of the model.
        **options: arguments of from_pretrained().

    Raises:
        UsageError: files are missing or broken, or a weight is missing or has another shape. transformers would put
            random numbers in its place. Or the files have more layers than the config, which it would leave out.
    """
    with transformers_reads(name, "weights"):
        model, found = AutoModelForCausalLM.from_pretrained(
            name, **options, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    other = {weight: (stored, wanted) for weight, stored, wanted in found["mismatched_keys"]}
    for weight, (stored, wanted) in sorted(other.items()):
        raise UsageError(
            f"the weights of {name} do not fit its config: {weight} has shape {list(stored)}, and the config needs "
            f"{list(wanted)}; download the model again, or correct config.json"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UsageError(f"the weights of {name} lack {missing[0]}{more}: download the model again")
    _check_layers(name, model, found["unexpected_keys"])
    return model


def _check_layers(name: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Check that no weight that a model does not use is that of a layer beyond its last one.

    Other weights, such as those of a part for images, may be unused.

    Raises:
        UsageError: there is such a weight.
    """
    config = model.config.get_text_config(decoder=True)
    # Some files hold layers after the last one that predict several tokens at once. transformers leaves them out.
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    layers = [found[1] for found in map(_FIRST_NUMBER.match, model.state_dict()) if found]
    for weight in sorted(unused):
        found = _FIRST_NUMBER.match(weight)
        if found and found[1] in layers and int(found[2]) >= config.num_hidden_layers + extra:
            raise UsageError(
                f"the weights of {name} have more layers than the {config.num_hidden_layers} of its config, such as "
                f"{weight}: correct config.json, or download the model again"
            )


@contextmanager
def transformers_reads(name: str, what: str) -> Iterator[None]:
    """Turn an error of transformers about a model's files into one sentence with its reason.

    Broken files cause errors of any type. Only calls of transformers belong into the `with` statement, so that no error
    of headinfer is hidden.

    Args:
        name: the folder or the hub name of the model.
        what: what is read, such as "config".

    Raises:
        UsageError: there was such an error.
        UnsupportedError: the model needs code of its author.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _refuse_custom_code(name, error)
        raise UsageError(f"the {what} of {name} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the message of an error in one line."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):  # the message of a KeyError is the key alone
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + " ..."


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
