"""Every command and snippet of the documentation runs, and its figures are those of benchmarks/results/."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with what the documentation's commands refer to, where they may write."""
    for name in ("recipes", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_snippets(page, project):
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_shell_commands(page, project):
    """`tokenformer` commands run for real; targets of make must exist (the tests run from one of them)."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(page):
        if command.startswith("make "):
            done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        elif command.startswith(("tokenformer ", "python ")):
            done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=240)
        else:
            assert command == ". .venv/bin/activate", f"a new kind of command: {command}"
            continue
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_file_tree_names_every_module():
    tree = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "src" / "tokenformer").iterdir():
        if not path.name.startswith("__") and path.name != "py.typed":
            assert f"      {path.name}" in tree, f"CONTRIBUTING.md does not name {path.name}"


def test_figures_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python benchmarks/readme.py"


def test_example_recipes_parse():
    from tokenformer.recipe import load_recipe

    assert [load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
