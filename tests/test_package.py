"""What the package looks like from outside, and which way its imports point."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

import tokenformer
from tokenformer.after_import import after_import
from tokenformer.cli.app import app

ROOT = Path(tokenformer.__file__).parent
# A wing imports its own modules and what stands above it in this list; modules never import each other in a circle.
ORDER = [
    ["after_import", "batches", "errors", "quiet", "sections", "units"],
    ["models"],
    ["growth"],
    ["data", "cost", "law"],
    ["checkpoints", "evaluation", "explain"],
    ["convert", "training", "serve"],
    ["compare", "plan", "advise"],
    ["cli", "__main__"],
]


def modules() -> dict[str, Path]:
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(name: str, path: Path) -> set[str]:
    """Our own modules that a module imports, by name relative to the package."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not (node.module or "").startswith("tokenformer") or node.level, f"{name}: import our own relatively"
        if node.level:
            base = [p for p in package if p][: len([p for p in package if p]) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
            known = modules()
            found |= {c for c in (f"{target}.{a.name}".strip(".") for a in node.names) if c in known} or {target}
    return found


def test_every_wing_has_its_place():
    assert {name.split(".")[0] for name in modules()} - {""} == {wing for wings in ORDER for wing in wings}


def test_imports_follow_the_order_and_never_a_circle():
    place = {wing: i for i, wings in enumerate(ORDER) for wing in wings}
    graph = {name: imports_of(name, path) for name, path in modules().items() if name}
    for name, targets in graph.items():
        for target in targets:
            ours, theirs = name.split(".")[0], target.split(".")[0]
            assert place[theirs] <= place[ours], f"{name} imports {target}, which stands below it"

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        for target in graph[name]:
            visit(target, (*path, name))

    for name in graph:
        visit(name, ())


def test_several_may_act_after_one_import(tmp_path, monkeypatch):
    (tmp_path / "imported_by_a_test.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    acted = []
    for who in ("first", "second"):
        after_import("imported_by_a_test", lambda who=who: acted.append(who))
    assert not acted
    monkeypatch.delitem(sys.modules, "imported_by_a_test", raising=False)
    import_module("imported_by_a_test")
    assert acted == ["first", "second"]


def test_models_need_nothing_else_of_ours():
    for name, path in modules().items():
        if name.startswith("models"):
            assert all(target.startswith("models") for target in imports_of(name, path))


def test_pattention_needs_torch_only():
    roots = set()
    for node in ast.walk(ast.parse((ROOT / "models" / "pattention.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "fused", "names", "token_group"}


def test_public_api_is_pinned():
    assert tokenformer.__all__ == [
        "PRESETS",
        "CheckpointError",
        "ConversionError",
        "DataError",
        "EvaluationError",
        "ExportedForCausalLM",
        "GrowthError",
        "HubError",
        "MissingExtraError",
        "Pattention",
        "RecipeError",
        "TokenformerBlocksConfig",
        "TokenformerConfig",
        "TokenformerError",
        "TokenformerForCausalLM",
        "TokenformerForConditionalGeneration",
        "TokenformerForImageClassification",
        "TokenformerModel",
        "TokenformerMultimodalConfig",
        "TokenformerMultimodalModel",
        "TokenformerProcessor",
        "TokenformerVisionConfig",
        "TokenformerVisionModel",
        "TokenizerError",
        "__version__",
        "attach",
        "consolidate",
        "drop",
        "evaluate",
        "export",
        "freeze",
        "grow",
        "load",
        "merge",
        "pack",
        "prune",
        "route",
        "save",
        "shrink",
        "sort",
        "split",
        "text_blocks",
        "tokenise",
        "train",
        "unfreeze",
        "using",
    ]
    assert set(tokenformer.__all__) <= set(dir(tokenformer))
    assert all(hasattr(tokenformer, name) for name in tokenformer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shrnk'"):
        _ = tokenformer.shrnk
    with pytest.warns(DeprecationWarning, match="called tokenformer.sort now"):
        assert tokenformer.slice is tokenformer.sort


def test_names_are_imported_from_where_the_type_checker_finds_them():
    """The lazy names and the imports under TYPE_CHECKING say the same."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        a.asname or a.name: f"{i.module}.{a.name}"
        for i in guarded.body
        if isinstance(i, ast.ImportFrom)
        for a in i.names
    }
    assert homes.keys() | {"__version__"} == set(tokenformer.__all__)
    assert {name: home for name, home in homes.items() if not home.startswith("errors.")} == tokenformer._HOMES


def test_no_module_hides_a_public_name():
    """Importing `tokenformer.evaluate`, were it a module, would put it where the function is."""
    assert not {name for name in modules() if "." not in name} & set(tokenformer.__all__)


SLOW = ["torch", "transformers", "datasets", "accelerate", "wrapt"]
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_param_tokens": 8}
BOTH = f"""
import pickle, sys, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("tokenformer", **{ {**TINY, "qkv_param_tokens": 8, "output_param_tokens": 8}!r})
model = AutoModelForCausalLM.from_config(config)
assert type(model) is tokenformer.TokenformerForCausalLM
assert type(AutoModel.from_config(config)) is tokenformer.TokenformerModel
assert type(pickle.loads(pickle.dumps(model))) is type(model)
model.save_pretrained(sys.argv[1])
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])) is type(model)
"""
ORDERS = {
    # GPT-NeoX's module imports the Auto classes in its middle, and our model imports GPT-NeoX's.
    "ours first": f"import sys, tokenformer; assert not set({SLOW}) & set(sys.modules)\n"
    "from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXModel",
    "transformers first": "import transformers; from transformers import AutoModelForCausalLM; import tokenformer",
}


@pytest.mark.parametrize("order", ["ours first", pytest.param("transformers first", marks=pytest.mark.slow)])
def test_auto_classes_know_ours_whichever_is_imported_first(order, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ORDERS[order] + BOTH, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_command_line_is_pinned():
    commands = dict(typer.main.get_command(app).commands)
    commands |= {f"convert {name}": command for name, command in commands.pop("convert").commands.items()}
    flags = {
        name: sorted(
            o for p in command.params for o in ([*p.opts] if p.param_type_name == "option" else [p.name.upper()])
        )
        for name, command in commands.items()
    }
    assert flags == {
        "train": ["--force", "--output", "--resume", "-o", "RECIPE"],
        "grow": [
            "--at",
            "--ffn",
            "--ffn-param-tokens",
            "--force",
            "--name",
            "--norm",
            "--num-hidden-layers",
            "--num-loops",
            "--output",
            "--output-param-tokens",
            "--preset",
            "--qkv-param-tokens",
            "--seed",
            "--tokens",
            "--weights",
            "-o",
            "CHECKPOINT",
        ],
        "freeze": ["--force", "--output", "-o", "CHECKPOINT", "PARTS"],
        "unfreeze": ["--force", "--output", "-o", "CHECKPOINT", "PARTS"],
        "drop": ["--force", "--output", "-o", "CHECKPOINT", "NAMES"],
        "consolidate": ["--force", "--name", "--output", "-o", "CHECKPOINT", "NAMES"],
        "merge": ["--bridge", "--by", "--force", "--norm", "--output", "--rename", "-o", "CHECKPOINT", "OTHER"],
        "split": ["--force", "--output", "-o", "CHECKPOINT", "GROUP"],
        "attach": ["--force", "--name", "--output", "-o", "ADDON", "CHECKPOINT"],
        "pack": ["--force", "--output", "-o", "CHECKPOINT"],
        "prune": ["--force", "--keep", "--output", "--scope", "--text", "-o", "CHECKPOINT"],
        "sort": ["--force", "--output", "--text", "-o", "CHECKPOINT"],
        "slice": ["--force", "--output", "--text", "-o", "CHECKPOINT"],
        "shrink": ["--force", "--keep", "--output", "-o", "CHECKPOINT"],
        "route": ["--force", "--other", "--output", "--own", "--per", "-o", "CHECKPOINT", "GROUP"],
        "inspect": ["--json", "--picture", "--prompt", "--text", "CHECKPOINT"],
        "generate": ["--keep", "--max-new-tokens", "--seed", "--temperature", "--top-k", "CHECKPOINT", "PROMPT"],
        "export": ["--force", "--output", "--text", "--to", "--weights", "-o", "CHECKPOINT"],
        "recipe": ["--explain"],
        "evaluate": [
            "--batch-size",
            "--images",
            "--json",
            "--keep",
            "--limit",
            "--sequence-length",
            "--split",
            "--tasks",
            "--text",
            "CHECKPOINT",
        ],
        "compare": ["--json", "--output", "--workers", "-o", "RECIPE"],
        "report": ["--json", "--output", "-o", "RESULTS"],
        "plan": ["--budget", "--json", "--run", "PLAN"],
        "push": ["--license", "--private", "CHECKPOINT", "REPOSITORY"],
        "convert official": ["--config", "--force", "--output", "--tokenizer", "-o", "WEIGHTS"],
        "convert transformer": ["--force", "--output", "-o", "CHECKPOINT"],
        "convert to-official": ["--force", "--output", "-o", "CHECKPOINT"],
    }
    assert all(p.help for c in commands.values() for p in c.params if p.param_type_name == "option")


def test_no_file_is_too_long_to_read_in_one_sitting():
    for name, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, name


@pytest.mark.parametrize("command", [["-m", "tokenformer"], ["-c", "from tokenformer.cli.app import main; main()"]])
def test_runs_as_a_module_and_as_a_script(command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "without losing what it knows" in done.stdout


QUICK = """
import contextlib, io, sys
from tokenformer.cli.app import main
for arguments, code in {"--help": 0, "--version": 0, "grow --help": 0, "gro": 2, "grow --hlp": 2, "train none.yaml": 2,
                        "compare none.yaml": 2, "plan none.yaml": 2, "report none.jsonl -o x": 2, "inspect none": 2,
                        "grow none -o x": 2, "generate none": 2, "merge none none -o x": 2, "train": 2}.items():
    sys.argv = ["tokenformer", *arguments.split()]
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
            found = 0
        except SystemExit as end:
            found = end.code or 0
    assert found == code, (arguments, found)
    assert (out if code == 0 else err).getvalue(), arguments
    slow = {"torch", "transformers", "datasets", "accelerate", "wrapt", "numpy", "rich.console"} & set(sys.modules)
    assert not slow, (arguments, slow)
"""


def test_help_and_usage_mistakes_import_nothing_slow(tmp_path):
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
