"""Sessions on disk: loading restores exactly what was saved, or is an error."""

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
import xxhash
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from own_process import HANG_S
from safetensors import safe_open

import headinfer
from headinfer import CapacityError, HeadCache, SessionError, StateError, UsageError
from headinfer.kv.tensor_file import TensorFile, write_tensors
from headinfer.sessions.folder import Lock, session_folder
from headinfer.sessions.manifest import Manifest

CHUNK = 192


def token_ids(tokens, rows=1, seed=0):
    return torch.randint(0, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def forward(model, cache, ids):
    with torch.inference_mode():
        parts = ids.split(CHUNK, dim=1)
        return torch.cat([model(input_ids=ids, past_key_values=cache, use_cache=True).logits for ids in parts], dim=1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def enabled(model):
    with headinfer.enable(model, chunk_tokens=CHUNK) as enabled:
        yield enabled


@pytest.fixture
def saved(model, enabled, tmp_path):
    """A session of 500 tokens, in two checkpoints."""
    ids = token_ids(500)
    cache = enabled.new_cache()
    forward(model, cache, ids[:, :300])
    cache.save(tmp_path / "book", ids)
    forward(model, cache, ids[:, 300:])
    cache.save(tmp_path / "book", ids)
    return tmp_path / "book"


# -- saving and loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["auto", "eager", "lazy"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt_oss", "qwen3_next", "falcon_h1", "gemma3n_text", "lfm2"]
)
def test_a_loaded_cache_computes_the_same_bits(family, transport, tmp_path):
    model = tiny_model(family)
    rows = 2
    ids = token_ids(700, rows)
    question = token_ids(30, rows, seed=1)
    with headinfer.enable(model, chunk_tokens=CHUNK, transport=transport) as enabled:
        cache = enabled.new_cache()
        forward(model, cache, ids)
        cache.save(tmp_path / "book", ids, {"title": "a book"})
        loaded = HeadCache.load(tmp_path / "book", model)
        assert loaded.engine.options == cache.engine.options
        assert torch.equal(loaded.token_ids, ids)
        assert loaded.get_seq_length() == 700
        for step in (question, question[:, :1], question[:, 1:2]):
            assert torch.equal(forward(model, loaded, step), forward(model, cache, step))
    assert Manifest.read(tmp_path / "book").about == {"title": "a book"}


def test_an_interrupted_run_continues_with_the_same_bits(model, enabled, tmp_path):
    ids = token_ids(900)
    question = token_ids(20, seed=1)
    whole = enabled.new_cache()
    before = {}
    for start in range(0, 900, 300):
        forward(model, whole, ids[:, start : start + 300])
        whole.save(tmp_path / "whole", ids)
        blocks = {path.name: path.stat() for path in (tmp_path / "whole").glob("block-*")}
        for name, stat in before.items():
            assert (blocks[name].st_ino, blocks[name].st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), (
                "a file was rewritten"
            )
        assert len(blocks) > len(before)
        before = blocks
        assert len(list((tmp_path / "whole").glob("end-*"))) == 1
        if start == 300:
            shutil.copytree(tmp_path / "whole", tmp_path / "interrupted")
    resumed = HeadCache.load(tmp_path / "interrupted", model)
    assert resumed.get_seq_length() == 600
    forward(model, resumed, ids[:, 600:])
    resumed.save(tmp_path / "interrupted", ids)
    again = HeadCache.load(tmp_path / "interrupted", model)
    expected = forward(model, whole, question)
    assert torch.equal(forward(model, resumed, question), expected)
    assert torch.equal(forward(model, again, question), expected)
    assert torch.equal(again.token_ids, ids)


def test_shared_and_cropped_rows_are_restored(model, enabled, tmp_path):
    ids = token_ids(700)
    cache = enabled.new_cache()
    forward(model, cache, ids)
    cache.batch_repeat_interleave(3)
    more = token_ids(300, rows=3, seed=2)
    forward(model, cache, more)
    everything = torch.cat([ids.expand(3, -1), more], dim=1)
    cache.save(tmp_path / "book", everything)
    shared = sum(one.tokens for one in Manifest.read(tmp_path / "book").segment_files)
    assert shared < 700 + 3 * 300 + 3, "the shared beginning is stored once"
    cache.crop(-450)
    cache.save(tmp_path / "book", everything)
    loaded = HeadCache.load(tmp_path / "book", model)
    assert torch.equal(loaded.token_ids, everything[:, :550])
    question = token_ids(20, rows=3, seed=3)
    assert torch.equal(forward(model, loaded, question), forward(model, cache, question))
    names = {entry.name for entry in Manifest.read(tmp_path / "book").files()}
    assert {path.name for path in (tmp_path / "book").glob("*.safetensors")} == names, (
        "files that are not needed are removed"
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(steps=st.lists(st.tuples(st.sampled_from(["read", "crop", "save", "load"]), st.integers(1, 400)), max_size=9))
def test_any_order_of_saving_and_loading(model, tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("any") / "book"
    ids = token_ids(4000)
    with headinfer.enable(model, chunk_tokens=CHUNK) as enabled:
        cache = enabled.new_cache()
        kept = token_ids(0)
        is_saved = False
        for what, tokens in [("read", 10), *steps, ("save", 1), ("load", 1)]:
            if what == "read":
                new = ids[:, :tokens]
                forward(model, cache, new)
                kept = torch.cat([kept, new], dim=1)
            elif what == "crop" and tokens < kept.shape[1]:
                cache.crop(-tokens)
                kept = kept[:, :-tokens]
            elif what == "save":
                cache.save(folder, kept)
                is_saved = True
            elif what == "load" and is_saved:
                cache = HeadCache.load(folder, model)
                kept = cache.token_ids
        plain = enabled.new_cache()
        forward(model, plain, kept)
        question = token_ids(5, seed=4)
        torch.testing.assert_close(
            forward(model, cache, question), forward(model, plain, question), atol=1e-5, rtol=1e-5
        )


def test_a_fork_does_not_change_the_document(model, saved, enabled):
    loaded = HeadCache.load(saved, model)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    question = token_ids(200, seed=5)
    other = token_ids(20, seed=6)
    fork = loaded.fork()
    forward(model, fork, question)
    expected = forward(model, HeadCache.load(saved, model), other)
    assert torch.equal(forward(model, loaded, other), expected)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    fork.save(saved, torch.cat([loaded.token_ids, question], dim=1))
    assert HeadCache.load(saved, model).get_seq_length() == 700
    with pytest.raises(SessionError, match="was written since this cache was loaded"):
        loaded.save(saved)


def test_segments_are_read_when_they_are_needed(model, saved, enabled, monkeypatch):
    verified = []
    original = TensorFile.verify
    monkeypatch.setattr(TensorFile, "verify", lambda file, name: (verified.append(name), original(file, name))[1])
    loaded = HeadCache.load(saved, model)
    assert not [name for name in verified if name.endswith((".k", ".v"))], "nothing is read before it is needed"
    forward(model, loaded, token_ids(3))
    count = len(verified)
    assert count > 4
    forward(model, loaded, token_ids(3))
    forward(model, loaded.fork(), token_ids(3))
    assert len(verified) == count, "each tensor is verified once"
    assert loaded.stats().host_kv_bytes == 0, "tensors are mapped, not copied"


# -- the format ------------------------------------------------------------------------------------------------


def test_other_programs_can_read_a_session(model, saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["tokens"]) == ("headinfer session", 1, 500)
    (row,) = manifest["rows"]
    parts = []
    ids = []
    for index, start, stop in row:
        name = manifest["blocks"][index]["file"]["name"]
        raw = (saved / name).read_bytes()
        assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0, "the data begin at a page boundary"
        with safe_open(saved / name, "pt") as file:
            parts.append(file.get_tensor("layers.1.k")[:, start:stop])
            ids.append(file.get_tensor("token_ids")[start:stop])
    with safe_open(saved / manifest["end"]["name"], "pt") as file:
        parts.append(file.get_tensor("layers.1.tail_k")[0])
        ids.append(file.get_tensor("token_ids")[0])
    assert torch.equal(torch.cat(ids), token_ids(500)[0])
    k, _ = HeadCache.load(saved, model).head_layers[1].layer_kv.dense()
    assert torch.equal(torch.cat(parts, dim=1), k[0])


def test_the_format_agrees_with_its_document(model, saved):
    """This tests the program, the checksums and the chains in docs/session-format.md."""
    text = (Path(__file__).parents[2] / "docs" / "session-format.md").read_text()
    program: dict = {}
    exec(textwrap.dedent(text.split("ten lines\n", 1)[1]), program)
    layer_kvs = [layer.layer_kv for layer in HeadCache.load(saved, model).head_layers]
    for layer, layer_kv in enumerate(layer_kvs):
        assert torch.equal(program["keys"](saved, layer, 0), layer_kv.dense()[0][0])
    manifest = json.loads((saved / "manifest.json").read_text())
    checksum = manifest.pop("checksum")
    plain = {"sort_keys": True, "separators": (",", ":")}
    assert checksum == xxhash.xxh3_128_hexdigest(json.dumps(manifest, **plain).encode())
    stop = 0
    for block in manifest["blocks"]:
        stop += block["tokens"]
        chain = hashlib.sha256(json.dumps(manifest["model"], **plain).encode())
        chain.update(token_ids(500)[0, :stop].contiguous().numpy().tobytes())
        assert block["chain"] == chain.hexdigest()
    for entry in [*(block["file"] for block in manifest["blocks"]), manifest["end"]]:
        raw = (saved / entry["name"]).read_bytes()
        data = 8 + int.from_bytes(raw[:8], "little")
        assert (len(raw), xxhash.xxh3_128_hexdigest(raw[:data])) == (entry["nbytes"], entry["header"])
        header = json.loads(raw[8:data])
        sums = header.pop("__metadata__")
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            assert sums[f"xxh3:{name}"] == xxhash.xxh3_128_hexdigest(raw[data + begin : data + end])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_tensor_files_can_contain_any_tensor(tmp_path_factory, data):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]
    tensors = {}
    for number in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        tensor = (torch.rand(shape) * 9).to(data.draw(st.sampled_from(dtypes)))
        if tensor.ndim > 1 and data.draw(st.booleans()):
            tensor = tensor.transpose(0, -1)
        tensors[f"tensor {number} é"] = tensor
    folder = tmp_path_factory.mktemp("files")
    entry = write_tensors(folder / "a.safetensors", tensors)
    file = TensorFile(folder, entry)
    assert set(file.names()) == set(tensors)
    with safe_open(folder / "a.safetensors", "pt") as other:
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor)
            assert torch.equal(other.get_tensor(name), tensor)


# -- damaged and foreign files ---------------------------------------------------------------------------------


def damage(path, at, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[at] ^= 1 << (at % 8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:at])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_damage_to_any_file_is_detected(model, saved, enabled, tmp_path, how):
    question = token_ids(3, seed=1)
    expected = forward(model, HeadCache.load(saved, model), question)
    wrong = 0
    for path in sorted(saved.iterdir()):
        size = path.stat().st_size
        for at in sorted({0, 9, size // 3, size // 2, size - 2} & set(range(size))):
            broken = tmp_path / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(saved, broken)
            damage(broken / path.name, at, how)
            try:
                found = HeadCache.load(broken, model)
                logits = forward(model, found, question)
                everything_read = found.token_ids is not None
            except SessionError as error:
                wrong += "damaged" in str(error) or "no manifest" in str(error)
            else:
                assert everything_read
                assert torch.equal(logits, expected), f"{how} {path.name} at {at} gave another answer"
    assert wrong >= 3 * len(list(saved.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "not a manifest of headinfer"),
        ({"version": 2}, "has version 2 of the format"),
        ({"tokens": 12}, "checksum is not right"),
        ({"checksum": ""}, "checksum is not right"),
        (None, "it has no manifest.json"),
        ("{", "is damaged"),
        ("[]", "not a manifest"),
    ],
)
def test_foreign_newer_and_damaged_manifests_are_errors(model, saved, change, message):
    path = saved / "manifest.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SessionError, match=message):
        HeadCache.load(saved, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": {"name": "../../secret.safetensors", "nbytes": 1, "header": ""}}, "is not the name of a session"),
        ({"end": {"name": "/etc/passwd", "nbytes": 1, "header": ""}}, "is not the name of a session"),
        ({"blocks": [{"tokens": 1}]}, "has other fields than version 1"),
        ({"rows": [[1]]}, "has other fields than version 1"),
        ({"surprise": 1}, "has other fields than version 1"),
        ({"end": None}, "has other fields than version 1"),
    ],
)
def test_manifests_with_a_right_checksum_are_checked_too(model, saved, change, message):
    body = json.loads((saved / "manifest.json").read_text()) | change
    del body["checksum"]
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"))
    text = json.dumps(body | {"checksum": xxhash.xxh3_128_hexdigest(plain.encode())})
    (saved / "manifest.json").write_text(text)
    with pytest.raises(SessionError, match=message):
        HeadCache.load(saved, model)


def test_loading_with_another_model_is_an_error(model, saved):
    fine_tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fine_tuned.parameters():
            parameter += 1e-3
    with pytest.raises(SessionError, match=r"another model \(other weights\): give it the model that read it"):
        HeadCache.load(saved, fine_tuned)
    with pytest.raises(SessionError, match="another model"):
        HeadCache.load(saved, tiny_model("mistral"))
    with pytest.raises(SessionError, match=r"rope_theta is 10000\.0 there and 77.0 here"):
        HeadCache.load(saved, tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0}))
    with pytest.raises(SessionError, match="dtype is float32 there and bfloat16 here"):
        HeadCache.load(saved, copy.deepcopy(model).to(torch.bfloat16))


