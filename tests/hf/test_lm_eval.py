"""lm-eval's HFLM with an enabled model: a small task from local files gives the same answers and scores."""

import json

import pytest
from families import tiny_model

import headinfer
from headinfer.hf.models import byte_tokenizer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{story}}}} Question: {{{{question}}}} Answer:"
{rest}
"""
GENERATE = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["@"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
doc_to_choice: ["red", "green", "blue"]
doc_to_target: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "rest"), [("generate_until", GENERATE), ("multiple_choice", CHOOSE)])
def test_a_task_gives_the_same_results(kind, rest, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lines = [
        {"story": "Once upon a time there was a door. " * (9 + n), "question": f"Which colour, {n}?", "answer": "red"}
        for n in range(4)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(name="door", data=data, kind=kind, rest=rest), encoding="utf-8")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = tiny_model("llama", vocab_size=259)
    harness = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2, max_length=2048, device="cpu")

    def evaluate():
        found = lm_eval.simple_evaluate(
            model=harness, tasks=["door"], task_manager=tasks, log_samples=True, bootstrap_iters=0
        )
        return found["results"]["door"], [sample["resps"] for sample in found["samples"]["door"]]

    wanted = evaluate()
    with headinfer.enable(model, chunk_tokens=64) as enabled:
        scores, answers = evaluate()
    assert scores == wanted[0]
    if kind == "generate_until":
        assert answers == wanted[1]
        assert any(answer[0][0] for answer in answers), "the model wrote nothing"
        assert enabled.last_cache.stats().host_kv_bytes > 0
    else:
        likelihoods = [[float(choice[0][0]) for choice in answer] for answer in answers]
        expected = [[float(choice[0][0]) for choice in answer] for answer in wanted[1]]
        assert all(one == pytest.approx(two, abs=1e-3) for one, two in zip(likelihoods, expected, strict=True))
