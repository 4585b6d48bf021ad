"""README and docs/ name what exists: flags, files, pages, quoted lines, metrics. mkdocs checks anchors."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from tests.support.files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("[a-z]*/README.md"))]
COMMANDS = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("bench/*.py")]
PARTS = list(ROOT.glob("align/**/*.py"))
SCRIPTS = list(ROOT.glob("train_*.py"))
FOREIGN = set(  # flags of torchrun and Slurm; files of the reader and of a run
    "nproc_per_node nnodes monitor-interval shutdown-timeout nodes ntasks gpus-per-node exclusive time "
    "job-name exclude mpi kill-on-bad-exit container-image container-mounts help "
    "steps.py train_mine.py log.txt".split()
)
FILE = re.compile(r"`((?:align|bench|docs|examples|slurm|tests)/[\w./-]+\.\w+|[\w-]+\.(?:py|txt|sh|sbatch))`")
METRICS = (  # functions that return metrics
    "statistics pair_statistics log_ratio_statistics comparison_statistics compare_with "
    "policy_loss compare check_ratio check_surprise check_update speed".split()
)


def find(kind: type, paths: list[Path]) -> list:
    """Nodes of a kind in the trees of some files."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


FIELDS = [field for node in find(ast.ClassDef, PARTS + COMMANDS) for field in node.body]
NAMES = {field.target.id for field in FIELDS if isinstance(field, ast.AnnAssign)}
NAMES |= {argument.arg for argument in find(ast.arg, COMMANDS)}  # tyro's, of functions
FLAGS = {prefix + name.replace("_", "-") for name in NAMES for prefix in ("", "no-")} | FOREIGN
FOLDERS = "* align/**/* assets/* bench/* examples/* slurm/* tests/* tools/**/*".split()
FILES = {path.name for pattern in FOLDERS for path in ROOT.glob(pattern)} | FOREIGN


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
    text = page.read_text(encoding="utf-8")
    if page.stem == "from_nemo_aligner":  # its first column is NeMo-Aligner's
        text = re.sub(r"^\| .+? \|", "", text, flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - FLAGS == set()
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists() and name not in FILES] == []
    assert [to for to in re.findall(r"\]\((?!http|#)([^)#]+)", text) if not (page.parent / to).exists()] == []
    for name, quote in re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', text, re.DOTALL):
        assert quote in (ROOT / name).read_text(encoding="utf-8")


def test_every_page_and_file_is_listed():
    navigation = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f"'{page}'" not in navigation] == []
    design = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    files = {path.name for path in PARTS} - {"__init__.py"}
    assert files == set(re.findall(r"^\| `(\w+\.py)` \|", design, re.MULTILINE))


def test_the_glossary_has_every_metric():
    """Keys of what functions of METRICS return, and of `metrics` and `statistics` in the scripts."""
    nodes = [node for node in find(ast.FunctionDef, PARTS) if node.name in METRICS]
    names = set()
    for kind in (ast.Assign, ast.AnnAssign, ast.AugAssign):
        for node in find(kind, SCRIPTS):
            targets = {x.id for x in ast.walk(getattr(node, "target", node)) if isinstance(x, ast.Name)}
            nodes += [node.value] * bool(node.value and targets & {"metrics", "statistics"})
    for node in find(ast.Subscript, SCRIPTS):
        if isinstance(node.value, ast.Name) and node.value.id in ("metrics", "statistics"):
            names |= {x.value for x in ast.walk(node.slice) if isinstance(x, ast.Constant)}
    dicts = [part for node in nodes for part in ast.walk(node) if isinstance(part, ast.Dict)]
    names |= {key.value for node in dicts for key in node.keys if isinstance(key, ast.Constant)}
    names = {name.split("/")[-1].replace("_square", "_std") for name in names}
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert names - set(re.findall(r"\w+", text)) == {"std"}  # of reward_statistics.json
    assert {"init_policy_kl", "skipped_updates", "rollout_time"} <= names
