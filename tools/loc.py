"""Print how long each Python file and its functions are: `make loc`.

`code` leaves out blank lines, comments and docstrings. Counts the files that git does not ignore.
"""

import ast
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent

Size = tuple[int, int, list[int]]  # lines, lines of code, length of each function


def main() -> None:
    """Print the table, folder by folder with their sums, and the sum of package and scripts."""
    folders: dict[Path, dict[str, Size]] = defaultdict(dict)
    for path in python_files():
        folders[path.parent][path.name] = measure((ROOT / path).read_text(encoding="utf-8"))
    print(f"{'':32}{'lines':>7}{'code':>7}{'functions':>11}{'median':>8}{'longest':>9}")
    for folder, files in sorted(folders.items()):
        for name, size in sorted(files.items()):
            print_row(str(folder / name), size)
        print_row(f"= {folder}/", add(list(files.values())))
        print()
    parts = [folder for folder in folders if folder == Path(".") or folder.parts[0] == "align"]
    product = [size for folder in parts for size in folders[folder].values()]
    print_row("= package and scripts", add(product))


def python_files() -> list[Path]:
    """Python files of the work tree that git does not ignore, relative to its root."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in output.splitlines() if (ROOT / line).exists()]


def measure(source: str) -> Size:
    """Count one file; a function is as long as it is with its docstring."""
    functions: list[int] = []
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.Expr):
            numbers = range(node.lineno, (node.end_lineno or 0) + 1)
            if isinstance(node, ast.FunctionDef):
                functions.append(len(numbers))
            elif isinstance(node.value, ast.Constant):
                docstrings.update(numbers)
    lines = [line.strip() for line in source.splitlines()]
    numbered = enumerate(lines, start=1)
    code = [line for number, line in numbered if line and line[0] != "#" and number not in docstrings]
    return len(lines), len(code), functions


def add(sizes: list[Size]) -> Size:
    """Sum of several files."""
    return (
        sum(lines for lines, _, _ in sizes),
        sum(code for _, code, _ in sizes),
        [length for _, _, lengths in sizes for length in lengths],
    )


def print_row(name: str, size: Size) -> None:
    """One line of the table; a file without functions has no median."""
    lines, code, lengths = size
    median, longest = (f"{statistics.median(lengths):.0f}", max(lengths)) if lengths else ("", "")
    print(f"{name:32}{lines:>7}{code:>7}{len(lengths):>11}{median:>8}{longest:>9}")


if __name__ == "__main__":
    main()
