"""The layout that docs/design.md states: folders are floors, imports point down, files stay small."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.files import ROOT

FLOORS = (  # folders of align/; "" are its own files
    ("",),
    ("losses", "kernels"),
    ("data", "tracking"),
    ("distributed",),
    ("model",),
    ("training",),
    ("generation",),
    ("rewards",),
    ("judging", "planning"),
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
PARTS = sorted(path for path in (ROOT / "align").rglob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(ROOT.glob("*.py"))
TESTS, BENCHMARKS = (sorted((ROOT / folder).rglob("*.py")) for folder in ("tests", "bench"))


def name_of(path: Path) -> str:
    """A file as imports spell it: align.data.rows."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path): path for path in PARTS}


def imports(tree: ast.AST) -> set[str]:
    """Modules that are imported anywhere in a tree: "align.data.rows", "torch", ..."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & set(MODULES) or {node.module}
    return names


def imported_names(path: Path) -> set[str]:
    """Modules that a file imports, and module.name of each name that it imports from one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts_used(path: Path) -> set[str]:
    """The files of align/ that a file imports."""
    return imports(ast.parse(path.read_text(encoding="utf-8"))) & set(MODULES)


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") == 2 else ""


@pytest.mark.parametrize("path", PARTS, ids=name_of)
def test_imports_point_down(path):
    own = folder_of(name_of(path))
    assert own in FLOOR, f"align/{own}: add it to FLOORS"
    wrong = [
        name for name in parts_used(path) if folder_of(name) != own and FLOOR[folder_of(name)] >= FLOOR[own]
    ]
    assert not wrong


def test_no_file_imports_itself_by_others():
    used = {name: parts_used(path) for name, path in MODULES.items()}
    while used:
        free = [name for name, others in used.items() if not others & set(used)]
        assert free, f"a cycle among {sorted(used)}"
        for name in free:
            del used[name]


@pytest.mark.parametrize("path", [*SCRIPTS, *PARTS], ids=name_of)
def test_nothing_imports_a_script(path):
    names = imports(ast.parse(path.read_text(encoding="utf-8")))
    assert names & {script.stem for script in SCRIPTS} == set()


def test_the_cpu_hack_is_imported_in_one_function_only():
    places = []
    for path in [*SCRIPTS, *PARTS]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if "align.distributed.megatron_on_cpu" in imports(node):
                places.append((path.name, type(node).__name__, getattr(node, "name", None)))
    assert places == [("parallel.py", "FunctionDef", "start")]


def patches_of_megatron(tree: ast.AST) -> list[int]:
    """Lines that assign to an attribute of a module or class of Megatron."""
    names = set()  # that imports bind to something of Megatron
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {"megatron" for alias in node.names if alias.name.startswith("megatron.")}
    lines = []
    for node in ast.walk(tree):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets = [ast.Attribute(node.args[0], "")]
        for target in targets:
            while isinstance(target, ast.Attribute):
                target = target.value
                if isinstance(target, ast.Name) and target.id in names:
                    lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", [*SCRIPTS, *PARTS], ids=name_of)
def test_megatron_is_patched_in_two_files_only(path):
    if path.stem not in ("megatron_patches", "megatron_on_cpu"):
        assert patches_of_megatron(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_a_patch_of_megatron_is_seen():
    source = (
        "from megatron.core import a\nfrom megatron.core.b import C\na.d = 1\nC.e.f = 2\nsetattr(a, 'g', 3)"
    )
    assert patches_of_megatron(ast.parse(source + "\na = C()\nx.y = a")) == [3, 4, 5]


@pytest.mark.parametrize("path", [*SCRIPTS, *PARTS], ids=name_of)
def test_files_stay_small(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= (450 if path in PARTS else 530)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (180 if node.name == "main" else 60), node.name


def test_nothing_imports_a_test():
    """Whatever two test files need is in tests/support."""
    tests = re.compile(r"tests\.(.+\.)?(test_\w+|conftest)(\..+)?")
    assert not [path for path in [*TESTS, *BENCHMARKS] if any(map(tests.fullmatch, imported_names(path)))]


def test_benchmarks_import_nothing_of_the_tests():
    assert not [
        path for path in BENCHMARKS if any(name.startswith("tests.") for name in imported_names(path))
    ]


def test_no_worker_has_the_name_of_a_script():
    """A worker's folder is the first on its sys.path: `import generate` must not find the worker."""
    workers = {path.stem for path in (ROOT / "tests/workers").glob("*.py")}
    assert not workers & {script.stem for script in SCRIPTS}
