"""Guesses by prompt lookup: the tokens are those without guesses, and guesses that do not pay are not made."""

import random

import pytest
import torch
from families import tiny_model
from generation import make_model, prompt
from transformers import StoppingCriteria

import headinfer
from headinfer import HeadCache
from headinfer.errors import UnsupportedError, UsageError
from headinfer.hf.compat import EosTokenCriteria, MaxLengthCriteria
from headinfer.hf.draws import Draws
from headinfer.hf.guesses import Ends, GuessCounts, PromptLookup
from headinfer.hf.models import resolve
from headinfer.hf.ngrams import KEY_TOKENS, LONGEST_MATCH, NgramIndex
from headinfer.jobs import generate as generation
from headinfer.jobs.ask import AskJob, ask, prepare_ask
from headinfer.jobs.read import ReadJob, prepare_read, read
from headinfer.jobs.sampling import Sampling
from headinfer.plan.guesses import MOST_GUESSES, best_width, tokens_per_pass

# -- the index -------------------------------------------------------------------------------------------------


def scanned(ids, tokens):
    """The continuation by a scan of the whole text."""
    best = end = 0
    for place in range(len(ids) - 1, KEY_TOKENS - 1, -1):
        length = 0
        while length < min(LONGEST_MATCH, place) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length > best:
            best, end = length, place
    if best < KEY_TOKENS:
        return 0, []
    found = ids[end : end + tokens]
    for place in range(tokens - len(found)):
        found.append(found[place])
    return best, found


def test_the_index_finds_what_a_scan_finds():
    chosen = random.Random(1)
    matches = 0
    for _ in range(200):
        vocab = chosen.choice([1, 2, 3, 6, 2**31 - 1])
        ids = [chosen.randrange(vocab) for _ in range(chosen.randrange(50))]
        index = NgramIndex(torch.tensor(ids, dtype=torch.long))
        for _ in range(5):
            found = index.continuation(7)
            assert found == scanned(ids, 7)
            matches += found[0] > KEY_TOKENS
            new = [chosen.randrange(vocab) for _ in range(chosen.randrange(1, 4))]
            ids += new
            index.append(new)
            assert len(index) == len(ids)
    assert matches > 100


def test_the_index_takes_16_bytes_a_token():
    index = NgramIndex(torch.randint(0, 10**5, (10_000,), generator=torch.Generator().manual_seed(0)))
    held = sum(part.nbytes for part in vars(index).values() if isinstance(part, torch.Tensor))
    assert held <= 16 * 10_000


# -- how many guesses --------------------------------------------------------------------------------------------


def test_the_width_with_the_most_tokens_per_second():
    assert tokens_per_pass(0, 0.3) == 1
    assert tokens_per_pass(15, 1.0) == 16
    assert tokens_per_pass(2, 0.5) == pytest.approx(1.75)
    free = [1.0] * 16
    assert best_width(free, 0.9) == 15
    assert best_width(free, 0.04) == 0, "5 % more tokens must be expected"
    assert best_width([1 + width for width in range(16)], 0.99) == 0
    steep = [1 + 0.2 * width for width in range(16)]
    for chance in (0.3, 0.6, 0.9):
        gains = [tokens_per_pass(width, chance) / cost for width, cost in enumerate(steep)]
        assert best_width(steep, chance) == (gains.index(max(gains)) if max(gains) >= 1.05 else 0)


def lookup(costs, most=MOST_GUESSES, ends=None):
    counts = GuessCounts()
    text = PromptLookup(lambda: 10**9, most=most, costs=costs, ends=ends or Ends(), max_length=10**9, counts=counts)
    return text, counts


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_guesses_that_are_always_wrong_cost_at_most_5_percent(slope):
    """The text repeats all of its n-grams, but the model never writes what followed before."""
    costs = [1 + slope * width for width in range(16)]
    candidates, counts = lookup(costs)
    chosen = random.Random(3)
    ids = [chosen.randrange(40) for _ in range(4000)]
    spent = 0.0
    passes = 600
    for _ in range(passes):
        text = torch.tensor([ids])
        guessed = candidates.get_candidates(text)[0].shape[1] - len(ids)
        spent += costs[guessed]
        candidates.update_candidate_strategy(text, None, 0)
        ids.append(chosen.randrange(40))
    assert counts.passes == passes
    assert (counts.guessed > 0) == (slope < 1), "at a cost of 1 they never pay"
    assert counts.accepted == 0
    assert spent <= passes / 0.95


