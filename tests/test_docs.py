"""Every command and snippet of the documentation runs, and its figures are those of benchmarks/results/.

The checkpoints that they name are small ones here: golden case M, with an embedding of bytes, and random ordinary ones.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import official_reference
import pytest
import torch
import yaml
from golden_data import MANIFEST, inputs
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig
from typer.testing import CliRunner

from tokenformer.cli import app as cli
from tokenformer.compare.recipe import load_compare_recipe
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.plan import read_plan
from tokenformer.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with what the documentation's commands refer to, where they may write."""
    for name in ("recipes", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    state = {n.removeprefix("case_m."): t for n, t in inputs("M").items() if "sequential" in n}
    tokenizer = make_tokenizer("bytes", None)
    tokenizer.save_pretrained(tmp_path)
    state["sequential.0.word_embeddings.weight"] = torch.randn(len(tokenizer), 64)
    torch.save(state, tmp_path / "pytorch_model.bin")
    fields = official_reference.fields(**MANIFEST["cases"]["M"]["config"])
    (tmp_path / "150M_eval.yml").write_text(yaml.safe_dump(fields))
    ordinary = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, config in (("smollm2", LlamaConfig), ("pythia", GPTNeoXConfig)):
        sizes = {**ordinary, "intermediate_size": 80, "max_position_embeddings": 128}
        AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_python_snippets(page, project):
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the first page that trains the quick recipe leaves its run for the others."""
    return tmp_path_factory.mktemp("trained") / "quick"


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_shell_commands(page, project, trained):
    """Commands run for real, `tokenformer` in this process; targets of make must exist (the tests run from one)."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(page):
        if command == "tokenformer train recipes/quick.yaml" and trained.exists():
            shutil.copytree(trained, project / "runs" / "quick")
            continue
        if command.startswith("make "):
            done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        elif command.startswith("tokenformer "):
            in_process = CliRunner().invoke(cli.app, shlex.split(command)[1:])
            assert in_process.exit_code == 0, f"{command}\n{in_process.output}\n{in_process.exception}"
            if command == "tokenformer train recipes/quick.yaml":
                shutil.copytree(project / "runs" / "quick", trained)
            continue
        elif command.startswith("python "):
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
    for page in readme.PAGES:
        assert readme.filled(page) == (ROOT / page).read_text(), "run python benchmarks/readme.py"


def test_example_recipes_parse():
    assert [load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    assert [load_compare_recipe(path) for path in sorted((ROOT / "recipes" / "compare").glob("*.yaml"))]
    assert read_plan(ROOT / "recipes" / "plan" / "paper.yaml")  # the other one continues a run
