"""Write the docstrings of Python's standard library as JSON lines: the text of finetune.toml.

    python docstrings.py               # writes docstrings.jsonl here
    python docstrings.py FILE.jsonl

Each line is an object with `name`, what is documented, and `text`, its docstring. Needs nothing but Python.
"""

import ast
import json
import sys
import sysconfig
import warnings
from pathlib import Path

LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
LEAST_CHARACTERS = 40  # shorter ones say little
END = "\n\n"  # bytes have no token for the end of a text


def docstrings(tree, name):
    """Yield (name, docstring) of a module and all that is in it."""
    if text := ast.get_docstring(tree):
        yield name, text
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(node, f"{name}.{node.name}")


def of_library():
    """Yield (name, docstring) of the whole standard library, in the same order everywhere."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            try:
                with warnings.catch_warnings(action="ignore"):  # old modules have odd escapes
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # templates and the like
                continue
            yield from docstrings(tree, ".".join(parts).removesuffix(".__init__"))


def main():
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docstrings.jsonl")
    seen, num_bytes = set(), 0
    with target.open("w", encoding="utf-8") as file:
        for name, text in of_library():
            if len(text) >= LEAST_CHARACTERS and text not in seen:
                seen.add(text)
                file.write(json.dumps({"name": name, "text": text + END}) + "\n")
                num_bytes += len(text.encode())
    print(f"wrote {len(seen):,} docstrings, {num_bytes / 1e6:.1f} MB of text, to {target}")


if __name__ == "__main__":
    main()
