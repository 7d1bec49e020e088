"""The documents: links resolve, commands and options exist, tables are what their scripts print, README is short."""

import ast
import importlib.util
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoTokenizer

import headinfer
from headinfer.cli.main import app
from headinfer.embedded import embedded_model
from headinfer.engine.options import OptionFields

ROOT = Path(__file__).parents[1]
NOT_OURS = {"results", "build", "dist", "node_modules"}  # of the root: what evaluations and builds leave
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.md")
    if (first := path.relative_to(ROOT).parts[0]) not in NOT_OURS and (not first.startswith(".") or first == ".github")
)
# The changelog names commands of earlier versions; the Markdown that the benchmarks write names the calls that made it.
WITH_COMMANDS = [
    path for path in DOCUMENTS if path.name != "CHANGELOG.md" and not path.name.startswith(("h200-", "nvidia-"))
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACEHOLDERS = ("COMMAND", "...")


def without_code(text):
    """Markdown without code blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def code_blocks(text, language):
    """The code of the fenced blocks in a language; "" is a block without one."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The anchors that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_relative_links_resolve(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code((ROOT / path).read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / path).parent / name).resolve() if name else ROOT / path
        assert target.exists(), f"{path} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{path} links to {link}: there is no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_no_document_cites_a_design_document(path):
    name = "design".upper()  # of a document that is not in the repository
    assert not re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8"))


# -- README ------------------------------------------------------------------------------------------------------------


def test_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


def test_readme_begins_with_what_it_does_and_how_to_start():
    first_screen = "\n".join(README.splitlines()[:22])
    for text in ("GPU's memory", "255 MiB", "2.64 s", "./run demo", "./run test", "pip install"):
        assert text in first_screen


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:Exception ignored in. <_io.FileIO")
def test_readme_program_runs(tmp_path, monkeypatch):
    """The Python of README.md, with the embedded model on the CPU."""
    (program,) = code_blocks(README, "python")
    assert len(program.splitlines()) <= 12
    model = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    (tmp_path / "book.txt").write_text("The magic number for tafore is 60732. " * 20)
    monkeypatch.chdir(tmp_path)
    shown = []
    program = program.replace('"cuda"', '"cpu"').replace("Qwen/Qwen2.5-7B-Instruct-1M", str(model))
    with torch.inference_mode():
        exec(compile(program, "README.md", "exec"), {"print": shown.append})
    assert len(shown) == 1


# -- commands and options ----------------------------------------------------------------------------------------------


def commands(text):
    """What follows `headinfer` or `./run` in the code of a document, without the code in Python."""
    text = re.sub(r"^```python\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.*)$", text, flags=re.MULTILINE)]
    code += [line for block in code_blocks(text, "(?:sh|bash|console)?") for line in block.splitlines()]
    for line in code:
        match = re.match(r"(?:[\w.=/-]+ )*?(?:headinfer|\./run) (.+)", line)
        if match and "import" not in line:
            yield match[1]


def check_command(text):
    """Check that a command and its options exist."""
    words = shlex.split(text, comments=True)
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0] in PLACEHOLDERS:
            return
        assert words[0] in command.commands, f"there is no command {text!r}"
        command = command.commands[words.pop(0)]
    known = {"--help"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        if word in ("|", ">", "&&", ";"):
            break
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{text!r}: there is no option {word}"


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=str)
def test_commands_and_their_options_exist(path):
    for text in commands((ROOT / path).read_text(encoding="utf-8")):
        if text.split()[0] != "test":  # of ./run alone
            check_command(text)


def test_the_check_of_commands_finds_mistakes():
    assert list(commands("`headinfer plan --gpu l4` and\n\n    PYTHON=x python -m headinfer raed M\n")) == [
        "plan --gpu l4",
        "raed M",
    ]
    check_command("session list --json")
    for wrong in ("raed M", "plan --gup l4", "session lst"):
        with pytest.raises(AssertionError, match="there is no"):
            check_command(wrong)


def options_of_enable():
    named = [
        name for name, one in inspect.signature(headinfer.enable).parameters.items() if one.kind != one.VAR_KEYWORD
    ]
    return {*OptionFields.__annotations__, *named} - {"model"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_python_parses_and_its_options_exist(path):
    for program in code_blocks((ROOT / path).read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("enable", "HeadCache")):
                assert {keyword.arg for keyword in node.keywords} <= options_of_enable()


def test_the_guide_lists_all_options():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| option \| meaning \|\n(.*?)\n\n", text, flags=re.DOTALL | re.MULTILINE)
    names = {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert names == options_of_enable()


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expectations():
    """benchmarks/expectations.py, as a module."""
    spec = importlib.util.spec_from_file_location("expectations", ROOT / "benchmarks" / "expectations.py")
    module = importlib.util.module_from_spec(spec)
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, spec.name, module)  # its dataclass looks it up
    spec.loader.exec_module(module)
    yield module
    patch.undo()


def test_readme_shows_what_the_planner_predicts(expectations):
    assert expectations.expectations() in README, (
        "run: python benchmarks/expectations.py, and put its table in README.md"
    )
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for machine in expectations.MACHINES:
        assert f"    headinfer plan {machine.arguments}\n" in benchmarks


def test_predictions_for_the_h200_beside_measurements(expectations):
    table = expectations.predicted_and_measured()
    assert table in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    ratios = [float(row.split("|")[-2]) for row in table.splitlines()[2:]]
    decode, reading = ratios[1:-3], ratios[-3:]  # after the token at 1K
    sentence = " ".join(README.split())
    assert f"{min(decode)} to {max(decode)} times the measured decode times from 64K on" in sentence
    assert f"{min(reading)} to {max(reading)} times the reading times" in sentence


def test_what_approximations_buy_is_what_the_planner_predicts(expectations):
    table = expectations.approximations()
    assert table in (ROOT / "docs" / "approximations.md").read_text(encoding="utf-8")
    assert [row.split("|")[1:3] for row in table.splitlines() if row.endswith("| fit |")] == [[" int4 ", " 50% "]]


def test_errors_of_quantised_kv_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("kv_formats", ROOT / "benchmarks" / "kv_formats.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.published() in (ROOT / "docs" / "approximations.md").read_text(encoding="utf-8")


def test_fidelity_of_approximate_kv_is_that_of_the_result_files():
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "benchmarks" / "fidelity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.published() in (ROOT / "docs" / "approximations.md").read_text(encoding="utf-8")


def test_readme_shows_what_the_h200_measured(expectations):
    """The times of headinfer in README.md's table of measurements are those of the result files."""
    shown = {float(seconds) for seconds in re.findall(r"^\| token after [^|]*\| ([\d.]+) s \|", README, re.MULTILINE)}
    measured = expectations.measured_seconds("decode", "past_tokens", "h200-24gb", "h200-first")
    assert shown == {float(f"{seconds:.3g}") for seconds in measured.values() if seconds > 0.1}