def test_saving_an_unsupported_cache_is_an_error(model, enabled, saved, tmp_path):
    with pytest.raises(StateError, match="an enabled model must have filled the cache"):
        HeadCache(model.config).save(tmp_path / "new")
    cache = enabled.new_cache()
    forward(model, cache, token_ids(10))
    with pytest.raises(SessionError, match="holds another session"):
        cache.save(saved)
    with pytest.raises(UsageError, match=r"the cache holds 1 x 10 tokens, and \(1, 9\) ids were given"):
        cache.save(tmp_path / "new", token_ids(9))
    with pytest.raises(UsageError, match="token_ids has the negative number -"):
        cache.save(tmp_path / "new", -token_ids(10))
    assert not (tmp_path / "new" / "manifest.json").exists()
    cache.save(tmp_path / "new")
    assert HeadCache.load(tmp_path / "new", model).token_ids is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SessionError, match="cannot write into"):
        cache.save(blocked / "session")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", "-x", ".hidden", "a\\b", "a\0b", "é", "x" * 101]
)
def test_names_of_sessions_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UsageError, match="is not a valid session name"):
        session_folder(tmp_path, name)


def test_symbolic_links_are_not_sessions(tmp_path):
    (tmp_path / "link").symlink_to("/tmp")
    with pytest.raises(UsageError, match="is a link"):
        session_folder(tmp_path, "link")


