"""What the package uses of TorchRL and tensordict that has a private name: all of it in these tables.

Private names may go with any release. Each has its reason here, and a test tells when one that is used
isn't listed, one that is listed isn't used any more, or TorchRL doesn't have it any more.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_amago

PACKAGE = Path(torchrl_amago.__file__).parent
HOSTS = ("torchrl", "tensordict")

# Imports of private names, or from private modules.
IMPORTS: dict[str, str] = {}

_EXTENSION = "TorchRL documents it as what a subclass implements"
_STATE = "what TorchRL empties, locks or draws from has no public name for subclasses"

# What our classes define, set or read of a class of TorchRL's above them.
IN_CLASSES: dict[str, str] = {
    "Collector._carrier": "the next step's input has no public name: trials saved in progress need it",
    "Collector._ignore_rb": "lets iterator() yield batches although there is a replay buffer",
    "EnvBase._reset": _EXTENSION,
    "EnvBase._set_seed": _EXTENSION,
    "EnvBase._skip_tensordict": "what a masked step of a batched environment returns",
    "EnvBase._step": _EXTENSION,
    "_EnvWrapper._make_specs": _EXTENSION,
    "LossModule._AcceptedKeys": _EXTENSION,
    "TensorStorage._storage": "the mapped rows, where TorchRL keeps a storage's tensordict",
    "ReplayBuffer._clear_prefetch_queue_locked": "batches drawn ahead are stale after loading",
    "ReplayBuffer._futures_lock": "batches drawn ahead are stale after loading",
    "ReplayBuffer._pin_memory": "set by a public argument, read by nothing public",
    "ReplayBuffer._replay_lock": _STATE,
    "ReplayBuffer._sample": "relabelling comes between the draw and the cut into slices",
    "ReplayBuffer._write_lock": _STATE,
    "Sampler._empty": _STATE,
    "Sampler._rng": _STATE,
    "Storage._empty": _STATE,
    "Transform._call": _EXTENSION,
    "Transform._container": "the Compose around a transform has no public name",
    "Transform._inv_call": _EXTENSION,
    "Transform._reset": _EXTENSION,
    "Transform._step": _EXTENSION,
}

_RESET = "part of EnvBase.reset, whose checks cost too much in every soft reset"
_CRAFTER = "what the game holds has no public name"
_CURSOR = "tells whether, and up to where, a storage was written"
_LOADED = "loading brings back the writer's place in the ring, and not the storage's"

# What is read of other objects: the class that has it, and why.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "_attached_entities": ("torchrl.data.TensorStorage", _LOADED),
    "_complete_done": ("torchrl.envs.EnvBase", _RESET),
    "_cursor": ("torchrl.data.RoundRobinWriter", _LOADED),
    "_dynamo": ("torch", "gradients are compiled with the loss only by a setting that is there"),
    "_foreach_copy_": ("torch", "one launch for many small tensors"),
    "_env": ("torchrl.envs.GymWrapper", "the Gymnasium environment below has no public name"),
    "_envs": ("torchrl.envs.SerialEnv", "the environments of a SerialEnv have no public name"),
    "_forward_hooks": ("torch.nn.Module", "a hook must not be passed over by the fast step"),
    "_forward_pre_hooks": ("torch.nn.Module", "a hook must not be passed over by the fast step"),
    "_last_cursor_index": ("torchrl.data.TensorStorage", _CURSOR),
    "_modules": ("torch.nn.Module", "a child by a name made up at run time"),
    "_mutation_revision": ("torchrl.data.TensorStorage", _CURSOR),
    "_np_random_seed": ("gymnasium.Env", "np_random_seed would seed an environment that has none"),
    "_battles": ("poke_env.player.Player", "a player that only answers must know the battle"),
    "_set_last_cursor": ("torchrl.data.TensorStorage", _LOADED),
    "_player": ("crafter.Env", _CRAFTER),
    "_sem_view": ("crafter.Env", _CRAFTER),
    "_world": ("crafter.Env", _CRAFTER),
    "_replace": ("collections.namedtuple", "JAX's named tuples; a method that is documented"),
    "_prefetch": ("torchrl.data.ReplayBuffer", "set by a public argument, read by nothing public"),
    "_reset_env_preprocess": ("torchrl.envs.Transform", _RESET),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def is_host(module: str) -> bool:
    return module.split(".")[0] in HOSTS


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def private_imports(tree: ast.AST) -> set[str]:
    """Dotted names of imports from TorchRL in which some part is private."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if is_host(name) and any(map(is_private, name.split(".")))}


def asked_for(tree: ast.AST) -> set[str]:
    """Names that getattr and the like are called with."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1)
    names = (call.args[1] for call in calls if ast.unparse(call.func).endswith("attr"))
    return {name.value for name in names if isinstance(name, ast.Constant)}


def names_of_attributes(tree: ast.AST) -> set[str]:
    """Private names behind a dot, and those that getattr and the like are called with."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in found | asked_for(tree) if is_private(name)}


