"""Questions that are answered together get the answers that they get alone, and read the document once for all."""

import itertools

import pytest
import torch
from families import VOCAB, tiny_model

import headinfer
from headinfer.errors import UsageError
from headinfer.hf.batch import BatchQuestion, answer_all, plan_batches, split_into_batches

CHUNK_TOKENS = 64
DOCUMENT_TOKENS = 300
LENGTHS = (3, 7, 1, 20, 12, 7)
NEW_TOKENS = (8, 12, 4, 10, 1, 12)
ENDS = [5, 17, 29, 41, 53, 65, 77]  # random tokens of the vocabulary, so that some answers end early
SMALL = {"device_kv_budget_bytes": 2**23}
EARLY = {"eos_token_id": ENDS, "pad_token_id": 0}


def text(tokens=DOCUMENT_TOKENS, rows=1, seed=1):
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def questions(lengths=LENGTHS, new_tokens=NEW_TOKENS, streamers=(None,) * 32):
    asked = zip(lengths, new_tokens, streamers, strict=False)
    return [
        BatchQuestion(text(length, seed=9 + number)[0].tolist(), new, streamer=streamer)
        for number, (length, new, streamer) in enumerate(asked)
    ]


def read(enabled, document, expected_tokens=DOCUMENT_TOKENS + 40):
    cache = enabled.new_cache(expected_tokens)
    if document.shape[1]:
        enabled.model(document, past_key_values=cache, logits_to_keep=1)
    return cache


def alone(model, cache, document, asked, **options):
    answers = []
    for one in asked:
        prompt = torch.cat([document, torch.tensor([one.ids])], dim=1)
        mask = torch.ones_like(prompt)
        limits = {"max_new_tokens": one.new_tokens, "do_sample": False, **options}
        written = model.generate(prompt, attention_mask=mask, past_key_values=cache.fork(), **limits)
        answers.append(written[0, prompt.shape[1] :].tolist())
    return answers


@torch.inference_mode()
def assert_same_answers(
    model, asked, *, batches=1, tokens=DOCUMENT_TOKENS, expected_tokens=0, generate=EARLY, **options
):
    """Assert that the answers of a batch are those that each question gets alone; return the cache."""
    document = text(tokens)
    with headinfer.enable(model, chunk_tokens=CHUNK_TOKENS, **options) as enabled:
        cache = read(enabled, document, expected_tokens)
        wanted = alone(model, cache, document, asked, **generate)
        planned = plan_batches(enabled, cache, asked)
        found = answer_all(enabled, cache, document, planned, **generate)
        again = alone(model, cache, document, asked[:1], **generate)
    assert found == wanted
    assert again == wanted[:1]
    assert len(planned) == batches
    assert cache.get_seq_length() == tokens
    return cache


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


# -- the answers of a batch are those that each question gets alone -----------------------------------------------


@pytest.mark.parametrize(
    ("family", "batches"),
    [("gemma2", 1), ("gpt_oss", 1), ("llama4_text", 1), ("gemma3n_text", 1), ("gpt2", 1), ("qwen3_next", 5),
     ("falcon_h1", 5)],
)  # fmt: skip
def test_each_kind_of_layer(family, batches):
    assert_same_answers(tiny_model(family), questions(), batches=batches)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transport": "lazy", **SMALL},
        {"transport": "eager", "tile_tokens": 64, **SMALL},
        {"transport": "lazy", "cpu_share": 0.5, **SMALL},
        {"transport": "eager", "device_kv_budget_bytes": 2**24, "streaming_budget_bytes": 2**23},
    ],
    ids=["in place", "lazy", "tiles", "share of the CPU", "resident tokens"],
)
def test_each_transport(llama, options):
    assert_same_answers(llama, questions(), **options)


@pytest.mark.parametrize("transport", ["in_place", "lazy"])
def test_a_disk_tier(llama, tmp_path, transport):
    cache = assert_same_answers(
        llama,
        questions((3, 7, 4)),
        batches=2,
        tokens=2600,
        transport=transport,
        disk_tier=tmp_path,
        host_kv_budget_bytes=5 * 2**18,
        **SMALL,
    )
    assert cache.stats().disk_kv_bytes > 0


@pytest.mark.parametrize("rows", [1, 2, 32])
def test_numbers_of_rows(llama, rows):
    lengths = [1 + number % 5 for number in range(rows)]
    assert_same_answers(llama, questions(lengths, [4 + number % 3 for number in range(rows)]))


