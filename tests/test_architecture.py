"""The house rules that a reader cannot check by eye: floors of imports, what the binaries need."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

import fedkd_fast

PACKAGE = Path(fedkd_fast.__file__).parent
ROOT = PACKAGE.parent
FLOORS = {
    0: {
        *("ops", "reference", "reference_rans", "reference_rounding", "distillation", "wire"),
        *("_C", "_device", "_driver", "_extras", "_files", "_errors", "_memory", "_seeds"),
        "trees",
    },
    1: {"codec", "tensors", "updates", "compress", "decompression", "feedback", "aggregation"},
    2: {"losses", "models", "adapters", "sealing", "robust", "privacy"},
    3: {"methods", "tasks", "client", "server", "legs", "replies", "faults"},
    4: {
        "trainer",
        "runs",
        "config",
        "records",
        "assembly",
        "costs",
        "scores",
        "events",
        "spectra",
        "sweep",
        *("checkpoint", "delivery", "evaluation", "journal", "loop", "pool", "recorder", "writer"),
        *("node", "remote", "remote_scores", "connect", "envelopes"),
    },
    5: {"__main__", "cli", "report", "integrations"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
NATIVE = sorted(
    p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".inc", ".cpp", ".cu", ".cuh"}
)
OPS_LIBRARY = PACKAGE / "libfedkd_fast_ops.so"


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "fedkd_fast" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
            if node.module == "fedkd_fast":
                found.update(f"fedkd_fast.{alias.name}" for alias in node.names)
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_never_go_up(path: Path) -> None:
    own = room(path)
    assert own in FLOOR_OF, f"{own} has no floor: add it to FLOORS and ARCHITECTURE.md"
    for module in imports(path):
        other = room_of(module)
        if other in FLOOR_OF:
            assert FLOOR_OF[other] <= FLOOR_OF[own], f"{own} imports {other}, which is above it"
        top = module.split(".")[0]
        if top == "transformers":
            assert own in {"models", "tasks"}, f"{path} imports transformers"
        if top == "cryptography":
            assert own == "sealing", f"{path} imports cryptography"
        assert top not in {"pickle", "marshal", "shelve", "dill"}, f"{path} imports {top}"
    text = path.read_text()
    assert own == "ops" or "torch.ops.fedkd_fast" not in text
    assert "torch.load(" not in text


def test_every_room_stands_in_the_table_of_floors() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \| ([^|]+) \|", text, re.MULTILINE))
    for path in MODULES:
        own = room(path)
        shown = re.findall(r"`(\w+)/?`", rows[str(FLOOR_OF[own])])
        assert own in shown, f"{own} is missing on floor {FLOOR_OF[own]} in ARCHITECTURE.md"


def test_no_circle_on_a_floor() -> None:
    graph = {
        module: {other for m in imports(path) if (other := room_of(m)) and other != module}
        for path in MODULES
        for module in [room(path)]
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_framework(path: Path) -> None:
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    foreign = [i for i in includes if re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", i)]
    if not path.name.startswith("bind_"):
        assert not foreign, f"{path} includes {foreign}"
    if path.name == "bind_wire.cpp":
        assert not [i for i in foreign if i.startswith("torch/")]
    if path.suffix == ".cu" or path.name.startswith("bind_"):
        assert "<<<" not in re.sub(r"//.*", "", path.read_text())


def test_files_stay_small() -> None:
    long = {p.name: n for p in [*MODULES, *NATIVE] if (n := p.read_text().count("\n")) > 420}
    assert not long


def symbols(*flags: str) -> list[str]:
    return subprocess.run(
        ["nm", "-D", *flags, str(OPS_LIBRARY)], capture_output=True, text=True, check=True
    ).stdout.split("\n")


def test_ops_library_fits_every_torch_from_2_10_on() -> None:
    undefined = {line.split()[-1].split("@")[0] for line in symbols("--undefined-only") if line}
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    ours = {name for name in undefined if name.startswith(("aoti_torch", "torch_"))}
    known = set((Path(__file__).parent / "torch_2_10_symbols.txt").read_text().split())
    assert ours, "the library calls torch through its C interface"
    assert ours <= known, f"not in torch 2.10, or not yet checked: {sorted(ours - known)}"
    # A C++ symbol of torch would tie the binary to one release.
    assert not [name for name in undefined if "c10" in name or "2at" in name]


def test_ops_library_needs_only_libtorch() -> None:
    dynamic = subprocess.run(
        ["readelf", "-d", str(OPS_LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    system |= {"libdl.so.2", "libpthread.so.0", "librt.so.1"}
    assert needed - system == {"libtorch.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_versions_agree() -> None:
    import fedkd_fast._C as _C

    text = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)
    assert version == fedkd_fast.__version__ == _C.version
