"""Who may know whom: imports point one way, `import packsft` is light, and no package of ours hides Hugging Face's.

The first half reads the sources; the second starts fresh interpreters, since an import cannot be undone.
"""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down. A folder, or a file beside the folders, may import what stands below it. What stands in one line
# does not know its neighbours, and `packsft` itself is asked for names by nobody but the top.
FLOORS = (
    "app",
    "trainer loops",
    "arguments notices",
    "checkpoints",
    "step",
    "model",
    "data",
    "config",
    "packing compat",
)
PACKING_MAY_KNOW = {"numpy"}
KERNELS_MAY_KNOW = {"torch", "triton", "flash_attn", "flash_attn_interface", "packsft_kernels"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is inside a function) of what a file imports, `from . import` resolved, without
    `if TYPE_CHECKING:`; `from package import x` gives `package` and `package.x`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = package[: len(package) + 1 - child.level] if child.level else ()
                module = ".".join([*start, *([child.module] if child.module else [])])
                yield module, inside
                yield from ((f"{module}.{alias.name}", inside) for alias in child.names)
            else:
                yield from visit(child, inside or isinstance(child, (ast.FunctionDef, ast.Lambda)))

    return visit(ast.parse(path.read_text()), False)


def packages(path: Path) -> set[tuple[str, bool]]:
    tops = {(name.partition(".")[0], inside) for name, inside in imports(path)}
    return {(top, inside) for top, inside in tops if top not in sys.stdlib_module_names}


PACKAGE = ROOT / "packsft"
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py", PACKAGE / "__main__.py"})
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(source):
    own = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in (name for name, _ in imports(source) if name.startswith("packsft.")):
        room = name.split(".")[1]  # or a public name, as in `from packsft import PackedSFTTrainer`
        assert FLOOR_OF.get(room, 0) > FLOOR_OF[own] or room == own or own == "app", name


def test_packing_knows_lengths_alone():
    for path in (ROOT / "packsft" / "packing").glob("*.py"):
        assert {top for top, _ in packages(path)} <= PACKING_MAY_KNOW | {"packsft"}, path.name


def test_the_files_of_a_room_import_each_other_in_one_direction():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    graph = {module: {name for name, _ in imports(path) if name in modules} for module, path in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


# ---- fresh interpreters ----

# Put before a program, `without("triton")` makes a package as good as not installed, for `import` and `find_spec`.
WITHOUT = """
    import sys

    class Without:
        def __init__(self, finder, names):
            self.finder, self.names = finder, names

        def __getattr__(self, name):
            return getattr(self.finder, name)

        def find_spec(self, name, path=None, target=None):
            return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def without(*names):
        sys.meta_path[:] = [Without(finder, names) for finder in sys.meta_path]
"""


def python(program: str, cwd: Path = ROOT, *paths: Path) -> dict:
    """Run a program in a fresh interpreter that starts in `cwd`; what it prints last is JSON."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels", *paths])),
        "HF_HUB_OFFLINE": "1",
    }
    source = textwrap.dedent(WITHOUT) + textwrap.dedent(program)
    run = subprocess.run([sys.executable, "-c", source], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_everything_works_without_the_optional_packages_from_the_repository_root():
    # Two traps at once. Nothing that is optional may be needed to import. And in the repository root, where Hugging
    # Face's `kernels` is not installed, our folder of that name is an importable namespace package.
    seen = python("""
        without("triton", "flash_attn", "flash_attn_interface", "matplotlib", "gguf", "peft")
        from importlib.machinery import PathFinder
        our_kernels = PathFinder.find_spec("kernels", [""])  # as if Hugging Face's were not installed
        sys.meta_path.insert(0, type("OnlyOurs", (), {"find_spec": staticmethod(
            lambda name, path=None, target=None: our_kernels if name == "kernels" else None)}))

        import json
        import packsft, transformers, trl
        import torch
        from packsft_kernels import _triton, linear_cross_entropy, varlen_attention
        from packsft_kernels.varlen_attention import BACKENDS, AttentionSpec, why_not

        loss = linear_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor([0, 1])).loss
        import kernels
        print(json.dumps({
            "all": all(getattr(packsft, name) is not None for name in packsft.__all__),
            "trainer": issubclass(packsft.PackedSFTTrainer, trl.SFTTrainer),
            "config": packsft.PackedSFTConfig("unused", report_to="none").packing,
            "triton": _triton.HAS_TRITON,
            "loss": round(loss.item(), 6),
            "able": [name for name in BACKENDS if why_not(name, AttentionSpec("cpu", torch.float32, 8)) is None],
            "kernels": [kernels.__file__, list(kernels.__path__)],
            "hub kernels": transformers.utils.is_kernels_available(),
        }))
    """)
    assert seen == {
        "all": True,
        "trainer": True,
        "config": True,
        "triton": False,
        "loss": 0.313262,  # log(1 + 1 / e)
        "able": ["sdpa"],
        "kernels": [None, [str(ROOT / "kernels")]],  # the trap was set
        "hub kernels": False,
    }


def test_an_installed_package_called_kernels_is_the_one_that_is_found(tmp_path):
    installed = tmp_path / "site" / "kernels"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    program = "import json, kernels; print(json.dumps(kernels.__file__))"
    for cwd in (tmp_path, ROOT):  # our root comes first on the path, but a package goes before a namespace
        assert python(program, cwd, tmp_path / "site") == str(installed / "__init__.py")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_kernels_run_without_anything_of_hugging_face():
    assert (
        python("""
        without("transformers", "trl", "datasets", "accelerate", "peft", "huggingface_hub", "packsft")
        import importlib, json, pkgutil
        import packsft_kernels
        for module in pkgutil.iter_modules(packsft_kernels.__path__):
            importlib.import_module("packsft_kernels." + module.name)
        print(json.dumps(sorted(packsft_kernels.__all__)[-1]))
    """)
        == "varlen_attention"
    )


def test_packing_runs_on_numpy_alone():
    assert python("""
        without("torch", "transformers", "trl", "datasets", "pyarrow", "pandas")
        import json
        from packsft.packing import plan_packs
        print(json.dumps([pack.tolist() for pack in map(plan_packs([5, 2, 3, 1, 4], 8).__getitem__, range(2))]))
    """) == [[0, 2], [4, 1, 3]]


def test_a_stream_is_packed_without_trl():
    assert python("""
        without("trl", "transformers")
        import json
        from packsft.data.streams import PackedStream
        rows = [{"input_ids": ids, "labels": ids} for ids in ([3, 4, 5], [6, 7], [8, 9, 1, 2])]
        packs = PackedStream(rows, 5)
        print(json.dumps([sum(len(document) for document in pack) for pack in packs]))
    """) == [4, 5]


def test_tokenised_rows_are_inspected_without_trl(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [3, 4, 5]}\n{"input_ids": [6, 7]}\n')
    assert python(f"""
        without("trl", "transformers")
        import json, sys
        from packsft.app.cli import main
        exit_code = main(["inspect", {str(tmp_path / "rows.jsonl")!r}, "--max-length", "8"])
        print(json.dumps([exit_code, "transformers" in sys.modules]))
    """) == [0, False]


def test_importing_packsft_is_lighter_than_importing_trl(tmp_path):
    program = """
        before = set(sys.modules)
        import {}
        import json
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    ours, theirs = (python(program.format(name), tmp_path) for name in ("packsft", "trl"))
    assert len(ours) < len(theirs)
    assert {name for name in ours if name.partition(".")[0] not in sys.stdlib_module_names} == {"packsft"}
