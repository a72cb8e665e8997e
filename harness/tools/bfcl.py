"""The rules of the Berkeley Function-Calling Leaderboard (BFCL v4, Python): its decoder of text and its checker of calls, corner by corner.

The promise is the same verdict, also where it is a questionable one; `harness score --mode strict` is for the right ones. Taken from the
behaviour of bfcl-eval 2026.3.23, and held to it over thousands of changed calls by tests/tools/test_bfcl.py. What the rules let pass:

    text is compared without blanks, case and any of , . / - _ * ^     "3.5" is "35", "New York, NY" is "newyorkny"
    types are looked at one level deep                                  [[1.0, True]] is [[1, 1]]
    text in an object in an object is compared letter by letter, and enum, ranges and patterns not at all
    positional arguments of a Python call are dropped in silence        f(1, 2) is f()
    parallel calls are assigned greedily, in the order of gold          a right answer can fail where alternatives overlap

Gold is the leaderboard's own: for every call {name: {parameter: [acceptable values]}}, in which "" says that it may be left out. One thing
is not taken over: the leaderboard gives arithmetic in arguments to `eval`, and so runs what a model wrote. Here it is computed for literals
and of bounded size; anything else cannot be read.
"""

from __future__ import annotations

import ast
import json
import operator
import re
import warnings
from collections.abc import Callable

from harness.errors import DataError
from harness.tools.calls import ToolCall, parse_calls, spoken
from harness.tools.match import FAILURES

_TYPES = {
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
_OVERLOOKED = re.compile(r"[ ,./\-_*^]")

Trouble = tuple[str, str]
"""(one of FAILURES, what is wrong)."""


# ---- text -> calls


def decode_text(text: str) -> list[ToolCall] | None:
    """The calls that the leaderboard reads from a prompted model's text; None where it reads none, which its irrelevance counts as right.

    First as its handlers read Python: back quotes and line ends around it removed, brackets added, `ast`. Then as they read JSON, a list of
    {"function", "parameters"} anywhere in the text. The leaderboard is told which of the two to expect, and no text is both. At last, for
    models with a notation of their own, the marked and the bare JSON of parse_calls, all of it or nothing. Reasoning and end tokens are
    taken off before, as its servers do. Arguments hold what Python has: tuples, and text for names and calls ("f(x)" for f(x)).
    """
    said = spoken(text)
    if said != text.strip():  # else the text as it came: a tab before a bracket is an error to the leaderboard
        text = said
    listed = text.strip("`\n ")
    listed = listed if listed.startswith("[") else f"[{listed}"
    listed = listed if listed.endswith("]") else f"{listed}]"
    calls = _decode_python(listed)
    if calls is None:
        calls = _decode_json(listed)
    if calls is None and not _OWN_JSON.search(listed):
        parsed = parse_calls(text, pythonic=False)
        calls = None if parsed.malformed else parsed.calls or None
    return calls


_JSON = re.compile(r"\[\s*\{.*?\}\s*\]", re.DOTALL)  # ends with the first "}]", also where that ends an argument
_OWN_JSON = re.compile(r'\[\s*\{\s*"function"\s*:\s*"')


def _decode_json(text: str) -> list[ToolCall] | None:
    found = _JSON.search(text)
    try:
        items = [item for item in json.loads(found.group()) if isinstance(item, dict)] if found else []
    except (ValueError, RecursionError):
        return None
    read = [(item.get("function"), item.get("parameters")) for item in items]
    if not read or not all(isinstance(name, str) and isinstance(arguments, dict) for name, arguments in read):
        return None
    return [ToolCall(name, arguments) for name, arguments in read]


def _decode_python(text: str) -> list[ToolCall] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's text is not our source code
            listed = ast.parse(text, mode="eval").body
        if not isinstance(listed, (ast.List, ast.Tuple)) or not all(isinstance(node, ast.Call) for node in listed.elts):
            return None
        return [ToolCall(*_call(node)) for node in listed.elts]
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def _call(node: ast.Call) -> tuple[str, dict]:
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return ".".join(reversed(parts)), {keyword.arg: _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr | None) -> object:
    match node:
        case ast.Constant(value=value):
            return "..." if value is ... else value
        case ast.UnaryOp(operand=ast.Constant(value=value)):
            return -value  # whatever the operator: +5 is -5 to the leaderboard, and `not True` is -1
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Dict(keys=keys, values=values):
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.BinOp():
            return _computed(node)
        case ast.Name(id=name):
            return name
        case ast.Call(keywords=[]):
            return ast.unparse(node)
        case ast.Call():
            return dict([_call(node)])
        case ast.Subscript(value=value, slice=index):
            return f"{ast.unparse(value)}[{ast.unparse(index)}]"
    raise ValueError(f"a {type(node).__name__} cannot stand in an argument")


_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitXor: operator.xor,
}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert, ast.Not: operator.not_}
_MAX_SIZE = 100_000  # bits of a number, elements of a sequence: 9**9**9 is a few letters and a night


def _computed(node: ast.expr | None) -> object:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items):
            return [_computed(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_computed(item) for item in items)
        case ast.Dict(keys=keys, values=values):
            return {_computed(key): _computed(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_computed(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)], _computed(left), _computed(right))
    raise ValueError(f"a {type(node).__name__} is not computed")


def _bounded(function: Callable, left: object, right: object) -> object:
    numbers = isinstance(left, int) and isinstance(right, int)
    if numbers and function is operator.pow and left.bit_length() * right > _MAX_SIZE:
        raise ValueError("too large a power")
    if numbers and function is operator.lshift and left.bit_length() + right > _MAX_SIZE:
        raise ValueError("too large a shift")
    if function is operator.mul:
        for many, times in ((left, right), (right, left)):
            if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int) and len(many) * times > _MAX_SIZE:
                raise ValueError("too long a sequence")
    if function is operator.mod and isinstance(left, (str, bytes)):
        raise ValueError("a format may ask for any width")
    return function(left, right)


