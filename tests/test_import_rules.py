"""The bearing walls of the package, read from its imports: who may import whom."""

import ast
import sys
from pathlib import Path

import hf_sparse_moe


PACKAGE = Path(hf_sparse_moe.__file__).parent

# Storeys, from the ground up: a folder or file imports from lower storeys and from itself, never from its own storey's
# neighbours upwards. `models` is what travels to the Hub, so it stands on torch and transformers alone.
STOREYS = (
    {"models"},
    {"experts", "checkpoints", "quantization"},
    {"_register", "routing"},
    {"insight", "upcycling", "adapters"},
    {"stock"},
    {"surgery"},
    {"hub"},
    {"quickstart", "distributed"},
    {"cli"},
)
ROOF = {"__init__", "_register"}  # they name what all the others hold, and import it later
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


def test_every_file_imports_what_it_may():
    """Downwards only; and no extra at the head of a file, where all who import that file would need it."""
    faults = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        here = where.with_suffix("").parts[0]
        for module, _, names, runs in imports(path):
            top, *rest = module.split(".")
            if runs and top in OPTIONAL:
                faults.append(f"{where}: import {top} inside the function that needs it")
            if top != PACKAGE.name or here in ROOF:
                continue
            for there in rest[:1] or names:
                if there != here and not there.startswith("__") and storey_of(there) >= storey_of(here):
                    faults.append(f"{where} imports {there}, which stands on or above it")
    assert not faults, "\n".join(faults)


def test_models_travel_alone():
    """`custom_object_save` follows the text `from .name import` and nothing else, into one folder."""
    faults = []
    for path in sorted((PACKAGE / "models").glob("*.py")):
        for module, level, names, _ in imports(path):
            name = module.removeprefix(f"{PACKAGE.name}.models").lstrip(".")
            if level > 1:
                faults.append(f"{path.name}: `from {'.' * level}` leaves the folder")
            elif level and not name:
                faults.append(f"{path.name}: `from . import {', '.join(names)}` is not copied to the Hub")
            elif level and not (path.parent / f"{name}.py").is_file():
                faults.append(f"{path.name}: {name} is not a file of models/")
            elif not level and module.split(".")[0] not in sys.stdlib_module_names | TRAVELS_WITH:
                faults.append(f"{path.name} may import the standard library and {sorted(TRAVELS_WITH)}, not {module}")
    assert not faults, "\n".join(faults)


def test_models_is_flat():
    folders = [path for path in (PACKAGE / "models").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert not folders, "what travels to the Hub is copied from one folder"


def test_no_module_has_the_name_of_what_its_folder_offers():
    """`from folder import name` would give the function, or the module once somebody has imported that."""
    found = set()
    for path in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lines = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        offered = {alias.name for node in lines for alias in node.names}
        found |= offered & {other.stem for other in path.parent.iterdir()}
    assert found == {"app"}  # the object that `hf_sparse_moe.cli` is run by