def test_answers_that_outgrow_the_tail(llama):
    assert_same_answers(llama, questions((3, 40), (135, 140)), tokens=100, generate={"pad_token_id": 0})


def test_one_very_long_question_is_a_batch_of_its_own(llama):
    assert_same_answers(llama, questions((400, *LENGTHS), (4, *NEW_TOKENS)), batches=2)


@torch.inference_mode()
def test_samples_are_those_of_each_question_alone(llama):
    document = text()
    asked = questions()
    sampling = {**EARLY, "do_sample": True, "temperature": 2.0, "sampling_seed": 4}
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        cache = read(enabled, document)
        wanted = []
        for one in asked:
            wanted += alone(llama, cache, document, [one], **sampling)
        batches = plan_batches(enabled, cache, asked)
        assert answer_all(enabled, cache, document, batches, **sampling) == wanted
        sampling["sampling_seed"] = 5
        assert answer_all(enabled, cache, document, batches, **sampling) != wanted


def test_without_a_document(llama):
    assert_same_answers(llama, questions(), tokens=0)


def test_a_penalty_for_repetition_sees_the_same_ids(llama):
    assert_same_answers(llama, questions(), generate={**EARLY, "repetition_penalty": 1.5})


@torch.inference_mode()
def test_rows_of_different_documents(llama):
    document = text(rows=3)
    mask = torch.ones_like(document, dtype=torch.bool)
    mask[1, :50] = False
    asked = questions()
    placed = [BatchQuestion(one.ids, one.new_tokens, number % 3) for number, one in enumerate(asked)]
    wanted = []
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        for one in placed:
            own = document[one.row : one.row + 1][:, mask[one.row]]
            wanted += alone(llama, read(enabled, own), own, [one], **EARLY)
        cache = enabled.new_cache(400, rows=3)
        llama.generate(document, attention_mask=mask, past_key_values=cache, max_new_tokens=1, pad_token_id=0)
        found = answer_all(enabled, cache, document, plan_batches(enabled, cache, placed), mask=mask, **EARLY)
    assert found == wanted


def test_rotary_frequencies_that_change_within_a_batch_are_asked_alone():
    long = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = tiny_model("llama", rope_parameters=long, max_position_embeddings=DOCUMENT_TOKENS + 15)
    short = questions((3, 5), (4, 4))
    assert_same_answers(model, short)
    with pytest.warns(headinfer.ContextLengthWarning), pytest.warns(headinfer.RereadWarning):
        assert_same_answers(model, questions((3, 20), (4, 4)), batches=2)
    with pytest.warns(headinfer.ContextLengthWarning):
        assert_same_answers(model, questions((3, 20), (4, 4)), expected_tokens=DOCUMENT_TOKENS + 40)


@torch.inference_mode()
def test_a_loaded_session(llama, tmp_path):
    document = text()
    asked = questions()
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        read(enabled, document).save(tmp_path / "one", token_ids=document)
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        cache = headinfer.HeadCache.load(tmp_path / "one", llama, transport="lazy", **SMALL)
        wanted = alone(llama, cache, document, asked, **EARLY | {"max_new_tokens": 6})
        found = enabled.ask(cache, [one.ids for one in asked], max_new_tokens=6, **EARLY)
    assert found == wanted


# -- what a batch costs ----------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("cpu_share", [None, 0.5])
def test_a_token_reads_the_document_once_for_all_rows(llama, cpu_share):
    document = text(2500)
    moved = []

    def note(cache):
        stats = cache.stats()
        moved.append((stats.link_to_device_bytes, stats.cpu_attended_bytes))

    shapes = {"transport": "eager", "tile_tokens": 512, "cpu_share": cpu_share, "device_kv_budget_bytes": 2**24}
    with headinfer.enable(llama, chunk_tokens=512, on_forward=note, **shapes) as enabled:
        cache = read(enabled, document)
        steps = {}
        for rows in (1, 8):
            asked = questions([4 + number for number in range(rows)], [6] * rows)
            moved.clear()
            answer_all(enabled, cache, document, plan_batches(enabled, cache, asked), pad_token_id=0)
            steps[rows] = [after[0] - before[0] for before, after in itertools.pairwise(moved)][1:-1]
            attended = [after[1] - before[1] for before, after in itertools.pairwise(moved)]
            assert all(attended) if cpu_share else not any(attended)
    assert len(steps[8]) == 3
    assert 0 < max(steps[8]) < 1.02 * max(steps[1])  # results of the host cross for each row


