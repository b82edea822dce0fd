"""The bearing walls of the package, read from its imports: who may import whom, and what importing it may load."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_sparse_moe


PACKAGE = Path(hf_sparse_moe.__file__).parent

# Storeys, from the ground up: a folder or file imports from lower storeys and from itself, never from its own storey's
# neighbours upwards. `models` is what travels to the Hub, so it stands on torch and transformers alone.
STOREYS = (
    {"models"},
    {"registration", "experts", "checkpoints"},
    {"routing"},
    {"insight", "upcycling", "adapters"},
    {"stock"},
    {"hub"},
    {"quickstart", "distributed"},
    {"cli"},
)
TRAVELS_WITH = {"torch", "transformers", "safetensors", "huggingface_hub"}
OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "peft", "evaluate", "matplotlib", "trl", "sklearn"}


def storey_of(part: str) -> int:
    found = [number for number, parts in enumerate(STOREYS) if part in parts]
    assert found, f"src/hf_sparse_moe/{part} has no storey yet: name it in STOREYS"
    return found[0]


def defers(node: ast.AST) -> bool:
    """Whether the imports inside `node` run later (a function's body) or never (`if TYPE_CHECKING`)."""
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports(path: Path):
    """Yield (absolute module, level, names, whether importing the file runs it) of each import statement in `path`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {id(inner) for node in ast.walk(tree) if defers(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0, [], id(node) not in deferred
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = node.module or ""
            if node.level:
                parents = path.relative_to(PACKAGE.parent).parent.parts
                module = ".".join((*parents[: len(parents) - node.level + 1], *filter(None, [module])))
            yield module, node.level, names, id(node) not in deferred


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_folders_import_downwards_only():
    wrong = []
    for path in SOURCES:
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":  # the roof: it names what all the others hold
            continue
        for module, _, names, _ in imports(path):
            parts = module.split(".")
            others = [part for part in parts[1:2] or names if part != here and not part.startswith("__")]
            if parts[0] == PACKAGE.name:
                wrong += [f"{path}: {there}" for there in others if storey_of(there) >= storey_of(here)]
    assert not wrong, "these import what stands on or above them"


def test_models_travel_alone():
    """`custom_object_save` follows the text `from .name import` and nothing else, into one folder."""
    allowed = TRAVELS_WITH | sys.stdlib_module_names
    for path in (PACKAGE / "models").glob("*.py"):
        for module, level, names, _ in imports(path):
            if level == 0:
                found = module.split(".")[0]
                assert found in allowed, f"{path}: {found} is neither the standard library's nor in {TRAVELS_WITH}"
                continue
            name = module.removeprefix(f"{PACKAGE.name}.models").lstrip(".")
            assert level == 1, f"{path}: `from {'.' * level}` leaves the folder"
            assert name, f"{path}: `from . import {names}` is not copied to the Hub: write `from .name import`"
            assert (path.parent / f"{name}.py").is_file(), f"{path}: {name} is not a file of models/"


def test_models_is_flat():
    folders = [path for path in (PACKAGE / "models").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert not folders, "what travels to the Hub is copied from one folder"


def test_optional_packages_are_imported_on_use():
    """At the head of a file an extra would be a core dependency of all who import that file."""
    for path in SOURCES:
        heavy = {module.split(".")[0] for module, _, _, runs in imports(path) if runs} & OPTIONAL
        assert not heavy, f"{path}: import {sorted(heavy)} inside the function that needs it"


def test_importing_the_package_loads_no_extra():
    """Beyond what transformers itself loads: it imports accelerate where that is installed."""
    program = "import sys, {}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"

    def loaded(modules: str) -> set[str]:
        run = [sys.executable, "-c", program.format(modules)]
        return set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())

    ours = loaded("hf_sparse_moe, hf_sparse_moe.cli")
    stock = loaded("transformers.modeling_utils, transformers.generation")
    assert not (ours - stock) & OPTIONAL
