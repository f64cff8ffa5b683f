"""One way to name a thing with its settings in text: `small(widths=(32, 64), neuron=plif(tau=2.0))`.

Used for students, neurons, methods and augmentations, in flags, in config files and in Python. Reading it finds every
mistake at once: each is a sentence with its path and the nearest valid name.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]


class SpecError(ValueError):
    """One or more mistakes in what the user asked for. `mistakes` lists them; str() is one a line."""

    def __init__(self, mistakes: Iterable[str]):
        self.mistakes = list(mistakes)
        super().__init__("\n".join(self.mistakes))


def near(word: str, valid: Iterable[str]) -> str:
    """A hint for an unknown word: the nearest valid one, or all of them."""
    valid = list(valid)
    match = get_close_matches(word.lower(), valid, 1, 0.5)
    return f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(valid)}"


def parse(text: str) -> tuple[str, tuple, dict[str, Any]]:
    """'name', 'name(2, key=value)' -> name, positional and keyword settings.

    Values are Python literals. A nested name or call is left as text for whoever reads it: neuron=plif(tau=2.0). The
    name may be one of a file, 'path/to/file.py:function', or of a library, 'timm:NAME'. Raises SpecError for anything
    else.
    """
    found = re.match(r"(?!\w+\()(.+?\.py(?::\w*)?|(?:timm|hf):[^(]*)(\(.*\))?$", text.strip(), re.DOTALL)
    if found:
        name, rest = found.groups(default="")
        try:
            return name, *parse(f"of{rest}")[1:]
        except SpecError:
            raise SpecError([f"cannot read '{text}': write {name}(key=value, ...) with plain values"]) from None
    try:
        # the neuron "if" is a keyword of Python, which the parser would stumble over
        node = ast.parse(re.sub(r"(^|[=(,])\s*if\s*(?=[(,)]|$)", r"\1if_", text.strip()), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            keywords = {k.arg: _value(k.value) for k in node.keywords if k.arg}
            return node.func.id, tuple(map(_value, node.args)), keywords
    except (SyntaxError, ValueError) as error:
        if "(" in text:
            raise SpecError([f"cannot read '{text}': write name(key=value, ...) with plain values ({error})"]) from None
    if "(" in text:
        raise SpecError([f"cannot read '{text}': write name(key=value, ...) with plain values"])
    return text.strip(), (), {}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name | ast.Call):
        return ast.unparse(node)
    return ast.literal_eval(node)


def settings(function: Callable, skip: int = 0) -> dict[str, inspect.Parameter]:
    """The parameters of a builder that a user may set, by name; the first `skip` are filled in by the caller."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in parameters if p.kind in kinds}


def bind(function: Callable, given: Mapping[str, Any], path: str, skip: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Check settings against a builder's signature: unknown names, wrong types and ranges.

    Text is converted to the annotated type, so flags and files give the same. Returns clean settings and mistakes.
    """
    from pydantic import TypeAdapter, ValidationError

    valid, hints = settings(function, skip), get_type_hints(function, include_extras=True)
    clean, mistakes = {}, []
    for name, value in given.items():
        if name not in valid:
            mistakes.append(f"{path}.{name}: no such setting; {near(name, valid) if valid else 'it takes none'}")
            continue
        hint = hints.get(name, Any)
        try:
            adapter = TypeAdapter(hint, config=None if _is_model(hint) else {"arbitrary_types_allowed": True})
            clean[name] = adapter.validate_python(_literal(value, hint))
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Input should be ")
            mistakes.append(f"{path}.{name}: {value!r} will not do: it should be {problem}")
    return clean, mistakes


def _is_model(hint: Any) -> bool:
    from pydantic import BaseModel

    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _literal(value: Any, hint: Any) -> Any:
    """Text from a flag as a Python value, unless text is what is wanted."""
    if not isinstance(value, str) or hint is str:
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def type_name(hint: Any) -> str:
    """A short name of an annotation for help texts: 'float >= 0'."""
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        signs = {Gt: ("> ", "gt"), Ge: (">= ", "ge"), Le: ("<= ", "le")}
        bounds = [signs[type(x)][0] + f"{getattr(x, signs[type(x)][1]):g}" for x in limits if type(x) in signs]
        return f"{type_name(base)} {', '.join(bounds)}".strip()
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return " or ".join("None" if x is NoneType else type_name(x) for x in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (list, tuple, Sequence):
        parts = [type_name(x) for x in get_args(hint) if x is not ...]
        return f"({', '.join(parts)}{', ...' if len(parts) == 1 else ''})"
    if get_origin(hint) is Callable:
        return "callable"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("collections.abc.", "")