# -- interruptions ---------------------------------------------------------------------------------------------


def _hold(folder, held, release):
    with Lock(folder):
        held.set()
        release.wait(HANG_S)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_only_one_process_can_write_a_session(model, saved, enabled):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    release = context.Event()
    other = context.Process(target=_hold, args=(saved, held, release))
    other.start()
    assert held.wait(HANG_S)
    cache = HeadCache.load(saved, model)
    forward(model, cache, token_ids(10))
    with pytest.raises(SessionError, match="another process is writing"):
        cache.save(saved)
    other.kill()  # the system releases the lock of a killed process
    other.join()
    cache.save(saved)
    assert HeadCache.load(saved, model).get_seq_length() == 510


CALLS = ("open", "write", "fsync", "link", "replace", "unlink")


def in_child(work):
    """Run a function in a fork of this process. Returns the exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(number):
    """End the process at the given system call of saving. If the call writes, half of the bytes are written."""
    count = 0

    def wrap(name, original):
        def call(*arguments, **extra):
            nonlocal count
            count += 1
            if count == number:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(9)
            return original(*arguments, **extra)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_point_of_saving_keeps_a_checkpoint(model, saved, enabled, tmp_path):
    cache = HeadCache.load(saved, model)
    ids = torch.cat([cache.token_ids, token_ids(400, seed=1)], dim=1)
    question = token_ids(3, seed=2)
    expected = {500: forward(model, HeadCache.load(saved, model), question)}
    forward(model, cache, ids[:, 500:])
    expected[900] = forward(model, cache.fork(), question)
    seen = []
    number = 0
    while True:
        number += 1
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(saved, folder)
        cache.saved.folder = folder

        def save(folder=folder, number=number):
            die_at(number)
            cache.save(folder, ids)

        code = in_child(save)
        loaded = HeadCache.load(folder, model)
        held = loaded.get_seq_length()
        seen.append(held)
        assert torch.equal(loaded.token_ids, ids[:, :held])
        assert torch.equal(forward(model, loaded.fork(), question), expected[held])
        # The session continues from its last checkpoint.
        forward(model, loaded, ids[:, held:]) if held < 900 else None
        loaded.save(folder, ids)
        again = HeadCache.load(folder, model)
        assert torch.equal(forward(model, again, question), expected[900])
        assert {path.name for path in folder.glob("*.safetensors")} == {e.name for e in Manifest.read(folder).files()}
        if code == 0:
            break
        assert code == 9
    assert number > 15
    assert seen[0] == 500
    assert seen[-1] == 900
    assert seen == sorted(seen)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_any_point_of_the_first_save_can_be_repeated(model, enabled, tmp_path):
    """Saving again creates the session, and no file of the interrupted save remains."""
    cache = enabled.new_cache()
    ids = token_ids(300)
    number = 0
    code = 9
    forward(model, cache, ids)
    while code == 9:
        number += 1
        folder = tmp_path / f"killed-{number}"

        def save(folder=folder, number=number):
            die_at(number)
            cache.save(folder, ids)

        code = in_child(save)
        own = cache.fork()
        if code == 9 and not (folder / "manifest.json").exists():
            own.save(folder, ids)
        else:
            own = HeadCache.load(folder, model)
            own.save(folder, ids)
        named = {entry.name for entry in Manifest.read(folder).files()}
        assert {path.name for path in folder.iterdir()} == {*named, "manifest.json", "lock"}
        assert torch.equal(HeadCache.load(folder, model).token_ids, ids)
    assert code == 0
    assert number > 12


def test_a_full_disk_keeps_the_earlier_checkpoint(model, saved, enabled, monkeypatch):
    cache = HeadCache.load(saved, model)
    forward(model, cache, token_ids(400, seed=1))
    original = os.write
    writes = 0
    for number in range(1, 100):
        writes = 0

        def full(descriptor, data, number=number):
            nonlocal writes
            writes += 1
            if writes >= number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        try:
            cache.save(saved)
        except CapacityError as error:
            assert "No space left on device" in str(error)  # noqa: PT017
            assert "free some space" in str(error)  # noqa: PT017
        else:
            break
        finally:
            monkeypatch.setattr(os, "write", original)
        assert HeadCache.load(saved, model).get_seq_length() == 500
    assert number > 5
    assert HeadCache.load(saved, model).get_seq_length() == 900