# ---- calls against gold


def check_answer(calls: list[ToolCall], gold: list[dict], functions: list[dict], category: str) -> Trouble | None:
    """What the leaderboard finds wrong with the calls of one answer, or None. `functions` as the question has them, `gold` as above.

    Raises DataError where question and gold do not fit together, on which the leaderboard's checker ends with an error.
    """
    if len(calls) != len(gold):
        return ("wrong_count" if calls else "no_call"), f"makes {len(calls)} calls; must be {len(gold)}"
    if "parallel" in category:
        return _check_parallel(calls, gold, functions)
    function = _function_of(gold[0], functions) if "multiple" in category else functions[0]
    return _check_call(calls[0], function, gold[0])


def _check_parallel(calls: list[ToolCall], gold: list[dict], functions: list[dict]) -> Trouble | None:
    left = list(calls)
    for wanted in gold:
        function, troubles = _function_of(wanted, functions), []
        for index, call in enumerate(left):
            trouble = _check_call(call, function, wanted)
            if trouble is None:
                del left[index]  # for good, even if a later call of gold takes no other
                break
            troubles.append(trouble)
        else:
            return max(troubles, key=lambda trouble: FAILURES.index(trouble[0]))  # of the nearest
    return None


def _function_of(wanted: dict, functions: list[dict]) -> dict:
    name = next(iter(wanted))
    found = next((function for function in functions if function["name"] == name), None)
    if found is None:
        raise DataError(f'gold calls "{name}", which is not among the functions of the question')
    return found


def _check_call(call: ToolCall, function: dict, wanted: dict) -> Trouble | None:
    name, answers = function["name"], next(iter(wanted.values()))
    parameters = function["parameters"].get("properties", {})
    if call.name != name:
        return "wrong_tool", f"calls {call.name}; {name} would be right"
    for key in function["parameters"].get("required", []):
        if key not in call.arguments:
            return "missing_argument", f"{name}.{key} is required and missing"
    for key, value in call.arguments.items():
        if key not in parameters or key not in answers:
            return "extra_argument", f"{name}.{key} is not a parameter that gold takes"
        kind = _check_argument(value, answers[key], parameters[key], f"{name}.{key}")
        if kind:
            return kind, f"{name}.{key} is {_shown(value)}; must be {' or '.join(map(_shown, answers[key]))}"
    for key in answers:
        if key not in call.arguments and "" not in answers[key]:
            return "missing_argument", f"{name}.{key} is missing; gold does not let it out"
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _check_argument(value: object, answers: list, parameter: dict, where: str) -> str | None:
    """The failure, or None."""
    expected, inner = _type_of(parameter, where), None
    if parameter["type"] in ("array", "tuple"):
        inner = _type_of(parameter.get("items", {}), f"{where}[]")
    if parameter["type"] == "tuple" and type(value) is tuple:
        value = list(value)
    if parameter["type"] == "float" and type(value) is int:
        try:
            value = float(value)
        except OverflowError:  # the leaderboard's checker ends with an error
            return "wrong_value"
    # Where gold's own type is another than the parameter's ("a variable"), both are taken, and values are compared as they are.
    answer_type = _first_type(answers)
    is_variable = answer_type is not None and answer_type is not expected
    if type(value) is expected:
        if inner and not any(type(answer) is not list or _all_of(inner, value, answer) for answer in answers):
            return "wrong_type"
    elif type(value) is answer_type:
        is_variable = True
    else:
        return "wrong_type"
    if not is_variable and expected in (str, list, dict):
        compared = {dict: _same_object, str: _same_text, list: _same_objects if inner is dict else _same_list}[expected]
        return None if compared(value, answers) else "wrong_value"
    return None if value in answers else "wrong_value"


def _type_of(parameter: dict, where: str) -> type:
    named = parameter.get("type")
    if named not in _TYPES:
        raise DataError(f'{where} has the type "{named}"; the leaderboard knows {", ".join(_TYPES)}')
    return _TYPES[named]


def _first_type(answers: list) -> type | None:
    return next((type(answer) for answer in answers if answer != ""), None)


def _all_of(inner: type, value: list, answer: list) -> bool:
    of_answer = _first_type(answer)
    return all(type(item) is inner or type(item) is of_answer for item in value)


def _plain(value: object) -> object:
    """Text as the leaderboard compares it; anything else as it is."""
    return _OVERLOOKED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def _items(answer: object) -> list:
    """What the leaderboard iterates over where gold should hold a list: of "" nothing, so that [] is right where leaving out is."""
    return list(answer) if isinstance(answer, (list, str)) else []


def _same_text(value: str, answers: list) -> bool:
    return _plain(value) in [_plain(answer) for answer in answers if type(answer) is str]


def _same_list(value: list, answers: list) -> bool:
    return list(map(_plain, value)) in [list(map(_plain, _items(answer))) for answer in answers]


def _same_object(value: object, answers: list) -> bool:
    return any(_fits_object(value, answer) for answer in answers if answer != "")


def _fits_object(value: object, answer: object) -> bool:
    if not isinstance(value, dict) or not isinstance(answer, dict):
        return False
    return all(key in answer and _plain(item) in list(map(_plain, _items(answer[key]))) for key, item in value.items()) and all(
        key in value or (isinstance(wanted, (list, str)) and "" in wanted) for key, wanted in answer.items()
    )


def _same_objects(value: list, answers: list) -> bool:
    """In the order of gold."""
    return any(
        len(value) == len(_items(answer)) and all(_same_object(item, [one]) for item, one in zip(value, _items(answer), strict=True))
        for answer in answers
    )
