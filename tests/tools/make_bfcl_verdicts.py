"""Thousands of changed gold calls, and what the leaderboard's own code says of each: how tests/tools/golden/bfcl_verdicts.json is made.

    pip install --no-deps --target DIR bfcl-eval==2026.3.23
    python tests/tools/make_bfcl_verdicts.py DIR [DATA]

DIR is used as it is: what bfcl-eval imports beside its checker (model clients, parsers of Java) is replaced by empty modules. DATA is
BFCL's data; ../shared/data/bfcl without it. Nothing of it goes into the golden file, which has the seed, the digest of the changes and a
bit for each verdict. The script compares before it writes, also on the live categories that come with bfcl-eval, and ends with 1 if a
verdict differs.
"""

import base64
import hashlib
import json
import random
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.evaluate.suite import Question, load_questions
from harness.tools import OneOf, ToolCall, read_gold, render_gold
from harness.tools.bfcl import check_answer, decode_text

SEED = 20261128
PER_QUESTION = 6
"""Changes of calls; of text there are two more."""
GOLDEN = Path(__file__).parent / "golden" / "bfcl_verdicts.json"


@dataclass(frozen=True)
class Change:
    kind: str
    question: Question
    calls: list[tuple[str, dict]] | None
    text: str | None
    notation: str = "python"
    """Of the text: the leaderboard is told which one to expect, "python" or "json"."""

    def __str__(self) -> str:
        return repr((self.kind, self.question.id, self.calls, self.text, self.notation))


# ---- changes of calls: each takes (generator, calls, question) and returns them changed


