"""The layout that README states: imports point downwards, scripts stand alone, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (  # a file imports from layers above its own line only, or from its own
    {
        "console",
        "errors",
        "output",
        "flags",
        "losses",
        "losses_rl",
        "jsonl",
        "chat_template",
        "rows",
        "sentencepiece_json",
        "marker_chat",
        "packing",
        "data",
        "download",
        "architecture",
        "config_fields",
        "weights",
        "tokenizer",
        "tokenizer_files",
        "gsm8k",
        "hub",
        "cpu",
        "matmul",
        "plots",
        "plain_text",
        "sampling",
        "tables",
    },
    {"preferences", "prompts", "toy"},
    {"parallel", "watchdog", "launch"},
    {
        "layers",
        "logprobs",
        "attention",
        "te",
        "model",
        "engine",
        "optim",
        "offload",
        "checkpoint",
        "checkpoint_files",
        "metrics",
        "decode_attention",
    },
    {
        "huggingface",
        "inference",
        "continuous",
        "trtllm",
        "generate",
        "loop",
        "continuation",
        "reference",
        "rewards",
        "audit",
    },
    {"judge", "meta_judge", "rollouts", "self_judge", "memory"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PARTS = sorted(path for path in (ROOT / "align").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(ROOT.glob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """Names of the modules that are imported anywhere in a tree: "align.data", "torch", ..."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "align" else {node.module}
    return found


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    ours = {name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("align.")}
    assert path.stem in LEVEL, f"align/{path.name}: add it to LAYERS"
    assert {name for name in ours if LEVEL[name] > LEVEL[path.stem]} == set()


@pytest.mark.parametrize("path", [*SCRIPTS, *PARTS], ids=lambda path: path.stem)
def test_nothing_imports_a_script(path):
    assert imports(ast.parse(path.read_text())) & {script.stem for script in SCRIPTS} == set()


def test_the_cpu_hack_is_imported_in_one_function_only():
    found = []
    for path in [*SCRIPTS, *PARTS]:
        for node in ast.parse(path.read_text()).body:
            if "align.cpu" in imports(node):
                found.append((path.name, type(node).__name__, getattr(node, "name", None)))
    assert found == [("parallel.py", "FunctionDef", "start")]


@pytest.mark.parametrize("path", [*SCRIPTS, *PARTS], ids=lambda path: path.stem)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 600
