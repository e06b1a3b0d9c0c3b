"""Checks the shapes and dtypes of annotations at run time, in the tests of the parts with them.

jaxtyping's import hook would have to come before every import of the package, which `conftest.py`
imports. So the functions are wrapped where they are: in their modules and classes, and under every
name by which another module imported them.
"""

import contextlib
import functools
import importlib
import inspect
import sys

from beartype import beartype
from jaxtyping import jaxtyped

MODULES = (
    "attention.cache",
    "attention.layer",
    "attention.layers",
    "attention.position",
    "attention.score",
    "kernels.cudnn",
    "kernels.dispatch",
    "kernels.hopper.attention",
    "kernels.reference",
    "kernels.rows",
    "kernels.stored",
    "kernels.tpu.attention",
    "kernels.tpu.decode",
    "kernels.tpu.splash",
    "kernels.triton.attention",
    "kernels.triton.blocks",
    "kernels.triton.decode",
    "kernels.xla.attention",
    "kernels.xla.decode",
)


@functools.cache
def checked(function):
    return jaxtyped(function, typechecker=beartype)


def functions_of(owner) -> dict:
    """Returns the functions of a module or class, by name."""
    return {name: f for name, f in vars(owner).items() if inspect.isfunction(f)}


def has_shapes(function) -> bool:
    """Returns whether an annotation of a function is one of jaxtyping's."""
    return any("[Array," in str(kind) for kind in function.__annotations__.values())


@functools.cache
def typed_classes_and_functions():
    """Returns (the classes of MODULES, their functions and methods with shapes)."""
    modules = [importlib.import_module(f"qkvjax.{name}") for name in MODULES]
    classes = [x for m in modules for x in vars(m).values() if inspect.isclass(x)]
    classes = [x for x in classes if x.__module__ in {m.__name__ for m in modules}]
    functions = [f for owner in (*modules, *classes) for f in functions_of(owner).values()]
    return set(classes), {f for f in functions if has_shapes(f)}


@contextlib.contextmanager
def shapes_checked():
    """Wraps all functions with shapes, and unwraps them afterwards."""
    classes, functions = typed_classes_and_functions()
    modules = [m for name, m in sys.modules.items() if name.startswith("qkvjax.")]
    wrapped = [
        (owner, name, function)
        for owner in (*modules, *classes)
        for name, function in functions_of(owner).items()
        if function in functions
    ]
    dispatch = importlib.import_module("qkvjax.kernels.dispatch")
    plain = dict(dispatch.PLAIN)  # a dict and not a module: it holds two functions by itself
    for owner, name, function in wrapped:
        setattr(owner, name, checked(function))
    dispatch.PLAIN.update({name: checked(function) for name, function in plain.items()})
    try:
        yield
    finally:
        for owner, name, function in wrapped:
            setattr(owner, name, function)
        dispatch.PLAIN.update(plain)
