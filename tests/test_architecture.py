# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a program can check: floors, imports, sizes, words, docstrings, links.

`docs/architecture.md` draws the floors; `FLOORS` below is the same picture, as a table.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvfp4_experts

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "nvfp4_experts"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = sorted(
    path
    for folder in ("src", "tests", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu"}
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "data").rglob("*.md"))

FLOORS = {
    "_version": 0,
    "errors": 0,
    "formats": 0,
    "layouts": 1,
    "kernels": 2,
    "layers": 3,
    "checkpoints": 4,
    "diagnostics": 5,
    "integrations": 5,
    "cli": 6,
}
MAX_LINES = 500
FOREIGN_WORDS = {"sf", "gs", "gsa", "ws2", "descale", "l1", "mat_b", "buf"}
MACHINE_QUESTIONS = {
    "is_available",
    "get_device_capability",
    "get_device_properties",
    "get_device_name",
    "device_count",
    "get_arch_list",
    "get_cpu_capability",
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
HEAVY = {"triton", "flashinfer", "transformers", "matplotlib"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def every(paths: list[Path]) -> pytest.MarkDecorator:
    assert paths, "nothing to check: the tree has moved"
    return pytest.mark.parametrize("path", paths, ids=name_of)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package_imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted path below the package) of each import of our own code in a file, wherever it stands."""
    here = ("nvfp4_experts", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, target[1:]) for target in targets if target[0] == "nvfp4_experts")


def outside_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of each import of somebody else's code in a file, wherever it stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module.split(".")[0]


# --- floors and imports -------------------------------------------------------------------------------------------


@every([path for path in SOURCES if path != PACKAGE / "__init__.py"])
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for line, target in package_imports(path):
        top = "_version" if target == ("__version__",) else target[0]
        assert top in FLOORS, f"{name_of(path)}:{line} imports {'.'.join(target)}, which is on no floor"
        assert top == own or top == "errors" or FLOORS[top] < FLOORS[own], (
            f"{name_of(path)}:{line} is on floor {FLOORS[own]} ({own}) and imports {'.'.join(target)}, "
            f"on floor {FLOORS[top]}; import from lower floors only"
        )


def test_every_folder_has_a_floor() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert found == set(FLOORS)


KERNELS = PACKAGE / "kernels"
COMMON = {"ops", "dispatch", "target", "tiled", "plain", "native", "cuda", "one_by_one"}
BACKENDS = {path.stem for path in KERNELS.iterdir()} - {"__init__", "__pycache__", *COMMON}


@every(sorted(KERNELS.rglob("*.py")))
def test_backends_do_not_know_each_other(path: Path) -> None:
    own = path.relative_to(KERNELS).parts[0].removesuffix(".py")
    if own not in BACKENDS:
        return
    for line, target in package_imports(path):
        assert target[:1] != ("kernels",) or target[1] not in BACKENDS - {own}, (
            f"{name_of(path)}:{line}: the backend {own} imports {'.'.join(target)}"
        )


@every(SOURCES)
def test_optional_packages_have_one_door(path: Path) -> None:
    doors = {
        "triton": "kernels/sm",
        "flashinfer": "kernels/sm100/vendor_flashinfer.py",
        "transformers": "integrations/transformers/",
    }
    where = path.relative_to(PACKAGE).as_posix()
    for line, package in outside_imports(path):
        if package in doors:
            assert where.startswith(doors[package]), f"{name_of(path)}:{line} imports {package}"


@pytest.mark.parametrize("what", ["nvfp4_experts", "every public name", "nvfp4_experts.cli"])
def test_importing_loads_nothing_heavy(what: str) -> None:
    load = {
        "every public name": "import nvfp4_experts as n; [getattr(n, name) for name in n.__all__]",
    }.get(what, f"import {what}")
    program = (
        f"import json, sys, torch; before = set(sys.modules); {load}; new = set(sys.modules) - before;"
        "print(json.dumps([sorted({name.split('.')[0] for name in new}), torch.cuda.is_initialized()]))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    loaded, cuda = json.loads(out.stdout)
    assert "nvfp4_experts" in loaded
    assert not HEAVY & set(loaded)
    assert not cuda


@pytest.mark.parametrize("module", ["nvfp4_experts", "nvfp4_experts.cli"])
def test_importing_does_not_load_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)


@every([path for path in SOURCES if path != PACKAGE / "kernels" / "target.py"])
def test_only_target_asks_what_machine_this_is(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and node.attr in MACHINE_QUESTIONS:
            pytest.fail(f"{name_of(path)}:{node.lineno} asks {ast.unparse(node)}; ask kernels/target.py")


# --- files and words ----------------------------------------------------------------------------------------------


@every(ALL_CODE)
def test_no_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines; split it by concern"


@every(ALL_CODE)
def test_the_first_line_names_the_licence(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or text.partition("\n")[0].endswith("SPDX-License-Identifier: Apache-2.0")


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


@every([path for path in SOURCES if path != PACKAGE / "checkpoints" / "dialects.py"])
def test_one_noun_per_thing(path: Path) -> None:
    for line, identifier in identifiers(tree_of(path)):
        words = {identifier.lower(), *identifier.lower().split("_")}
        assert not words & FOREIGN_WORDS, (
            f"{name_of(path)}:{line} says {identifier}; see 'Words' in docs/architecture.md"
        )


# --- docstrings ---------------------------------------------------------------------------------------------------


PUBLIC = [name for name in nvfp4_experts.__all__ if name != "__version__"]


@every(SOURCES)
def test_files_and_what_they_offer_have_docstrings(path: Path) -> None:
    tree = tree_of(path)
    offered = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    bare = [node.name for node in offered if not node.name.startswith("_") and not ast.get_docstring(node)]
    if path.parent.name == "cli":
        bare = [name for name in bare if name != "command"]  # its text is the module's HELP
    assert ast.get_docstring(tree), f"{name_of(path)} does not say what it is for"
    assert not bare, f"{name_of(path)}: no docstring on {', '.join(bare)}"


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_user_imports_follows_the_template(name: str) -> None:
    thing = getattr(nvfp4_experts, name)
    doc = inspect.getdoc(thing) or ""
    sections = set(re.findall(r"^([A-Z]\w+):", doc, flags=re.M))
    wanted = {"Args", "Raises", "Numerics"} | (set() if inspect.isclass(thing) else {"Returns", "Cost"})
    assert wanted <= sections, f"{name} lacks {sorted(wanted - sections)}"
    unexplained = [p for p in inspect.signature(thing).parameters if not re.search(rf"\b{p}\b", doc)]
    assert not unexplained, f"{name} does not explain {unexplained}"


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(getattr(nvfp4_experts, name, None))])
def test_what_a_user_calls_on_an_object_has_a_docstring(name: str) -> None:
    own = vars(getattr(nvfp4_experts, name))
    bare = [
        n
        for n, value in own.items()
        if not n.startswith("_") and inspect.isroutine(value) and not inspect.getdoc(value)
    ]
    bare += [n for n, value in own.items() if isinstance(value, property) and not value.__doc__]
    assert not bare, f"{name}: no docstring on {bare}"


# --- pages --------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every(PAGES)
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name_of(path)} links to {target}"
        if anchor and page.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{name_of(path)} links to {target}"


@every(PAGES)
def test_files_named_in_pages_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:src|tests|docs|examples|data|requirements)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{name_of(path)} names {name}"


@every(PAGES)
def test_tests_named_in_pages_exist(path: Path) -> None:
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`((?:test_|Test)\w+)`", path.read_text(encoding="utf-8")):
        assert re.search(rf"^ *(?:def|class) {name}\b", code, flags=re.M), f"{name_of(path)} names {name}"


def test_make_commands_named_in_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    command = re.compile(r"(?:`|^ *(?:\$ )?|&& )make ([a-z][a-z-]+)", flags=re.M)
    named = {page: set(command.findall(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert {"demo", "test"} <= named[ROOT / "README.md"]
    assert not set().union(*named.values()) - targets


def test_every_measurement_says_when_and_how() -> None:
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")[1:]
    assert sections
    for section in sections:
        title = section.partition("\n")[0]
        assert re.search(r"\b20\d\d-\d\d-\d\d\b", section), f"{title}: no date"
        assert re.search(r"`[^`]*(make|python|nvfp4-experts|pytest)[^`]*`|```", section), f"{title}: no command"
