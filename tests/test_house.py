"""The plan of the house (DESIGN, sections 2, 7 and 9), read from the sources themselves, and where sources cannot tell, watched while a request runs."""

import ast
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import latentgen
import latentgen.pipelines

ROOT = Path(latentgen.__file__).parent
PIPELINES = Path(latentgen.pipelines.__file__).parent
FLOORS = ["errors importing", "diffusion", "conditioning pixels", "models", "run", "cli notebook terminal serve jobs evaluate bench train __main__"]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
ENGINE = ("diffusion", "conditioning", "pixels", "models", "run")
SURFACES = tuple(FLOORS[-1].split())
FAMILIES = [path.stem for path in PIPELINES.glob("*.py") if not path.stem.startswith("_")]
FILES = sorted(ROOT.rglob("*.py")) + sorted(PIPELINES.glob("*.py"))


def place(path):
    """"run/plan.py", or "pipelines/glyph.py"."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"pipelines/{path.name}"


TREES = {place(path): ast.parse(path.read_text("utf-8")) for path in FILES}
ENGINE_FILES = [name for name in TREES if name.split("/")[0] in ENGINE]
each_file = pytest.mark.parametrize("name", TREES)


def imports(tree, *, module_level=False):
    """Dotted names that a file imports, type-checking blocks included; module_level: only what runs when the file is imported."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        late = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or ast.unparse(getattr(node, "test", node)) == "TYPE_CHECKING"
        if module_level and late:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its direction"
            # `from latentgen.train import text` names a file, `from latentgen.errors import RequestError` does not: the prefix tells all we ask
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        todo += ast.iter_child_nodes(node)
    return found


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@each_file
def test_imports_point_downward(name):
    own = name.split("/")[0].removesuffix(".py")
    for imported in imports(TREES[name]):
        if imported.split(".")[0] != "latentgen" or own in ("__init__", "pipelines"):
            continue
        other = imported.partition(".")[2].split(".")[0] or "load"  # a bare `import latentgen` is for the public names
        if other in ("pipelines", "weights"):
            assert own in SURFACES, f"{name} imports {imported}: the engine finds families and weights by a card, never by name"
            continue
        if other in latentgen.__all__ and other not in FLOOR:  # the public names: for what stands on top of them
            assert own in SURFACES, f"{name} imports {imported}"
            continue
        same_house = own in SURFACES and other in SURFACES
        assert other == own or same_house or FLOOR[other] < FLOOR[own], f"{name} imports {imported}: imports point downward"


def test_families_import_the_contract_and_the_leaves_under_it():
    allowed = ("latentgen.models.family", "latentgen.conditioning", "latentgen.diffusion", "latentgen.pixels", "latentgen.errors", "latentgen.pipelines")
    for name in (n for n in TREES if n.startswith("pipelines/")):
        for imported in imports(TREES[name]):
            if imported.split(".")[0] == "latentgen":
                assert imported.startswith(allowed), f"{name} imports {imported}"
            else:
                assert imported.split(".")[0] in {*sys.stdlib_module_names, "torch"}, f"{name} imports {imported}: the engine makes its modules"


def test_the_engine_names_no_family():
    """In words of the program: names, and texts that are no docstring. `load`'s default is a checkpoint's name that happens to be a family's too; so is one that another program has for a spacing."""
    found = set()
    for name in ENGINE_FILES:
        docstrings = {id(node.body[0].value) for node in ast.walk(TREES[name]) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                      and node.body and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(TREES[name]):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
            text = text or getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            if isinstance(text, str) and any(family in text.lower() for family in FAMILIES):
                found.add((name, text))
    assert found == {("run/pipeline.py", "glyph"), ("diffusion/names.py", "flux2")}


@each_file
def test_diffusers_and_transformers_are_imported_late(name):
    if name.startswith("models/"):
        return
    heavy = [i for i in imports(TREES[name], module_level=True) if i.split(".")[0] in ("diffusers", "transformers")]
    assert not heavy, f"{name} imports {heavy[0]} when it is imported itself"


@pytest.mark.parametrize("name", [*ENGINE_FILES, *(n for n in TREES if n.startswith("pipelines/"))])
def test_nothing_but_residency_moves_to_a_device_by_name(name):
    """Outside residency `.to` takes a dtype, a memory format, or the device of a tensor that is followed: no .cuda(), no device spelt out.

    What a `.to` acts on, a tensor or a module, no source can tell: the next test watches it. Training and judging own their networks and are not asked.
    """
    if name == "run/residency.py":
        return
    for call in calls(TREES[name]):
        attribute = getattr(call.func, "attr", "")
        assert attribute not in ("cuda", "to_empty", "half"), f"{name}:{call.lineno} moves or casts by .{attribute}()"
        values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg != "non_blocking")] if attribute == "to" else []
        for value in values:
            assert not isinstance(value, ast.Constant), f"{name}:{call.lineno} moves to {ast.unparse(value)}"


