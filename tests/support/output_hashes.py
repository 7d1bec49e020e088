"""Compares the results of two checkouts by hashes of their outputs.

    git worktree add /tmp/before COMMIT
    python tests/support/output_hashes.py /tmp/before --write /tmp/outputs
    python tests/support/output_hashes.py . --compare /tmp/outputs

The first call runs the code of one checkout and writes the hashes, and the sessions that it made, to a folder. The
second call runs the code of another checkout, compares, and also loads the sessions that the first one made. Hashes
depend on the machine and the version of torch, so none are kept in the repository. Each hash covers every bit of the
logits, token ids, byte counters or files of one run.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

CHUNK = 192
# The names of the transports before they were renamed.
OLD_TRANSPORTS = {"auto": "auto", "in_place": "none", "eager": "early", "lazy": "late"}
STATS = (
    "tokens", "device_kv_bytes", "device_kv_peak_bytes", "device_ring_bytes", "device_tail_bytes",
    "device_staging_bytes", "device_resident_bytes", "host_kv_bytes", "host_kv_peak_bytes", "disk_kv_bytes",
    "disk_to_host_bytes", "link_to_device_bytes", "link_to_host_bytes", "tail_moved_bytes", "copies",
    "heads_per_group", "tile_tokens", "attention_backends",
)  # fmt: skip
FAMILIES = (
    "llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_next", "falcon_h1", "gemma3n_text", "gemma4_text", "lfm2",
    "mimo_v2_flash", "gpt2", "llama4_text",
)  # fmt: skip
TRANSPORTS = ("auto", "eager", "lazy")


class Runs:
    """The runs of one checkout, with the hash of each run by name."""

    def __init__(self, checkout, folder):
        self.checkout = checkout
        self.folder = folder
        self.hashes = {}
        sys.path[:0] = [str(checkout / "src"), str(checkout / "tests"), str(checkout / "tests" / "support")]
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(1)
        self.headinfer = importlib.import_module("headinfer")
        assert Path(self.headinfer.__file__).is_relative_to(checkout), self.headinfer.__file__
        self.families = importlib.import_module("families")
        fields = self.headinfer.Options.__dataclass_fields__
        self.has_transport = "transport" in fields

    def transport(self, name):
        return {"transport": name} if self.has_transport else {"staging": OLD_TRANSPORTS[name]}

    def note(self, name, *values):
        whole = hashlib.sha256()
        for value in values:
            if isinstance(value, self.torch.Tensor):
                whole.update(f"{tuple(value.shape)} {value.dtype}".encode())
                whole.update(value.detach().contiguous().view(self.torch.uint8).numpy().tobytes())
            else:
                whole.update(json.dumps(value, sort_keys=True, default=str).encode())
        self.hashes[name] = whole.hexdigest()
        print(f"{self.hashes[name][:16]}  {name}", file=sys.stderr)

    def ids(self, tokens, rows=1, seed=0):
        generator = self.torch.Generator().manual_seed(seed)
        return self.torch.randint(0, 90, (rows, tokens), generator=generator)

    def forward(self, model, cache, ids):
        with self.torch.inference_mode():
            parts = [
                model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(CHUNK, dim=1)
            ]
        return self.torch.cat(parts, dim=1)

    def stats(self, cache):
        found = cache.stats()
        return [getattr(found, name) for name in STATS]

    def session(self, family, name):
        """Compute logits with a cache that was loaded from a session."""
        model = self.families.tiny_model(family)
        with self.headinfer.enable(model, chunk_tokens=CHUNK):
            cache = self.headinfer.HeadCache.load(self.folder / "sessions" / name, model)
            question = self.ids(30, 2, seed=1)
            logits = [self.forward(model, cache, step) for step in (question, question[:, :1], question[:, 1:2])]
            return [*logits, cache.token_ids]

    def families_by_transport(self):
        for family in FAMILIES:
            for transport in TRANSPORTS:
                model = self.families.tiny_model(family)
                options = self.transport(transport)
                with self.headinfer.enable(model, chunk_tokens=CHUNK, **options) as enabled:
                    cache = enabled.new_cache()
                    logits = self.forward(model, cache, self.ids(700, 2))
                    steps = [self.forward(model, cache, self.ids(1, 2, seed=seed)) for seed in range(3)]
                    self.note(f"{family}, {transport}", logits, *steps, self.stats(cache))
                    cache.save(self.folder / "sessions" / f"{family}-{transport}", None)

    def budgets(self, tmp):
        budget = 2**20
        cases = {
            "streaming": {"device_kv_budget": 2 * budget, "streaming_budget": 2 * budget},
            "partly resident": {"device_kv_budget": 4 * budget, "streaming_budget": 2 * budget},
            "all resident": {"device_kv_budget": 2**30, "streaming_budget": 2 * budget},
            "fixed tiles": {"heads_per_group": 1, "tile_tokens": 100},
            "expected": {"device_kv_budget": 4 * budget, "streaming_budget": 2 * budget, "expected_tokens": 1500},
        }
        for transport in ("eager", "lazy"):
            for name, options in cases.items():
                model = self.families.tiny_model("llama")
                with self.headinfer.enable(model, chunk_tokens=CHUNK):
                    cache = self.headinfer.HeadCache(model.config, **options, **self.transport(transport))
                    logits = self.forward(model, cache, self.ids(1500))
                    steps = [self.forward(model, cache, self.ids(1, seed=seed)) for seed in range(3)]
                    fork = cache.fork()
                    cache.crop(-700)
                    steps += [self.forward(model, cache, self.ids(20, seed=5))]
                    steps += [self.forward(model, fork, self.ids(20, seed=6))]
                    self.note(f"{name}, {transport}", logits, *steps, self.stats(cache))
        for transport in TRANSPORTS:
            model = self.families.tiny_model("llama", num_hidden_layers=2).bfloat16()
            with self.headinfer.enable(model, chunk_tokens=CHUNK):
                options = {"host_kv_budget": 2**20, "disk_tier": str(tmp / "tier"), **self.transport(transport)}
                cache = self.headinfer.HeadCache(model.config, **options)
                logits = self.forward(model, cache, self.ids(9000))
                steps = [self.forward(model, cache, self.ids(1, seed=seed)) for seed in range(3)]
                moved = [getattr(cache.stats(), name) for name in ("tokens", "copies", "link_to_device_bytes")]
                self.note(f"disk tier, bfloat16, {transport}", logits, *steps, moved)

    def generation(self):
        model = self.families.tiny_model("llama")
        padded = self.ids(300, 3)
        mask = self.torch.ones_like(padded)
        mask[1, :100] = 0
        mask[2, :17] = 0
        cases = {
            "greedy": {},
            "sampling": {"do_sample": True, "temperature": 0.8},
            "beams": {"num_beams": 3},
            "several returned": {"do_sample": True, "num_return_sequences": 2},
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
        }
        for transport in TRANSPORTS:
            for name, options in cases.items():
                rows = 1 if name == "prompt lookup" else 3
                with self.headinfer.enable(model, chunk_tokens=CHUNK, **self.transport(transport)):
                    self.torch.manual_seed(0)
                    out = model.generate(
                        padded[:rows], attention_mask=mask[:rows], max_new_tokens=20, pad_token_id=0, **options
                    )
                    self.note(f"generate {name}, {transport}", out)

    def saved_sessions(self, tmp):
        for family in ("llama", "gemma3_text", "qwen3_next"):
            model = self.families.tiny_model(family)
            with self.headinfer.enable(model, chunk_tokens=CHUNK, **self.transport("auto")) as enabled:
                cache = enabled.new_cache()
                ids = self.ids(700, 2)
                for start in (0, 300):
                    self.forward(model, cache, ids[:, start : start + (300 if start == 0 else 400)])
                    cache.save(self.folder / "sessions" / f"{family}-saved-twice", ids, {"title": "a book"})
            folder = self.folder / "sessions" / f"{family}-saved-twice"
            files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
            self.note(f"session files, {family}", {k: hashlib.sha256(v).hexdigest() for k, v in files.items()})
            kept = json.loads((folder / "manifest.json").read_text())
            for name in ("checksum", "arithmetic", "versions"):
                del kept[name]
            self.note(f"manifest, {family}", kept)

    def loaded_sessions(self):
        for folder in sorted((self.folder / "sessions").iterdir()):
            self.note(f"load {folder.name}", *(value for value in self.session(folder.name.split("-")[0], folder.name)
                                              if value is not None))  # fmt: skip

    def command(self, *arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "headinfer", *arguments],
            env={**os.environ, "PYTHONPATH": str(self.checkout / "src"), "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout

    def commands(self, tmp):
        book = tmp / "book.txt"
        book.write_text("\n".join(f"Line {line} of the book says {line * 7919 % 1000}." for line in range(200)))
        question = "The magic number for"
        found = json.loads(self.command("generate", "embedded", "--file", str(book), "--prompt", question,
                                        "--max-new-tokens", "12", "--chunk-tokens", "512", "--json"))  # fmt: skip
        self.note("command generate", found["token_ids"], found["text"])
        sessions = ("--sessions", str(self.folder / "documents"))
        self.command("read", "embedded", "--file", str(book), "--session", "book", "--chunk-tokens", "512", *sessions)
        self.ask(sessions)
        for plan in (
            ("llama-3-8b", "--context", "1M", "--gpu", "rtx4090", "--ram", "256GB"),
            ("llama-3-8b", "--context", "4M", "--gpu", "h200", "--ram", "1024GB", "--no-resident"),
            (
                "llama-3-8b",
                "--context",
                "256K",
                "--gpu",
                "rtx3060",
                "--ram",
                "16GB",
                "--disk",
                "200GB",
                "--weight-bits",
                "4",
            ),
        ):
            self.note(f"command {' '.join(('plan', *plan))}", json.loads(self.command("plan", *plan, "--json")))

    def ask(self, sessions, name="command ask"):
        found = json.loads(self.command("ask", "--session", "book", "The magic number for", "--max-new-tokens", "12",
                                        "--json", *sessions))  # fmt: skip
        answers = found["answers"] if isinstance(found, dict) and "answers" in found else found
        self.note(name, [answer["token_ids"] for answer in answers] if isinstance(answers, list) else answers["text"])


def run(checkout, folder):
    """Run everything with the code of a checkout. Sessions are written into the folder."""
    warnings.simplefilter("ignore")
    runs = Runs(checkout.resolve(), folder)
    with tempfile.TemporaryDirectory() as tmp:
        runs.families_by_transport()
        runs.budgets(Path(tmp))
        runs.generation()
        runs.saved_sessions(Path(tmp))
        runs.loaded_sessions()
        runs.commands(Path(tmp))
    return runs


def compare(before, after):
    """The names whose hashes differ or are missing on one side."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the checkout whose code runs")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", type=Path, metavar="FOLDER", help="write hashes and sessions to this new folder")
    way.add_argument("--compare", type=Path, metavar="FOLDER", help="compare with what --write has written")
    arguments = parser.parse_args()
    if arguments.write:
        (arguments.write / "sessions").mkdir(parents=True)
        runs = run(arguments.checkout, arguments.write)
        (arguments.write / "hashes.json").write_text(json.dumps(runs.hashes, indent=1) + "\n")
        return 0
    before = json.loads((arguments.compare / "hashes.json").read_text())
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "sessions").mkdir()
        runs = run(arguments.checkout, Path(tmp))
        # Load the sessions that the other checkout saved.
        shutil.copytree(arguments.compare / "sessions", Path(tmp) / "old" / "sessions")
        shutil.copytree(arguments.compare / "documents", Path(tmp) / "old" / "documents")
        old = {name: value for name, value in before.items() if name.startswith("load ") or name == "command ask"}
        here = runs.hashes
        runs.hashes = {}
        runs.folder = Path(tmp) / "old"
        runs.loaded_sessions()
        runs.ask(("--sessions", str(runs.folder / "documents")))
        differing = compare(before, here)
        differing += [f"{name}, saved by the other checkout" for name in compare(old, runs.hashes)]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(before) - len(differing)} of {len(before)} results are equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