def test_right_guesses_make_longer_ones():
    """At a cost at which the first estimate allows few guesses, right ones lead to more."""
    candidates, counts = lookup([1 + 0.12 * width for width in range(16)])
    ids = list(range(500)) + list(range(100))
    widths = []
    while len(ids) < 900:
        text = torch.tensor([ids])
        guessed = candidates.get_candidates(text)[0][0, len(ids) :].tolist()
        assert guessed == [(ids[-1] + 1 + step) % 500 for step in range(len(guessed))]
        candidates.update_candidate_strategy(text, None, len(guessed))
        widths.append(len(guessed))
        ids += [*guessed, (ids[-1] + len(guessed) + 1) % 500]
    assert max(widths[-5:]) > widths[0] >= 1
    assert counts.accepted == counts.guessed == sum(widths)
    assert counts.tokens_per_pass == pytest.approx(1 + sum(widths) / len(widths))


def test_a_guess_that_ends_the_answer_is_left_out():
    candidates, _ = lookup(None, ends=Ends([EosTokenCriteria(5), MaxLengthCriteria(10**9)]))
    text = torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2, 3]])
    assert candidates.get_candidates(text)[0].tolist() == [[1, 2, 3, 4, 5, 6, 1, 2, 3, 4]]


# -- generate() --------------------------------------------------------------------------------------------------

NEW_TOKENS = 40


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def repeated():
    """A text twice, which the model continues with repetitions."""
    return torch.cat([prompt(tokens=300)["input_ids"] % 128] * 2, dim=1)


@pytest.fixture(scope="module")
def wanted(model, repeated):
    return model.generate(repeated, max_new_tokens=NEW_TOKENS, do_sample=False)


@pytest.mark.parametrize("transport", ["in_place", "eager", "lazy"])
@pytest.mark.parametrize("guesses", ["off", "auto", 1, 15])
def test_greedy_tokens_are_those_without_guesses(model, repeated, wanted, guesses, transport):
    """Also on a cache that holds a part of the prompt, on its fork, and on one that holds all of it."""
    with headinfer.enable(model, guesses=guesses, transport=transport, tile_tokens=100) as enabled:
        for held in (0, 1, 599, 600):
            cache = enabled.new_cache(700)
            if held:
                with torch.no_grad():
                    model(repeated[:, :held], past_key_values=cache)
                cache = cache.fork()
            found = model.generate(repeated, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert torch.equal(found, wanted)
            assert cache.get_seq_length() == wanted.shape[1] - 1
            counts = enabled.guess_counts
            assert enabled.guesses_off_reason == ""
            if guesses == "off":
                assert counts == GuessCounts()
                continue
            assert counts.passes + counts.accepted >= NEW_TOKENS
            assert counts.tokens_per_pass > (1.2 if guesses == 1 else 2)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen2"])
@pytest.mark.parametrize("guesses", ["auto", 4])
def test_windows_sinks_and_padding(family, guesses):
    """A cache whose sliding windows have dropped tokens before guesses began gives the same tokens too."""
    tiny = make_model(family) if family == "gemma3_text" else tiny_model(family)
    ids = torch.cat([prompt(tokens=150)["input_ids"] % 100] * 2, dim=1)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = tiny.generate(ids, **options)
    with headinfer.enable(tiny, guesses=guesses) as enabled:
        assert torch.equal(tiny.generate(ids, **options), expected)
        cache = enabled.new_cache(400)
        with torch.no_grad():
            tiny(ids[:, :200], attention_mask=mask[:, :200], past_key_values=cache)
        assert torch.equal(tiny.generate(ids, past_key_values=cache, **options), expected)
        assert enabled.guess_counts.passes


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.2, "top_k": 20}, {"temperature": 0.05, "top_p": 0.9, "repetition_penalty": 1.05}]
)
def test_samples_are_those_without_guesses(model, repeated, options):
    """The draw of each position depends on the seed alone, so that equal samples show an equal distribution."""
    accepted = 0
    for seed in (0, 1):
        samples = []
        for guesses in ("off", "auto", 15):
            with headinfer.enable(model, guesses=guesses) as enabled:
                options |= {"max_new_tokens": NEW_TOKENS, "do_sample": True, "sampling_seed": seed}
                samples.append(model.generate(repeated, **options))
                accepted += enabled.guess_counts.accepted
        assert all(torch.equal(sample, samples[0]) for sample in samples)
    assert accepted or options.get("top_p") is None, "at a low temperature it repeats itself"


