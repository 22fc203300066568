"""The import law: who may know whom. Read from the syntax trees, so nothing escapes it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmlm

ROOT = Path(__file__).parents[1]
OURS = ("mmlm", "decoding", "training", "data_tools", "benchmarks", "configs")
ENGINE = ("mmlm.engine", "mmlm.errors")
#: The first entry that matches a module's name decides what it may import of ours.
LAW = (
    ("mmlm.engine", ENGINE),
    ("mmlm.errors", ()),
    ("mmlm.methods", ENGINE),
    ("mmlm.probes", ENGINE),
    ("mmlm.cli", OURS),
    ("mmlm.web", OURS),
    ("mmlm.show", OURS),
    ("mmlm.__main__", ("mmlm",)),
    ("mmlm", ("mmlm",)),
    ("decoding", ENGINE),
    ("training", ("mmlm", "training", "configs")),
    ("data_tools", ("mmlm", "data_tools", "configs")),
    ("benchmarks", ("mmlm", "benchmarks", "configs")),
)
#: Modules of one method or probe each.
METHODS = {*mmlm._METHODS.values(), *mmlm._PROBES.values()}
TYPE_ONLY = {"mmlm"}  # the lazy table of mmlm/__init__ names everything for type checkers


def modules():
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imported(path, name):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], base]).strip(".")
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield f"{base}.{alias.name}" if is_module else base


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def broken_laws(name, targets):
    allowed = next((a for prefix, a in LAW if within(name, prefix)), ())
    for target in targets:
        if not any(within(target, top) for top in OURS) or name in TYPE_ONLY:
            continue
        own = name in ("decoding", "mmlm.methods") and within(target, name)
        # What is long, or shared, has a file of its own; methods know no methods.
        for package in ("mmlm.methods", "mmlm.probes", "decoding"):
            shared = target.startswith(f"{package}.") and target not in METHODS
            own = own or (within(name, package) and shared)
        if not own and not any(within(target, prefix) for prefix in allowed):
            yield f"{name} imports {target}"


def test_the_import_law_holds():
    found = [b for name, path in modules() for b in broken_laws(name, imported(path, name))]
    assert not found, found
    assert sum(1 for _ in modules()) > 20


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mmlm.engine.attach", "decoding.vhr"),
        ("decoding.vhr", "decoding.vcd"),
        ("mmlm.methods.dyvte", "mmlm.methods.mma"),
        ("benchmarks.run", "data_tools.world"),
        ("training.scratch.loop", "benchmarks.chair"),
        ("mmlm.model.checkpoint", "training"),
    ],
)
def test_the_law_notices_a_breach(name, target):
    assert list(broken_laws(name, [target]))


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_importing_mmlm_brings_no_heavy_package():
    result = run(
        "import mmlm, mmlm.cli, sys;"
        "print([n for n in ('torch', 'transformers', 'numpy', 'PIL') if n in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_torchvision_open_clip_and_timm_import_beside_any_torch():
    result = run("import mmlm, torchvision, open_clip, timm; print(torchvision.__version__)")
    assert result.returncode == 0, result.stderr


def test_the_guard_leaves_other_errors_alone(tmp_path):
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise RuntimeError('something else')")
    result = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mmlm\n"
        "try:\n import torchvision\nexcept RuntimeError as e: print('seen:', e)"
    )
    assert "seen: something else" in result.stdout


def test_public_names_exist():
    import mmlm

    for name in mmlm.__all__:
        assert getattr(mmlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmlm.nothing
