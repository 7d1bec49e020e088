"""Several ranks, each with its own KV heads: CPU processes with gloo, started by torchrun or forked."""

import functools
import json
import os
import subprocess
import sys
import traceback
import uuid
import warnings
from pathlib import Path

import pytest
import rank_worker
import torch
from families import VOCAB, present, splits, tiny_config, tiny_model
from own_process import HANG_S
from rank_worker import read
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DynamicCache

from headinfer.errors import UnsupportedError, UsageError
from headinfer.hf.models import resolve
from headinfer.hf.parallel import check_shards, rank_device
from headinfer.hf.ranks import Ranks
from headinfer.plan.model_shape import ModelShape

BOUND = 5e-5  # a share of the standard deviation of the logits, as in test_families.py
TWO = Ranks(0, 2, 0, 2)
SUPPORT = Path(__file__).parents[1] / "support"
JOB = ("generate", "random:tiny-llama", "--prompt", "What is it?", "--max-new-tokens", "6", "--temperature", "1")


def torchrun(*arguments, inside=(), **extra):
    """Run torchrun with two processes on this host, or with the options of torchrun in `arguments`."""
    where = () if "--nnodes" in arguments else ("--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", **extra}
    return subprocess.Popen(
        [*inside, sys.executable, "-m", "torch.distributed.run", *where, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def forked_ranks(work, folder):
    """Run a function in two forks of this process, as two ranks of torchrun. Starting these takes as long as the tests.

    Returns:
        The exit codes of the ranks, and what all wrote to stdout and to stderr.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= address
            warnings.resetwarnings()  # pytest has made errors of them
            sys.stdout = open(folder / f"out-{rank}", "w")  # noqa: SIM115
            sys.stderr = open(folder / f"err-{rank}", "w")  # noqa: SIM115
            work()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    out, err = ("".join((folder / f"{name}-{rank}").read_text() for rank in range(2)) for name in ("out", "err"))
    return codes, out, err


forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def alone(run_command):
    """The results of JOB in one process."""
    code, out, err = run_command(*JOB, "--json")
    assert code == 0, err
    return json.loads(out)


@forks
@pytest.mark.filterwarnings("ignore:.*lru_cache.*", "ignore::DeprecationWarning")
def test_families_with_a_tensor_parallel_plan_are_exact_over_two_ranks(tmp_path):
    families = [family for family in present() if splits(family)]
    assert len(families) > 50
    wanted = {}
    ids = torch.randint(1, VOCAB, (2, 100), generator=torch.Generator().manual_seed(1))
    models = tmp_path / "models"
    for family in families:
        model = tiny_model(family)
        model.save_pretrained(models / family)
        save_file({"ids": ids}, models / family / "ids.safetensors")
        wanted[family] = read(model, ids, DynamicCache(config=model.config))
    codes, _, err = forked_ranks(functools.partial(rank_worker.families, models), tmp_path)
    assert codes == [0, 0], err
    for family in families:
        found = load_file(models / family / "found.safetensors")
        difference = (found["logits"] - wanted[family]).abs().max() / wanted[family].std()
        assert difference < BOUND, family
        shape = ModelShape.from_config(tiny_config(family))
        whole = [shape.layers[index].kv_heads for index in shape.offloaded_layers]
        assert [2 * heads for heads in found["heads"].tolist()] == whole, family
        assert 2 * shape.shard(2).kv_bytes_per_token(4) == shape.kv_bytes_per_token(4)


def test_two_ranks_give_the_tokens_and_messages_of_one_process(alone):
    code, out, err = finish(torchrun("-m", "headinfer", *JOB, "--json", "--transport", "lazy"))
    assert code == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["token_ids"] == alone["token_ids"]
    assert [stats["host_kv_bytes"] for stats in found["rank_stats"]] == [alone["stats"]["host_kv_bytes"] // 2] * 2
    assert err.count("writing") == 1


@forks
def test_a_mistake_is_reported_once(tmp_path):
    def command(*more):
        return functools.partial(rank_worker.command_line, "", (*JOB, *more))

    codes, out, err = forked_ranks(command("--file", "/no/such/file"), tmp_path)
    assert (codes, out) == ([2, 2], "")
    assert err.count("headinfer: error: cannot read /no/such/file") == err.count("headinfer: error") == 1
    codes, out, err = forked_ranks(command("--no-such-option"), tmp_path)
    assert (codes, out, err.count("No such option")) == ([2, 2], "", 1)


@forks
def test_a_failed_check_of_one_rank_ends_all_before_loading(tmp_path):
    codes, out, err = forked_ranks(functools.partial(rank_worker.command_line, "poor", JOB), tmp_path)
    assert (codes, out) == ([2, 2], "")
    assert "headinfer: error: rank 1 of 2: " in err
    assert "0 B are available" in err
    assert err.count("headinfer: error") == 1
    assert "headinfer/cli/" not in err, "headinfer prints no traceback"


def test_a_killed_rank_ends_all_with_a_message():
    code, _, err = finish(torchrun(SUPPORT / "rank_worker.py", "dying", *JOB))
    assert code != 0
    assert "rank      : 1" in err, "torchrun reports which rank failed first"
    assert "headinfer/cli/" not in err, "headinfer prints no traceback"


@pytest.fixture
def two_hosts():
    """Two connected network namespaces. Tests are skipped if the system does not allow them."""
    names = [f"headinfer-{uuid.uuid4().hex[:6]}-{index}" for index in range(2)]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add v0 netns {names[0]} type veth peer name v1 netns {names[1]}"]
    for index, name in enumerate(names):
        commands += [f"ip -n {name} addr add 10.77.0.{index + 1}/24 dev v{index}"]
        commands += [f"ip -n {name} link set {device} up" for device in ("lo", f"v{index}")]
    try:
        try:
            for line in commands:
                subprocess.run(line.split(), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this system allows no network namespaces: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_give_the_tokens_of_one_process(alone, two_hosts):
    processes = [
        torchrun(
            *("--nnodes", "2", "--node-rank", index, "--nproc-per-node", "1"),
            *("--master-addr", "10.77.0.1", "--master-port", "29511", "-m", "headinfer", *JOB, "--json"),
            inside=("ip", "netns", "exec", name),
            GLOO_SOCKET_IFNAME=f"v{index}",
        )
        for index, name in enumerate(two_hosts)
    ]
    (code, out, err), (other_code, other_out, _) = [finish(process) for process in processes]
    assert (code, other_code, other_out) == (0, 0, ""), err
    found = json.loads(out)
    assert found["token_ids"] == alone["token_ids"]
    assert len(found["rank_stats"]) == 2


@pytest.mark.parametrize(
    ("family", "changes", "ranks", "says"),
    [
        ("llama", {"num_key_value_heads": 2}, 4, "2 KV heads, which do not split over 4 ranks"),
        ("llama", {"num_key_value_heads": 4}, 3, "use 2 or another divisor of 4"),
        ("gpt2", {}, 2, "no tensor parallel plan that splits the KV heads of gpt2"),
        ("olmo2", {}, 2, "no tensor parallel plan that splits"),
        ("gemma3n_text", {}, 2, "transformers itself gives other results"),
    ],
)
def test_models_that_do_not_split_are_errors_with_the_reason(family, changes, ranks, says):
    config = tiny_config(family, **changes)
    with pytest.raises(UnsupportedError, match=says):
        check_shards(config, ModelShape.from_config(config), Ranks(0, ranks, 0, ranks))


def test_ranks_from_the_environment():
    assert Ranks.from_environment({}) == Ranks.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == Ranks()
    whole = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    found = Ranks.from_environment({**whole, "MASTER_PORT": "1"})
    assert (found, found.is_first, str(found)) == (Ranks(3, 4, 1, 2), False, "rank 3 of 4")
    for broken in ({"WORLD_SIZE": "2"}, {**whole, "MASTER_PORT": "1", "RANK": "x"}):
        with pytest.raises(UsageError, match="torchrun --nproc-per-node N -m headinfer"):
            Ranks.from_environment(broken)


def test_device_of_a_rank(monkeypatch):
    assert rank_device(TWO, "auto") == rank_device(TWO, "cpu") == "cpu"
    with pytest.raises(UsageError, match="leave it out"):
        rank_device(TWO, "cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device(Ranks(3, 4, 1, 2), "auto") == "cuda:1"
    with pytest.raises(UsageError, match="4 ranks and 2 CUDA devices"):
        rank_device(Ranks(3, 4, 3, 4), "auto")


def test_shard_of_a_shape():
    shape = ModelShape.from_config(resolve("random:llama-3-8b").config)
    half = shape.shard(2)
    assert 2 * half.kv_bytes_per_token(2) == shape.kv_bytes_per_token(2)
    assert 2 * half.weights == shape.weights
    assert AutoConfig.for_model("llama").base_model_tp_plan