def test_modules_are_moved_by_residency_alone(tiny_folder, monkeypatch):
    """While a fresh pipeline makes and edits a picture, every call of Module.to comes from residency."""
    import torch
    from PIL import Image

    movers = set()
    real = torch.nn.Module.to

    def watched(self, *args, **options):
        caller = next(frame.filename for frame in reversed(traceback.extract_stack()) if Path(frame.filename) in FILES)
        movers.add((place(Path(caller)), tuple(options)))
        return real(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    for forbidden in ("cuda", "cpu", "half", "bfloat16", "float", "double", "type"):
        monkeypatch.setattr(torch.nn.Module, forbidden, lambda *_, **__: pytest.fail("a module was moved or cast in place"))
    pipe = latentgen.load(tiny_folder, dtype="float32", device="cpu", residency="stage", progress=False)
    picture = Image.new("RGB", (64, 64), "teal")
    pipe.inpaint("a cat", picture, Image.new("L", (64, 64), 255), steps=2, seed=0)
    assert movers == {("run/residency.py", ())}


@each_file
def test_the_library_neither_prints_nor_exits(name):
    if name.split("/")[0].removesuffix(".py") in ("cli", "__main__", "terminal"):
        return
    for call in calls(TREES[name]):
        loud = ("print", "exit", "quit", "input", "eval", "exec", "breakpoint", "sys.exit", "os._exit", "os.system")
        assert ast.unparse(call.func) not in loud, f"{name}:{call.lineno}: {ast.unparse(call)[:60]}"


@each_file
def test_a_file_opens_by_saying_what_it_knows_and_stays_short(name):
    tree = TREES[name]
    path = next(path for path in FILES if place(path) == name)
    assert path.stem not in ("utils", "util", "helpers", "misc", "common"), f"{name}: no such drawer"
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 400, f"{name} is past 400 lines"
    assert not (long := [n for n, line in enumerate(lines, 1) if len(line) > 150]), f"{name}: lines {long} have more than 150 letters"
    assert ast.get_docstring(tree) or not tree.body, f"{name} has code and no word about it"


@pytest.mark.parametrize("name", ENGINE_FILES)
def test_the_engine_is_typed_and_takes_little_by_position(name):
    """Public functions: every argument and result typed. (Keyword-only after two: a matter for readers, as a maths function may need three.)"""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert node.returns is not None and all(a.annotation for a in arguments), f"{name}:{node.lineno}: {node.name} is not fully typed"


@pytest.mark.parametrize("name", ENGINE_FILES)
def test_the_engine_never_touches_the_global_generator(name):
    random = ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_rng_state",
              "torch.use_deterministic_algorithms",
              "torch.set_default_dtype", "torch.set_default_device", "torch.set_num_threads", "torch.set_grad_enabled", "random.seed", "np.random.seed")
    for call in calls(TREES[name]):
        assert ast.unparse(call.func) not in random, f"{name}:{call.lineno}: {ast.unparse(call)} changes the whole process"
        if ast.unparse(call.func) in ("torch.randn", "torch.rand", "torch.randint", "torch.normal"):
            assert any(keyword.arg == "generator" for keyword in call.keywords), f"{name}:{call.lineno} draws from the global generator"


def test_import_is_light():
    """`import latentgen` in a new process reads next to nothing; the public names are all there and lead somewhere."""
    heavy = "torch diffusers transformers pydantic numpy PIL tokenizers safetensors tqdm typer rich".split()
    code = f"import sys, latentgen; assert 'load' in dir(latentgen); print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_no_public_name_is_a_folder_too():
    assert not {name for name in latentgen.__all__ if (ROOT / name).is_dir()}


def test_public_names():
    for name in latentgen.__all__:
        assert getattr(latentgen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        latentgen.lode  # noqa: B018
