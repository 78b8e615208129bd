"""The structure of the package in figures: its size, long files and functions, import circles.

    python benchmarks/structure.py

Upward imports are counted by the contracts in pyproject.toml (``lint-imports``). Starting times are
the least of five, in processes of their own: seconds, and seconds of CPU time.
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sphereface2"
MAX_FILE, MAX_FUNCTION = 450, 60


def files() -> dict[str, str]:
    """The package's Python files: paths relative to it, and texts."""
    return {
        path.relative_to(SOURCE).as_posix(): path.read_text("utf-8")
        for path in sorted(SOURCE.rglob("*.py"))
    }


def statements(text: str) -> int:
    """Statements without docstrings."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    strings = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return len(nodes) - len(strings)


def long_functions() -> Iterator[tuple[str, int]]:
    """``file:function`` and lines without its docstring, of those above `MAX_FUNCTION`."""
    for name, text in files().items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or 0) - node.lineno + 1
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= (first.end_lineno or 0) - first.lineno + 1
            if lines > MAX_FUNCTION:
                yield f"{name}:{node.name}", lines


def circles() -> list[set[str]]:
    """Groups of files that import each other, directly or by way of others."""
    graph = grimp.build_graph("sphereface2", cache_dir=None)
    below = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    reached = {name: graph.find_upstream_modules(name) for name in graph.modules}
    found: list[set[str]] = []
    for name in sorted(graph.modules):
        together = {other for other in reached[name] if name in reached[other]} | {name}
        if (len(together) > 1 or name in below[name]) and together not in found:
            found.append(together)
    return found


def seconds(*words: str) -> str:
    """The least time and CPU time of five runs of this Python with these words."""
    wall, cpu = [], []
    for _ in range(5):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{min(wall):.3f} s ({min(cpu):.3f} s of CPU)"


def main() -> None:
    texts = files()
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    long_files = {name: count for name, count in lines.items() if count > MAX_FILE}
    functions = sorted(long_functions(), key=lambda one: -one[1])
    print(f"files {len(texts)}, lines {sum(lines.values()):,}, ", end="")
    print(f"statements {sum(map(statements, texts.values())):,}")
    print(f"files above {MAX_FILE} lines: {len(long_files)}")
    for name, count in sorted(long_files.items(), key=lambda one: -one[1]):
        print(f"  {count:5} {name}")
    print(f"functions above {MAX_FUNCTION} lines without their docstrings: {len(functions)}")
    for name, count in functions:
        print(f"  {count:5} {name}")
    print(f"import circles of files: {len(circles())}", *circles(), sep="\n  ")
    print("sphereface2 --help:", seconds("-m", "sphereface2", "--help"))
    print("import sphereface2:", seconds("-c", "import sphereface2"))
    print("python alone:", seconds("-c", ""))


if __name__ == "__main__":
    main()