def test_draws_have_the_distribution():
    scores = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log()
    ids = torch.zeros(1, 4000, dtype=torch.long)
    draws = Draws(7, 0)
    chosen = [int(draws(ids[:, :tokens], scores).argmax()) for tokens in range(4000)]
    shares = torch.bincount(torch.tensor(chosen), minlength=4) / 4000
    torch.testing.assert_close(shares, scores[0].exp(), atol=0.03, rtol=0)
    assert shares[1] == 0
    other = [int(Draws(8, 0)(ids[:, :tokens], scores).argmax()) for tokens in range(50)]
    assert other != chosen[:50]


def test_each_sequence_has_its_own_draws(model, repeated):
    with headinfer.enable(model) as enabled:
        rows = model.generate(
            repeated, max_new_tokens=8, do_sample=True, sampling_seed=3, num_return_sequences=3, pad_token_id=0
        )
        again = model.generate(repeated, max_new_tokens=8, do_sample=True, sampling_seed=3)
        assert "several sequences" not in enabled.guesses_off_reason
    assert len({tuple(row.tolist()) for row in rows}) == 3
    assert torch.equal(rows[:1], again)
    with headinfer.enable(model), pytest.raises(UsageError, match="sampling_seed is -1"):
        model.generate(repeated, do_sample=True, sampling_seed=-1)


def test_the_end_of_a_text_ends_an_answer_within_guesses(model, repeated, wanted):
    answer = wanted[0, repeated.shape[1] :].tolist()
    for end in {answer[5], answer[17], answer[-1]}:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        expected = model.generate(repeated, **options)
        with headinfer.enable(model, guesses=15):
            assert torch.equal(model.generate(repeated, **options), expected)


