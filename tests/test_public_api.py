"""The names at the top of the package: documented, lazy, and the old ones still there."""

import ast
import importlib.util
from importlib import import_module
from pathlib import Path

import pytest

import hf_sparse_moe


REPOSITORY = Path(__file__).parents[1]


def load_writer():
    spec = importlib.util.spec_from_file_location("write_api", REPOSITORY / "docs" / "write_api.py")
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    return writer


def test_the_reference_is_what_the_docstrings_say():
    writer = load_writer()
    assert writer.PAGE.read_text(encoding="utf-8") == writer.render(), "run `python docs/write_api.py`"


def test_every_public_name_says_what_it_does():
    writer = load_writer()
    for name in hf_sparse_moe.__all__:
        own = getattr(hf_sparse_moe, name).__doc__  # `inspect.getdoc` would fall back on that of a parent
        assert own, name
        assert writer.first_paragraph(name).endswith("."), name


def test_type_checkers_see_what_python_sees():
    tree = ast.parse(Path(hf_sparse_moe.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {f".{line.module}": [alias.name for alias in line.names] for line in block.body}
    assert {module: sorted(names) for module, names in seen.items()} == {
        module: sorted(names.split()) for module, names in hf_sparse_moe._HOMES.items()
    }
    assert set(hf_sparse_moe.__all__) <= set(dir(hf_sparse_moe))


@pytest.mark.parametrize("old", sorted(hf_sparse_moe._RENAMED))
def test_an_old_name_works_and_names_the_new_one(old):
    new = hf_sparse_moe._RENAMED[old][1]
    folder, _, name = new.rpartition(".")
    assert name in import_module(f"hf_sparse_moe.{folder}" if folder else "hf_sparse_moe").__all__
    assert old not in hf_sparse_moe.__all__
    with pytest.warns(FutureWarning, match=f"`hf_sparse_moe.{new}`"):
        assert callable(getattr(hf_sparse_moe, old))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("analysis", "routing_statistics"),
        ("analysis", "plot_expert_load"),
        ("backends", "auto_experts_forward"),
        ("export", "export"),
        ("train", "RoutingMonitor"),
    ],
)
def test_an_old_folder_works_and_names_the_new_one(folder, name):
    with pytest.warns(FutureWarning, match=f"`hf_sparse_moe.{folder}` is now"):
        assert callable(getattr(import_module(f"hf_sparse_moe.{folder}"), name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import_module(f"hf_sparse_moe.{folder}").nothing  # noqa: B018


def test_export_is_the_function():
    import_module("hf_sparse_moe.stock")
    import_module("hf_sparse_moe.export")
    from hf_sparse_moe import export

    assert export is import_module("hf_sparse_moe.stock").export