def places(value: object) -> Iterator[tuple[object, object]]:
    """(container, key) of every value inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def somewhere(generator: random.Random, calls: list, of: tuple = (object,)) -> tuple | None:
    found = [(box, key) for _, arguments in calls for box, key in places(arguments) if isinstance(box[key], of)]
    return generator.choice(found) if found else None


def at_one_place(change: Callable, of: tuple = (object,)) -> Callable:
    def changed(generator, calls, question):
        place = somewhere(generator, calls, of)
        if place:
            box, key = place
            box[key] = change(generator, box[key])
        return calls

    return changed


def change_name(generator, calls, question):
    at = generator.randrange(len(calls))
    name, arguments = calls[at]
    others = [function["name"] for function in question.functions]
    calls[at] = generator.choice([name.upper(), name.replace(".", "_"), name + "_", f" {name}", generator.choice(others)]), arguments
    return calls


def change_type(generator, value):
    return generator.choice([str(value), [value], {"value": value}, None, True, 0, 0.0, repr(value)])


def near_type(generator, value):
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float)):
        return generator.choice([float(value), int(value), bool(value)])
    return tuple(value) if isinstance(value, list) else list(value)


def change_number(generator, value):
    return value + generator.choice([1, -1, 0.5]) if not isinstance(value, bool) else not value


def change_text(generator, value):
    return generator.choice([value + "s", value[1:], value[::-1], "", "Paris", f"{value} {value}"])


def change_order(generator, calls, question):
    place = somewhere(generator, calls, (list,))
    if place and generator.random() < 0.5:
        place[0][place[1]].reverse()
    calls = [(name, dict(reversed(arguments.items()))) for name, arguments in calls]
    return calls[::-1] if generator.random() < 0.7 else generator.sample(calls, len(calls))


def drop(generator, calls, question):
    found = [(box, key) for _, arguments in calls for box, key in places(arguments)]
    if found and generator.random() < 0.8:
        box, key = generator.choice(found)
        del box[key]
    else:
        del calls[generator.randrange(len(calls))]
    return calls


def add(generator, calls, question):
    name, arguments = calls[generator.randrange(len(calls))]
    properties = next((f["parameters"]["properties"] for f in question.functions if f["name"] == name), {})
    boxes = [arguments, *[box[key] for box, key in places(arguments) if isinstance(box[key], (dict, list))]]
    box = generator.choice(boxes)
    if generator.random() < 0.25:
        calls.append(generator.choice(calls))
    elif isinstance(box, list):
        box.append(generator.choice(box) if box else "")
    else:
        box[generator.choice([*properties, "unit"])] = generator.choice(["", "unit", 1, 1.0, True, [], {}])
    return calls


def change_case(generator, value):
    return generator.choice([value.upper(), value.lower(), value.title(), value.swapcase()])


def change_punctuation(generator, value):
    mark, at = generator.choice(" ,./-_*^'\"()!:\n"), generator.randrange(len(value) + 1)
    return generator.choice(
        [value[:at] + mark + value[at:], value.replace(" ", ""), value.replace(",", ""), value.replace("'", '"'), value + mark]
    )


def choose_alternatives(generator, calls, question):
    def chosen(value):
        if isinstance(value, OneOf):
            return chosen(generator.choice(value.values)) if value.values else ""
        if isinstance(value, dict):
            return {
                key: chosen(one)
                for key, one in value.items()
                if not (isinstance(one, OneOf) and one.omittable and generator.random() < 0.5)
            }
        return list(map(chosen, value)) if isinstance(value, list) else value

    return [(call.name, chosen(call.arguments)) for call in read_gold(question.gold, question.functions)]


CHANGES = {
    "gold": lambda generator, calls, question: calls,
    "alternative": choose_alternatives,
    "name": change_name,
    "type": at_one_place(change_type),
    "near_type": at_one_place(near_type, (int, float, list, str)),
    "number": at_one_place(change_number, (int, float)),
    "text": at_one_place(change_text, (str,)),
    "order": change_order,
    "missing": drop,
    "extra": add,
    "casing": at_one_place(change_case, (str,)),
    "punctuation": at_one_place(change_punctuation, (str,)),
    "number_as_text": at_one_place(lambda generator, value: str(value), (int, float)),
    "empty": at_one_place(lambda generator, value: generator.choice(["", [], {}, None]), (object,)),
}


# ---- changes of text


def as_python(calls: list) -> str:
    return (
        "[" + ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls) + "]"
    )


def as_json(calls: list) -> str:
    return json.dumps([{"function": name, "parameters": arguments} for name, arguments in calls])


def other_literals(generator, text, calls):
    """One argument written as something that is no literal."""
    place = somewhere(generator, [(name, {**arguments}) for name, arguments in calls])
    if not place:
        return text
    value = place[0][place[1]]
    number = value if isinstance(value, (int, float)) else 2
    signs = [f"+{number!r}", f"--{number!r}", f"not {value!r}", f"~{number!r}"]
    sums = [f"{number!r} + 0", f"{number!r} * 1", f"({number!r} - 1) + 1"]
    with_value = [f"{value!r} + ''", f"{{{value!r}}}", f"({value!r},)", f"[{value!r}] * 2"]
    others = """2 ** -1; 1 / 0; name; a.b; f(1); f(x=1); f(x=g(y=2)); a[0]; a['k'][1:2]; lambda: 1; ...; a + 1; 1 < 2; f'{a}'; b'x'; 1j;
        None; True; true; [x for x in y]; *a; -'a'; - - 1; {**a}; {[]: 1}; 1 if a else 2; -True; -(1 + 2); 'a' 'b'; 5 % 3; 7 // 2; 1 << 3;
        5 & 3; 2 | 1; [1] + [2]; (1, 2) + (3,); {'a': 1} | {'a': 2}"""
    written = [*signs, *sums, *with_value, *re.split(r";\s+", others)]
    return text.replace(repr(value), generator.choice(written), 1)


def around(generator, text, calls):
    inner = text[1:-1]
    wrapped = """INNER; `TEXT`; 'TEXT'; TEXT.; Sure: TEXT; (INNER); [TEXT]; TEXT, TEXT; TEXT[0]; [INNER; INNER]; print(INNER); [INNER,];
        {INNER}; TEXT + []; await INNER; [a().INNER]; [x.INNER]; []; [{}]; None; I cannot help with that.; Sorry; f; f(); [f(), 1]; ()"""
    inside = [inner.replace("(", f"({more}, ", 1) for more in ("1", "*a", "**a", "a := 1")]
    broken = [inner[:-2], inner.replace("=", "==", 1), f"(lambda: 1)({inner.partition('(')[2]}", "", "\x00", "[" * 300, f"{text};"]
    lines = [f"```\n{text}\n```", f"```python\n{text}\n```", f"\n {text} \n", f"\t{text}", f"{text}\n{text}"]
    frames = [frame.replace("INNER", inner).replace("TEXT", text) for frame in re.split(r";\s+", wrapped)]
    return generator.choice([*frames, *inside, *broken, *lines])


def json_text(generator, text, calls):
    written = as_json(calls)
    return generator.choice(
        [written, f"\n{written}\n", f"```json\n{written}\n```", json.dumps(json.loads(written), indent=2), written[:-1], written[:-9], "[]"]
    )


TEXTS = {"literal": (other_literals, "python"), "around": (around, "python"), "json": (json_text, "json")}


def changes(questions: dict[str, Question], seed: int = SEED) -> Iterator[Change]:
    generator = random.Random(seed)
    for question in questions.values():
        if not question.gold:
            continue
        rendered = [(call.name, call.arguments) for call in render_gold(read_gold(question.gold, question.functions))]
        kinds = [
            "gold",
            "alternative",
            *generator.sample([name for name in CHANGES if name not in ("gold", "alternative")], PER_QUESTION - 2),
        ]
        for kind in kinds:
            yield Change(kind, question, CHANGES[kind](generator, _copy(rendered), question), None)
        for kind in ("literal", generator.choice(["around", "json"])):
            change, notation = TEXTS[kind]
            calls = choose_alternatives(generator, None, question)
            try:
                text = change(generator, as_json(calls) if notation == "json" else as_python(calls), calls)
            except TypeError:  # JSON of a value that has none
                continue
            yield Change(kind, question, None, text, notation)


def _copy(calls: list) -> list:
    return [(name, json.loads(json.dumps(arguments))) for name, arguments in calls]


def digest(changed: list[Change]) -> str:
    return hashlib.sha256("\n".join(map(str, changed)).encode("utf-8", "backslashreplace")).hexdigest()


# ---- verdicts


def our_verdict(change: Change) -> tuple[bool, list[dict] | None]:
    """(right, what was decoded)."""
    calls = [ToolCall(*call) for call in change.calls] if change.text is None else decode_text(change.text)
    if calls is None:
        return False, None
    trouble = check_answer(calls, change.question.gold, change.question.functions, change.question.category)
    return trouble is None, [{call.name: call.arguments} for call in calls]


class Leaderboard:
    """bfcl-eval's own decoder and checker, from a folder that holds the package."""

    def __init__(self, folder: str):
        class Anything(types.ModuleType):
            def __getattr__(self, name):
                return lambda *arguments, **options: lambda function: function

        sys.path.append(folder)
        models = types.ModuleType("bfcl_eval.constants.model_config")
        models.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
        sys.modules[models.__name__] = models
        names = ("tenacity", "tree_sitter", "tree_sitter_java", "tree_sitter_javascript", "bfcl_eval.constants.executable_backend_config")
        parsers = ("bfcl_eval.model_handler.parser.java_parser", "bfcl_eval.model_handler.parser.js_parser")
        for name in (*names, *parsers):
            sys.modules[name] = Anything(name)
        from bfcl_eval.constants.enums import Language, ReturnFormat
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
        from bfcl_eval.model_handler.utils import default_decode_ast_prompting
        from bfcl_eval.utils import is_function_calling_format_output

        self.python, self.formats = Language.PYTHON, {"python": ReturnFormat.PYTHON, "json": ReturnFormat.JSON}
        self.check, self.decode, self.is_format = ast_checker, default_decode_ast_prompting, is_function_calling_format_output
        self.ended_with_an_error: Counter = Counter()

    def verdict(self, change: Change) -> tuple[bool, list[dict] | None]:
        if change.calls is not None:
            calls = [{name: arguments} for name, arguments in change.calls]
        else:
            try:
                calls = self.decode(change.text, self.formats[change.notation])
            except Exception:
                return False, None
            if not self.is_format(calls):
                return False, None
        question = change.question
        try:
            return self.check(question.functions, calls, question.gold, self.python, question.category, "any")["valid"], calls
        except Exception as error:
            self.ended_with_an_error[f"{change.kind}: {type(error).__name__}: {error}"] += 1
            return False, calls