def test_what_guesses_cannot_serve_goes_on_without_them(model, repeated):
    class Counts(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    cases = [
        ({"input_ids": repeated.repeat(2, 1)}, "a batch"),
        ({"input_ids": repeated, "num_beams": 2}, "beams"),
        ({"input_ids": repeated, "return_dict_in_generate": True}, "outputs of each step"),
        ({"input_ids": repeated, "stopping_criteria": [Counts()]}, "stopping criterion"),
        ({"input_ids": repeated, "prompt_lookup_num_tokens": 3}, "another way of decoding"),
        ({"input_ids": repeated, "use_cache": False}, "need a cache"),
    ]
    with headinfer.enable(model, guesses=5) as enabled:
        for given, reason in cases:
            model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert reason in enabled.guesses_off_reason, given
        cache = enabled.new_cache()
        with torch.no_grad():
            model(repeated[:, :500], past_key_values=cache)
        new_ids = {"input_ids": repeated[:, 500:], "attention_mask": torch.ones_like(repeated)}
        model.generate(**new_ids, past_key_values=cache.fork(), max_new_tokens=3, do_sample=False)
        assert "ids of all tokens" in enabled.guesses_off_reason
        with pytest.raises(UnsupportedError, match="give generate\\(\\) the ids of all tokens"):
            model.generate(**new_ids, past_key_values=cache, max_new_tokens=3, prompt_lookup_num_tokens=2)
        model.generate(repeated, max_new_tokens=3, do_sample=False)
        assert enabled.guesses_off_reason == ""
    for wrong in (0, 16, "on", True, 2.5, None):
        with pytest.raises(UsageError, match=r"guesses is .*: choose auto, off, or a number from 1 to 15"):
            headinfer.enable(model, guesses=wrong)


def test_the_models_methods_are_restored(model):
    names = ("_get_candidate_generator", "_get_stopping_criteria", "_get_logits_processor")
    with headinfer.enable(model):
        assert all(name in vars(model) for name in names)
    assert not any(name in vars(model) for name in names)


@pytest.mark.parametrize("held", [0, 300])
def test_a_draft_model(model, repeated, wanted, held):
    """Its guesses are verified on an empty cache and on one that holds tokens."""
    draft = tiny_model("llama")
    draft.generation_config.num_assistant_tokens = 5
    with headinfer.enable(draft, guesses="off"), headinfer.enable(model) as enabled:
        cache = enabled.new_cache(700)
        if held:
            with torch.no_grad():
                model(repeated[:, :held], past_key_values=cache)
        found = model.generate(
            repeated, past_key_values=cache, assistant_model=draft, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert torch.equal(found, wanted)
        assert enabled.guess_counts.accepted_share > 0.9


# -- the commands ------------------------------------------------------------------------------------------------

DOCUMENT = "It was a dark night. The magic number for lodata is 31313. All slept. " * 12
QUESTION = "What is the magic number for lodata?"


@pytest.mark.parametrize("sampling", [{}, {"stop": ("13",)}, {"temperature": 0.7, "seed": 5}], ids=str)
def test_answers_and_sessions_are_those_without_guesses(tmp_path, sampling):
    texts = set()
    held = []
    for guesses in ("off", "auto", 15):
        job = ReadJob(model="embedded", document=DOCUMENT, name=f"s-{guesses}", root=tmp_path, dtype="float32")
        read(prepare_read(job))
        chosen = Sampling(**sampling, guesses=guesses)
        questions = [QUESTION, QUESTION]
        asked = AskJob(f"s-{guesses}", tmp_path, questions, max_new_tokens=16, keep=True, sampling=chosen)
        summaries = ask(prepare_ask(asked), on_text=lambda text: None)
        texts.add(tuple(one.text for one in summaries))
        assert [bool(one.guess_counts.passes) for one in summaries] == [guesses != "off"] * 2
        held.append(HeadCache.load(tmp_path / f"s-{guesses}", _embedded()).token_ids)
    assert len(texts) == 1
    assert all(torch.equal(ids, held[0]) for ids in held)


def _embedded():
    return resolve("embedded").load(dtype=torch.float32, device="cpu", seed=0)


def test_a_draft_model_must_have_the_tokens_of_the_model():
    job = generation.Job(model="embedded", prompt=QUESTION, sampling=Sampling(draft="random:tiny-llama?layers=2"))
    with pytest.raises(UsageError, match=r"has a vocabulary of [0-9]* tokens, and the model one of"):
        generation.prepare(job)
    job = generation.Job(model="embedded", prompt=QUESTION, sampling=Sampling(draft="embedded", guesses=3))
    with pytest.raises(UsageError, match="--draft guesses with a model"):
        generation.prepare(job)


def test_a_draft_model_of_the_command():
    job = {"model": "embedded", "document": DOCUMENT, "prompt": QUESTION, "max_new_tokens": 12, "dtype": "float32"}
    plain, drafted = (
        generation.run(generation.prepare(generation.Job(**job, sampling=Sampling(draft=draft))), on_text=print)
        for draft in (None, "embedded")
    )
    assert plain.token_ids == drafted.token_ids
    assert drafted.guess_counts.accepted > 0
    assert "were right" in drafted.guesses_text
