"""What makes a function a recipe: options one by one or as their dataclasses, each held against its
type and range.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

from rlhf import trl_names
from rlhf.ranges import checked, hints_of
from rlhf.training import micro_batches


def recipe(main: Callable) -> Callable:
    """`main(model: ModelOptions, …, *, …)`, whose options may also be given one by one, as the
    command line takes them.

    `main(ModelOptions("m"), …)` and `main(model="m", …)` are the same.  A default of `main` for a
    dataclass, such as `training: TrainingOptions = TrainingOptions(learning_rate=1e-6)`, is where
    its options begin.

    Args:
      main: a function some of whose parameters are option dataclasses.

    Raises: when called, ValueError for an option that is not known (with the nearest that is) or
    missing, or of another type or
      range.

    >>> @dataclasses.dataclass(frozen=True)
    ... class ModelOptions:
    ...     model: str
    ...     dtype: str = "float32"
    >>> @recipe
    ... def main(model: ModelOptions, *, steps: int = 1):
    ...     return model, steps
    >>> main(model="m", steps=2)
    (ModelOptions(model='m', dtype='float32'), 2)
    """
    hints = hints_of(main)
    signature = inspect.signature(main)
    groups = {
        name: hints[name] for name in signature.parameters if dataclasses.is_dataclass(hints[name])
    }
    fields = {
        group: [field.name for field in dataclasses.fields(kind)] for group, kind in groups.items()
    }
    # Checked once all is in place: plain options by the ranges in `main`'s own annotations.
    run = checked(main)

    @wraps(main)
    def call(*args: Any, **given: Any) -> Any:
        arguments = dict(signature.bind_partial(*args).arguments)
        # Fields of different dataclasses have different names, so that a flat call is not
        # ambiguous.
        plain_names = {name for name in signature.parameters if name not in groups}
        known = plain_names.union(groups, *fields.values())
        for name in given:
            if name not in known:
                raise ValueError(f"{name} is no option of {main.__module__}; {_meant(name, known)}")
        for group, kind in groups.items():
            if group in arguments:
                continue
            # `main(model=ModelOptions(…))` and `main(model="m")` share a name: the type decides.
            if isinstance(given.get(group), kind):
                arguments[group] = given.pop(group)
                continue
            values = {name: given.pop(name) for name in fields[group] if name in given}
            default = signature.parameters[group].default
            if default is inspect.Parameter.empty:
                arguments[group] = kind(**_complete(kind, values))
            else:
                arguments[group] = dataclasses.replace(default, **values)
        arguments |= given
        # An empty run folder and a compiled step later it would be found as well.
        if callable(arguments.get("callbacks")):
            raise ValueError(
                "callbacks is a function, but takes a list; write callbacks=[function]"
            )
        missing = [
            name
            for name, x in signature.parameters.items()
            if x.default is inspect.Parameter.empty and name not in arguments
        ]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given")
        return run(**micro_batches.resolved(call, arguments))

    return call


def _meant(name: str, known: Collection[str]) -> str:
    if ours := trl_names.ours(name, known):
        return f"TRL's name is {ours} here; `rlhf help trl` says whether its values differ"
    if near := trl_names.suggestions(name, sorted(known)):
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(sorted(known))}"


def _complete(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields, once none is missing."""
    # Found here, since a dataclass would say `__init__() missing 1 required positional argument`.
    empty = dataclasses.MISSING
    needed = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is empty and f.default_factory is empty
    ]
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"{', '.join(missing)} must be given")
    return values