def pack(bits: list[bool]) -> str:
    return base64.b64encode(bytes(sum(bit << n for n, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))).decode()


def unpack(text: str, count: int) -> list[bool]:
    packed = base64.b64decode(text)
    return [bool(packed[at // 8] >> at % 8 & 1) for at in range(count)]


def compare(leaderboard: Leaderboard, questions: dict[str, Question], what: str) -> tuple[list[Change], list[tuple], int]:
    changed = list(changes(questions))
    theirs, ours = [leaderboard.verdict(change) for change in changed], [our_verdict(change) for change in changed]
    print(
        f"{what}: {len(changed)} changes of {len({change.question.id for change in changed})} questions; right by the leaderboard's code:"
    )
    for kind in dict.fromkeys(change.kind for change in changed):
        verdicts = [right for change, (right, _) in zip(changed, theirs, strict=True) if change.kind == kind]
        print(f"  {kind:16}{sum(verdicts):6} of {len(verdicts)}")
    # An empty list that JSON made of what is no JSON is no call to us, and none to it.
    different = [n for n, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a[0] != b[0] or repr(a[1] or None) != repr(b[1] or None)]
    for n in different[:20]:
        print(f"  DIFFERS: {changed[n]}\n    the leaderboard's: {theirs[n]}\n    ours: {ours[n]}")
    print(f"  judged or decoded differently: {len(different)}")
    return changed, theirs, len(different)


def compare_corners(leaderboard: Leaderboard) -> int:
    """The tables of test_bfcl.py, whose verdicts are written by hand."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import test_bfcl

    different = 0
    for parameter, answers, value, right in test_bfcl.VALUES:
        question = test_bfcl.question({"a": parameter}, {"a": answers})
        different += leaderboard.verdict(Change("corner", question, [("f", {"a": value})], None))[0] is not right
    for text, decoded in test_bfcl.DECODED:
        found = leaderboard.verdict(Change("corner", test_bfcl.question({}, {}), None, text))[1]
        different += repr(found) != repr(decoded if not decoded else [{name: arguments} for name, arguments in decoded])
    print(f"written by hand: {len(test_bfcl.VALUES)} values and {len(test_bfcl.DECODED)} texts; judged or decoded differently: {different}")
    return different


def main(folder: str, data: str = str(Path(__file__).resolve().parents[3] / "shared" / "data" / "bfcl")) -> int:
    leaderboard = Leaderboard(folder)
    changed, theirs, different = compare(leaderboard, load_questions([Path(data)], [Path(data) / "possible_answer"]), "four categories")
    live = [
        Path(folder) / "bfcl_eval" / "data" / f"BFCL_v4_live_{name}.json"
        for name in ("simple", "multiple", "parallel", "parallel_multiple")
    ]
    in_live = load_questions(live, [file.parent / "possible_answer" / file.name for file in live])
    *_, different_live = compare(leaderboard, in_live, "live categories")
    different += compare_corners(leaderboard)
    for error, count in leaderboard.ended_with_an_error.most_common():
        print(f"the leaderboard's checker ended with an error, counted as wrong: {count} times {error}")
    if different or different_live:
        return 1
    rights, calls = [right for right, _ in theirs], [bool(decoded) for _, decoded in theirs]
    golden = {
        "bfcl_eval": "2026.3.23",
        "seed": SEED,
        "count": len(changed),
        "sha256": digest(changed),
        "right": pack(rights),
        "calls": pack(calls),
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{sum(rights)} right and {len(rights) - sum(rights)} wrong written to {GOLDEN}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
