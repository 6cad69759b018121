"""What the README and docs/ say can be done, done: every block of code is run, or says why not.

Blocks of a page run in order, in a folder that looks like a clone after the demos: the names of the
models that these make are there, each a small trained ReLU llama. Where ``make`` or another machine
is needed the block says so in a comment before it; ``<!-- long -->`` are run with --whole.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import PAGES, ROOT, RUN, anchors, blocks, inline, links, name, prose

from mlx_flash.cli.main import build_parser
from mlx_flash.conversion.convert import convert

MODELS = ("relu-smollm2-135m", "llama-relu-austen")
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
FOLDERS = ("mlx_flash/", "coreml_export/", "docs/", "tests/", "benchmarks/", "demos/", "training/")
MADE = ("demos/out", "benchmarks/out")  # what runs leave there
COMMANDS = ("make ", "mlx_flash ", "python ", "pip ")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model directory that stands in for those of the demos."""
    folder = tmp_path_factory.mktemp("model")
    source = folder / "source"
    shutil.copytree(ROOT / "tests" / "fixtures" / "llama-relu-austen", source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return convert(source, folder / "converted")


@pytest.fixture
def clone(tmp_path, model, monkeypatch):
    """A folder like a clone of the repository after the demos, and the environment to run in."""
    for entry in ROOT.iterdir():
        if entry.name not in ("demos", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "demos").mkdir()
    for file in (ROOT / "demos").glob("*.py"):
        (tmp_path / "demos" / file.name).symlink_to(file)
    for directory in MODELS:
        shutil.copytree(model, tmp_path / "demos" / "out" / directory)
    commands = tmp_path / ".commands"
    commands.mkdir()
    for command, runs in {"mlx_flash": "-m mlx_flash", "python": ""}.items():
        file = commands / command
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {runs} "$@"\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def to_run(page):
    found = [block for block in blocks(page) if block.language in RUN]
    return [block for block in found if block.mark in ("", "long")]


@pytest.mark.deeper
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=name)
def test_blocks_run(page, clone, request):
    for block in to_run(page):
        if block.mark == "long" and not request.config.getoption("--whole"):
            continue
        how = ["python", "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run([*how, block.code], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page):
    """A language at every fence; commands stand in fences, not in paragraphs that are indented."""
    for block in blocks(page):
        assert block.language, f"{block} has no language"
        assert block.language in RUN or block.language in ("text", "swift", "json"), str(block)
        if block.language == "swift":
            assert block.mark.startswith("not run: ")
    indented = [line.strip() for line in prose(page).splitlines() if line.startswith("    ")]
    assert not [line for line in indented if line.startswith(COMMANDS)]


def test_files_are_shown_as_they_are():
    for block in [block for page in PAGES for block in blocks(page)]:
        if block.mark.startswith("file: "):
            assert block.code == (ROOT / block.mark[6:]).read_text(), str(block)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_are_alive(page):
    for target in links(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    """What looks like a file or folder of the repository is one."""
    for text in inline(page):
        if not re.fullmatch(r"[\w./-]+", text) or text.startswith(MADE):
            continue
        if not text.startswith(FOLDERS) and not text.endswith(".py"):
            continue
        places = (ROOT, page.parent, ROOT / "mlx_flash", ROOT / "coreml_export")
        assert any((place / text).exists() for place in places), f"{name(page)} names {text}"


def commands(page):
    """Every command that a page names, in a block or in its text."""
    lines = [line for block in blocks(page) if block.language in RUN[:2] for line in joined(block)]
    found = [re.split(r"\s+#|\s*[;|&]", line)[0].strip() for line in [*lines, *inline(page)]]
    found = [
        f"python -m {text}" if re.match(r"benchmarks\.\w+\.\w", text) else text for text in found
    ]
    return [command for command in found if command.startswith(COMMANDS)]


def joined(block):
    return block.code.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    """Targets of make, subcommands and flags of mlx_flash, modules and flags of scripts."""
    for command in commands(page):
        words = command.split()
        if words[0] == "make":
            check_make(words[1:])
        elif words[0] == "mlx_flash":
            check_flags(words[1:], subcommands())
        elif words[:2] == ["python", "-m"] and words[2:] and "GROUP" not in command:
            check_module(words[2], words[3:], command)
        elif words[0] == "python" and words[1].endswith(".py"):
            check_script(ROOT / words[1], words[2:], command)


def check_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]
    assert set(wanted) <= set(targets), f"make {' '.join(words)}"


def subcommands():
    """Subcommand -> its flags."""
    parser = build_parser()
    action = next(a for a in parser._actions if a.choices and a.dest == "command")
    return {name: set(sub._option_string_actions) for name, sub in action.choices.items()}


def check_flags(words, known):
    if words[:1] in ([], ["--version"], ["--help"]):
        return
    assert words[0] in known, f"mlx_flash {words[0]}"
    used = {word.strip("[]").split("=")[0] for word in words[1:] if word.strip("[").startswith("-")}
    assert {word for word in used if not re.fullmatch(r"-?\d.*", word)} <= known[words[0]]


def check_module(module, words, command):
    path = ROOT / module.replace(".", "/")
    if not (ROOT / module.split(".")[0]).exists():
        return  # a module of somebody else
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
    check_script(file, words, command)


def check_script(file, words, command):
    """Flags, and names behind --only, stand as text in the script or the files beside it."""
    assert file.exists(), command
    text = "\n".join(f.read_text() for f in file.parent.rglob("*.py"))
    for i, word in enumerate(words):
        if word.startswith("--"):
            field = word[2:].replace("-", "_")  # flags that are made of a dataclass's fields
            assert f'"{word}"' in text or re.search(rf"^    {field}: ", text, re.M), command
        if word == "--only":
            for value in words[i + 1].split(","):
                assert re.search(rf"\b{re.escape(value)}\b", text), command


def test_families_page_is_that_of_the_tables():
    done = subprocess.run(
        [sys.executable, "-c", "import make_families; print(make_families.page(), end='')"],
        cwd=ROOT / "docs", env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    page = ROOT / "docs" / "families.md"
    assert page.read_text() == done.stdout, "run: python docs/make_families.py"


def test_index_names_every_page():
    index = ROOT / "docs" / "index.md"
    named = {Path(target).name for target in links(index)}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= named | {"index.md"}
