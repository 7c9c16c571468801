"""What the package looks like from outside, and which way its imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import tokenformer
from tokenformer.cli.app import app

ROOT = Path(tokenformer.__file__).parent
# A wing imports its own modules and what stands above it in this list; modules never import each other in a circle.
ORDER = [
    ["batches", "errors", "quiet", "sections"],
    ["models"],
    ["growth"],
    ["data", "cost"],
    ["checkpoints", "evaluate", "explain"],
    ["convert", "training"],
    ["compare", "plan", "when_to_grow"],
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
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_models_need_nothing_else_of_ours():
    for name, path in modules().items():
        if name.startswith("models"):
            assert all(target.startswith("models") for target in imports_of(name, path))


def test_pattention_needs_torch_only():
    roots = set()
    for node in ast.walk(ast.parse((ROOT / "models" / "pattention.py").read_text())):
        if isinstance(node, ast.Import):
            roots |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "fused"}


def test_public_api_is_pinned():
    assert (
        tokenformer.__all__
        == sorted(tokenformer.__all__)
        == [
            "PRESETS",
            "Pattention",
            "TokenformerConfig",
            "TokenformerForCausalLM",
            "TokenformerModel",
            "attach",
            "consolidate",
            "drop",
            "freeze",
            "grow",
            "merge",
            "prune",
            "route",
            "shrink",
            "sort",
            "split",
            "unfreeze",
        ]
    )
    assert all(hasattr(tokenformer, name) for name in tokenformer.__all__)


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
            "--ffn",
            "--ffn-param-tokens",
            "--force",
            "--name",
            "--norm",
            "--num-hidden-layers",
            "--output",
            "--output-param-tokens",
            "--preset",
            "--qkv-param-tokens",
            "--seed",
            "-o",
            "CHECKPOINT",
        ],
        "freeze": ["--force", "--output", "-o", "CHECKPOINT", "PARTS"],
        "unfreeze": ["--force", "--output", "-o", "CHECKPOINT", "PARTS"],
        "drop": ["--force", "--output", "-o", "CHECKPOINT", "NAMES"],
        "consolidate": ["--force", "--name", "--output", "-o", "CHECKPOINT", "NAMES"],
        "merge": ["--force", "--norm", "--output", "--rename", "-o", "CHECKPOINT", "OTHER"],
        "split": ["--force", "--output", "-o", "CHECKPOINT", "GROUP"],
        "attach": ["--force", "--name", "--output", "-o", "ADDON", "CHECKPOINT"],
        "prune": ["--force", "--keep", "--output", "--scope", "--text", "-o", "CHECKPOINT"],
        "sort": ["--force", "--output", "--text", "-o", "CHECKPOINT"],
        "slice": ["--force", "--output", "--text", "-o", "CHECKPOINT"],
        "shrink": ["--force", "--keep", "--output", "-o", "CHECKPOINT"],
        "route": ["--force", "--other", "--output", "--own", "-o", "CHECKPOINT", "GROUP"],
        "inspect": ["--picture", "--prompt", "--text", "CHECKPOINT"],
        "generate": ["--keep", "--max-new-tokens", "--seed", "--temperature", "--top-k", "CHECKPOINT", "PROMPT"],
        "recipe": ["--explain"],
        "evaluate": ["--batch-size", "--keep", "--limit", "--sequence-length", "--tasks", "--text", "CHECKPOINT"],
        "compare": ["--output", "--workers", "-o", "RECIPE"],
        "report": ["--output", "-o", "RESULTS"],
        "plan": ["PLAN"],
        "push": ["--license", "--private", "CHECKPOINT", "REPOSITORY"],
        "convert official": ["--config", "--force", "--output", "--tokenizer", "-o", "WEIGHTS"],
        "convert transformer": ["--force", "--output", "-o", "CHECKPOINT"],
        "convert to-official": ["--force", "--output", "-o", "CHECKPOINT"],
    }
    assert all(p.help for c in commands.values() for p in c.params if p.param_type_name == "option")


def test_no_file_is_too_long_to_read_in_one_sitting():
    for name, path in modules().items():
        assert len(path.read_text().splitlines()) <= 450, name


@pytest.mark.parametrize("command", [["-m", "tokenformer"], ["-c", "from tokenformer.cli.app import main; main()"]])
def test_runs_as_a_module_and_as_a_script(command):
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "without losing what it knows" in done.stdout