def own_names(tree: ast.AST) -> set[str]:
    """Private names that the code itself makes: functions, classes, variables, attributes, buffers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # a buffer to register
    return {name for name in found - asked_for(tree) if is_private(name)}


def names_on_self(tree: ast.AST) -> set[str]:
    """Private attributes of `self` that the code reads or sets."""
    on_self = (
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
    return {name for name in on_self if is_private(name)}


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def source_of(cls: type) -> ast.AST:
    """The definition of a class; found by its methods, since some give another module as theirs."""
    methods = (inspect.unwrap(value) for value in vars(cls).values() if inspect.isfunction(value))
    for file in {method.__code__.co_filename for method in methods}:
        for node in ast.walk(parsed(file)) if Path(file).is_file() else ():
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                return node
    return ast.parse("")


@functools.cache
def names_made_by(cls: type) -> frozenset[str]:
    """Private names that a class of TorchRL's itself defines or sets on its objects."""
    return frozenset(own_names(source_of(cls)) | {name for name in vars(cls) if is_private(name)})


def classes() -> Iterator[type]:
    """Every class at the top of a module, except of modules whose extra isn't installed."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "torchrl_amago."):
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:
            if (error.name or "").startswith("torchrl_amago"):
                raise
            continue
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value


def host_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if is_host(base.__module__)]


def owner_of(cls: type, name: str) -> str | None:
    """The most basic class of TorchRL's above `cls` that makes a private name."""
    owners = [base for base in host_bases(cls) if name in names_made_by(base)]
    return f"{owners[-1].__name__}.{name}" if owners else None


def found_in_classes() -> dict[str, set[str]]:
    """What our classes define, set or read that a class of TorchRL's above them makes, and where."""
    found: dict[str, set[str]] = {}
    for cls in classes():
        if host_bases(cls):
            tree = source_of(cls)
            for name in own_names(tree) | names_on_self(tree):
                if owner := owner_of(cls, name):
                    found.setdefault(owner, set()).add(cls.__name__)
    return found


def found_elsewhere() -> dict[str, set[str]]:
    """Names behind a dot that neither code of ours nor :func:`found_in_classes` accounts for."""
    own = set().union(*(own_names(tree) for _, tree in sources()))
    own |= {name.split(".")[1] for name in found_in_classes()}
    found: dict[str, set[str]] = {}
    for path, tree in sources():
        for name in names_of_attributes(tree) - own:
            found.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    return found


def test_imports_are_listed():
    found = set().union(*(private_imports(tree) for _, tree in sources()))
    assert found == set(IMPORTS)


def test_what_classes_use_is_listed_and_there():
    found = found_in_classes()
    unlisted = {name: where for name, where in found.items() if name not in IN_CLASSES}
    assert not unlisted, "use a public name, or list it with its reason"
    gone = sorted(set(IN_CLASSES) - set(found))
    assert not gone, "used no more, or TorchRL doesn't have it any more"


def test_what_is_used_elsewhere_is_listed():
    found = found_elsewhere()
    unlisted = {name: where for name, where in found.items() if name not in ELSEWHERE}
    assert not unlisted, "use a public name, or list it with its reason"
    used = set().union(*(names_of_attributes(tree) for _, tree in sources()))
    assert set(ELSEWHERE) <= used, "used no more"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_used_elsewhere_is_there(name):
    module, _, owner = ELSEWHERE[name][0].rpartition(".")
    if not module:
        assert hasattr(importlib.import_module(owner), name)
        return
    owner = getattr(pytest.importorskip(module), owner)
    if not isinstance(owner, type):
        owner = owner("Row", "entry")
    assert hasattr(owner, name) or any(name in names_made_by(base) for base in owner.__mro__[:-1])


def test_the_search_finds_each_kind():
    code = """
        from torchrl.collectors.utils import _cast
        import tensordict._td
        from torch.utils._pytree import tree_map
        from torchrl.envs import EnvBase
        class Env(EnvBase):
            def _reset(self): return self._lazy + self.own
            def _own(self): return getattr(self.env, "_asked", None) or self.env._dotted
    """
    tree = ast.parse(inspect.cleandoc(code))
    assert private_imports(tree) == {"torchrl.collectors.utils._cast", "tensordict._td"}
    assert own_names(tree) == {"_reset", "_own"}
    assert names_on_self(tree) == {"_lazy"}
    assert names_of_attributes(tree) == {"_lazy", "_asked", "_dotted"}
    from torchrl.collectors import Collector

    assert {"_carrier", "_ignore_rb"} <= names_made_by(Collector)
    assert "_gone" not in names_made_by(Collector)
