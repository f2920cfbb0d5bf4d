"""Who imports whom, read from the syntax trees: nothing is executed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {
    "hdpo", "_impl", "_rows", "_filter", "_sweep", "_ops", "_torch", "_cpp", "_triton",
    "_layout", "_trajectories", "_bins", "_varlen",
}  # fmt: skip
"""What an operator's file may import of its own package."""
AMONG_LEAVES = {
    "_rows": {"hdpo"},
    "_sweep": {"_rows", "_filter"},
    "_ops": {"_sweep", "_rows", "_filter", "_impl"},
    "_torch": {"_rows"},
    "_cpp": {"_rows", "hdpo"},
    "_triton": {"_rows", "hdpo"},
    "_bins": {"_layout"},
}
STAGES = {"sft", "rl", "evaluate", "curate"}
COMMAND_LINE = {ROOT / "trainer" / name for name in ("cli.py", "eval_cli.py", "curate_cli.py")}
STDLIB = set(sys.stdlib_module_names)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of every module that the file may import, at any depth of nesting.

    `from a import b` counts as both a and a.b, since b may be a module.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return found


def siblings(path: Path, package: str) -> set[str]:
    """First-level modules of package that the file imports, itself left out."""
    names = {n.split(".")[1] for n in imports(path) if n.startswith(package + ".")}
    here = {p.stem for p in (ROOT / package).glob("*.py")}
    here |= {p.name for p in (ROOT / package).iterdir() if p.is_dir()}
    return (names & here) - {path.stem}


KERNELS = [p for p in sources("metis_kernels") if p.parent.name == "metis_kernels"]


def test_there_is_something_to_look_at():
    assert len(KERNELS) >= 8 and any(siblings(p, "metis_kernels") for p in KERNELS)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_operators_import_leaves_and_never_one_another(path):
    if path.stem == "__init__":
        assert "adapters" not in siblings(path, "metis_kernels")
        return
    allowed = LEAVES
    if path.stem in LEAVES:
        allowed = AMONG_LEAVES.get(path.stem, set())
    extra = siblings(path, "metis_kernels") - allowed
    assert not extra, f"{path.name} imports {sorted(extra)}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_the_library_imports_torch_and_triton_alone(path):
    roots = {n.split(".")[0] for n in imports(path)}
    assert roots <= STDLIB | {"torch", "triton", "metis_kernels"}, path.name


@pytest.mark.parametrize("who, where", [("trl", "adapters/trl.py"), ("verl", "adapters/verl.py")])
def test_only_its_adapter_imports_a_trainer(who, where):
    for path in sources("metis_kernels") + sources("trainer"):
        if who in {n.split(".")[0] for n in imports(path)}:
            assert path == ROOT / "metis_kernels" / where, path


def test_the_nouns_of_the_trainer_are_a_leaf():
    path = ROOT / "trainer" / "types.py"
    if not path.exists():
        pytest.skip("no trainer/types.py")
    inside = {n for n in imports(path) if n.split(".")[0] in ("trainer", "metis_kernels")}
    assert not inside, sorted(inside)


def test_stages_are_imported_by_the_command_line_alone():
    for path in sources("trainer"):
        if path in COMMAND_LINE:
            continue
        taken = (
            siblings(path, "trainer") & STAGES
            if path.parent.name == "trainer"
            else {s for s in STAGES if f"trainer.{s}" in imports(path)}
        )
        assert not taken, f"{path.relative_to(ROOT)} imports the stages {sorted(taken)}"


def test_the_trainer_uses_public_names():
    import metis_kernels

    public = set(metis_kernels.__all__)
    for path in sources("trainer"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "metis_kernels" or len(parts) == 1:
                continue
            fine = parts[1] == "adapters" or (len(parts) == 2 and parts[1] in public)
            assert fine, f"{path.relative_to(ROOT)} imports {name}"