def test_rows_leave_the_batch_when_their_answers_end(llama):
    rows = []
    with headinfer.enable(llama, on_forward=lambda cache: rows.append(cache.head_layers[0].rows)) as enabled:
        cache = enabled.new_cache()
        asked = questions((2, 3, 4, 5), (1, 2, 2, 4))
        answers = answer_all(enabled, cache, text(0), plan_batches(enabled, cache, asked), pad_token_id=0)
    assert rows == [4, 3, 1, 1]
    assert [len(answer) for answer in answers] == [1, 2, 2, 4]
    assert cache.stats().host_kv_bytes == cache.stats().device_kv_bytes == 0


@torch.inference_mode()
def test_a_small_budget_splits_the_batch(llama):
    budget_bytes = 2**22
    document = text(600)
    asked = questions(LENGTHS, [4] * 6)
    options = {"transport": "lazy", "tile_tokens": 64, "device_kv_budget_bytes": budget_bytes}
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS, **options) as enabled:
        cache = read(enabled, document)
        planned = plan_batches(enabled, cache, asked)
        found = answer_all(enabled, cache, document, planned, **EARLY)
        assert cache.stats().device_kv_peak_bytes <= budget_bytes
        wanted = alone(llama, cache, document, asked, **EARLY)
    assert found == wanted
    assert 1 < len(planned) < 6


def test_batches_have_similar_lengths():
    def lengths(asked, most_rows=32, is_padded=True):
        batches = split_into_batches(asked, most_rows, is_padded=is_padded)
        return [[len(one.ids) for _, one in batch] for batch in batches]

    asked = questions((5, 900, 6, 7, 1000), (20,) * 5)
    assert lengths(asked) == [[5, 6, 7], [900, 1000]]
    assert lengths(asked, most_rows=2) == [[5], [900, 1000], [6, 7]]
    assert lengths(questions((4, 5, 4), (9, 9, 9)), is_padded=False) == [[4, 4], [5]]
    assert lengths([]) == []


# -- errors and interruptions ----------------------------------------------------------------------------------------


class Collected:
    def __init__(self):
        self.ids = []
        self.has_ended = False

    def put(self, value):
        self.ids += value.tolist()

    def end(self):
        self.has_ended = True


@torch.inference_mode()
def test_an_interruption_leaves_what_was_answered_and_the_document(llama):
    document = text()
    streamers = [Collected() for _ in LENGTHS]
    asked = questions(streamers=streamers)
    left = -1

    def stop(cache):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS, on_forward=stop) as enabled:
        cache = read(enabled, document)
        wanted = alone(llama, cache, document, asked, **EARLY)
        enabled.last_cache = None  # of the last question
        before = cache.stats()
        left = 5
        with pytest.raises(KeyboardInterrupt):
            answer_all(enabled, cache, document, plan_batches(enabled, cache, asked), **EARLY)
        shown = [one.ids[-len(answer[:4]) :] for one, answer in zip(streamers, wanted, strict=True)]
        assert shown == [answer[:4] for answer in wanted]
        assert [one.has_ended for one in streamers] == [len(answer) <= 4 for answer in wanted]
        after = cache.stats()
        assert (after.tokens, after.host_kv_bytes) == (before.tokens, before.host_kv_bytes)
        assert after.device_tail_bytes == before.device_tail_bytes
        assert answer_all(enabled, cache, document, plan_batches(enabled, cache, asked), **EARLY) == wanted


def test_what_cannot_be_asked_is_refused(llama):
    document = text()
    with headinfer.enable(llama, chunk_tokens=CHUNK_TOKENS) as enabled:
        cache = read(enabled, document)
        with pytest.raises(UsageError, match="document_ids"):
            enabled.ask(cache, [[1]])
        with pytest.raises(UsageError, match=r"\[1, 299\]"):
            enabled.ask(cache, [[1]], document_ids=document[:, 1:])
        with pytest.raises(UsageError, match="no tokens"):
            enabled.ask(cache, [[1], []], document_ids=document)
        with pytest.raises(UsageError, match="max_new_tokens"):
            enabled.ask(cache, [[1]], document_ids=document, max_new_tokens=0)
        assert enabled.ask(cache, [], document_ids=document) == []
