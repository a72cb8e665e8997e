"""Preference rows as people have them become canonical pairs, or answers with labels.

    {"prompt": [Message…], "chosen": [Message…], "rejected": [Message…], "tools": [Tool…]?, "margin": float?}    `kind` pairs
    {"prompt": [Message…], "completion": [Message…], "label": bool, "tools": [Tool…]?}                           `kind` labelled

or with text in the place of all lists of messages, and then without tools. Messages and tools are those of formats.py. A prompt ends with a
message of the user or a tool; each answer begins and ends with the assistant's, and what others say in between is context, not trained.

Layouts read: see `PAIR_LAYOUTS`. One raw row may give several canonical ones. Either kind is read from any layout: a pair is two labelled
answers, and labelled answers to the same question make pairs (`pair_answers`). What is chosen, or good, is held to what supervised training
asks of a row: its calls name tools that are offered. What is rejected, or bad, may call what does not exist: that is what it shows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence

from harness.data.conversation import calls_of, check_offered, check_results, kind_of, messages_of, object_of
from harness.errors import DataError
from harness.tools import normalise_tools, parse_calls
from harness.tools.schema import decode_json

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""What public sets call the two scores whose difference is a pair's margin."""
GOOD, BAD = ("chosen", "completion"), ("rejected",)

Answer = str | list[dict]


# ---- which layout


def detect_layout(row: dict) -> str:
    """The layout of a preference row, by its keys. Raises DataError where none or several fit."""
    fits = {name: [keys for keys in key_sets if keys <= row.keys()] for name, (key_sets, _, _) in PAIR_LAYOUTS.items()}
    all_keys = [keys for found in fits.values() for keys in found]
    found = [name for name, own in fits.items() if any(not any(keys < others for others in all_keys) for keys in own)]
    if len(found) == 1:
        return found[0]
    seen = f"the row's keys are {', '.join(map(str, row)) or 'none'}"
    if found:
        raise DataError(f"{seen}, which fit {' and '.join(found)}; say which with the source's `format`")
    if {"instruction", "completions"} <= row.keys():
        seen += " (UltraFeedback before its pairs were made; which of its scores makes an answer better is for you to say)"
    elif {"messages"} <= row.keys() or {"text"} <= row.keys():
        seen += " (a row of supervised training: there is nothing to prefer)"
    accepted = "; ".join(f"{name}: {shown}" for name, (_, shown, _) in PAIR_LAYOUTS.items())
    raise DataError(f"{seen}; must be one of the layouts {accepted}")


def to_preferences(row: dict, layout: str = "auto", *, kind: str) -> list[dict]:
    """Converts one raw row. kind: "labelled", or "pairs", which a layout of labelled answers gives back labelled, for `pair_answers`.

    Raises DataError saying what is wrong in the row (the caller knows where it stands).
    """
    layout = detect_layout(row) if layout == "auto" else layout
    key_sets, shown, convert = PAIR_LAYOUTS[layout]
    if not any(keys <= row.keys() for keys in key_sets):
        raise DataError(f"the row's keys are {', '.join(map(str, row)) or 'none'}; {layout} rows have {shown}")
    rows = convert(row)
    for canonical in rows:
        # toolpref's files keep their tools to themselves; what their calls name can be held against nothing.
        _check(canonical, offers=layout != "toolpref" or "tools" in canonical)
    if kind == "pairs":
        return rows
    answers = [answer for canonical in rows for answer in labelled_answers(canonical)]
    return [answer for i, answer in enumerate(answers) if answer not in answers[:i]]


# ---- between pairs and labelled answers


def labelled_answers(row: dict) -> list[dict]:
    """A pair as a good and a bad answer; a labelled answer as it is."""
    if "label" in row:
        return [row]
    shared = {key: row[key] for key in ("tools",) if key in row}
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", **shared} for side in ("chosen", "rejected")]


def pair_answers(answers: Sequence[tuple[str, dict]]) -> tuple[list[tuple[str, dict]], int]:
    """(location, pair) from (location, labelled answer), and how many answers found no partner.

    Answers to the same prompt with the same tools are paired in their order, the n-th good one with the n-th bad one; where one kind has
    run out its answers are taken again from the first, so that all are in a pair and their number does not multiply.
    """
    asked: dict[str, tuple[list, list]] = {}
    for location, row in answers:
        key = json.dumps(question(row), sort_keys=True)
        asked.setdefault(key, ([], []))[0 if row["label"] else 1].append((location, row))
    pairs, alone = [], 0
    for good, bad in asked.values():
        if not good or not bad:
            alone += len(good) + len(bad)
            continue
        for n in range(max(len(good), len(bad))):
            (place, better), (other_place, worse) = good[n % len(good)], bad[n % len(bad)]
            file, _, line = other_place.rpartition(":")
            place = f"{place}+{line if place.startswith(f'{file}:') else other_place}"
            tools = {"tools": better["tools"]} if "tools" in better else {}
            pair = {"prompt": better["prompt"], "chosen": better["completion"], "rejected": worse["completion"], **tools}
            pairs.append((place, pair))
    return pairs, alone


def question(row: dict) -> dict:
    """What a pair or a labelled answer answers."""
    return {key: row[key] for key in ("prompt", "tools") if key in row}


def side(row: dict, name: str) -> dict:
    """One answer of a preference row (chosen, rejected or completion) as a row of supervised training, in which only it is trained."""
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": row[name]}
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"messages": row["prompt"] + row[name], **tools, "train_from": len(row["prompt"])}


def good_side(row: dict) -> dict | None:
    """The chosen or good answer of a preference row as a row of supervised training; None of a bad one."""
    return side(row, "chosen") if "chosen" in row else side(row, "completion") if row["label"] else None


# ---- the layouts


def _from_preference(row: dict) -> list[dict]:
    """prompt, chosen and rejected, or two whole conversations; their prompt is then what both begin with."""
    prompt, said = _question_and_answers(row.get("prompt"), {"chosen": row["chosen"], "rejected": row["rejected"]})
    return [_row(prompt, said, row.get("tools"), **_margin(row))]


def _from_sharegpt(row: dict) -> list[dict]:
    """LLaMA-Factory's: {"from", "value"} in conversations, chosen and rejected; an answer may be one turn that holds calls and results."""
    prompt = _turns(row["conversations"], "conversations", strict=False)
    if isinstance(row.get("system"), str) and row["system"]:
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    said = {
        name: _turns(row[name] if isinstance(row[name], list) else [row[name]], name, strict=name in GOOD)
        for name in ("chosen", "rejected")
    }
    return [_row(prompt, said, row.get("tools"), **_margin(row))]


def _from_kto(row: dict) -> list[dict]:
    """prompt, completion and label, or messages and label: there the answer is all that follows the user's last message."""
    if "completion" in row:
        prompt, said = _question_and_answers(row.get("prompt"), {"completion": row["completion"]})
    else:
        prompt, answer = _after_the_user(messages_of(row["messages"], "messages"))
        said = {"completion": answer}
    return [_row(prompt, said, row.get("tools"), label=_label(row["label"]))]


def _from_toolpref(row: dict) -> list[dict]:
    """Toolset-Training's: conversations and label. Its files say nowhere which tools there are."""
    label = _label(row["label"])
    prompt, answer = _after_the_user(_turns(row["conversations"], "conversations", strict=label))
    return [_row(prompt, {"completion": answer}, row.get("tools"), label=label)]


def _from_when2call(row: dict) -> list[dict]:
    """When2Call: of its test set each wrong answer makes a pair with the right one; its training set has pairs."""
    tools = row.get("tools")
    if "chosen_response" in row:
        prompt = messages_of(row["messages"], "messages")
        said = {
            name: [_when2call_answer(row[f"{name}_response"], f"{name}_response", strict=name in GOOD)] for name in ("chosen", "rejected")
        }
        return [_row(prompt, said, tools)]
    answers, right, asked = object_of(row["answers"], "answers"), row["correct_answer"], row["question"]
    if not isinstance(asked, str) or not asked:
        raise DataError(f"question is {kind_of(asked)}; must be text")
    if not isinstance(right, str) or not answers.get(right):
        raise DataError(f"correct_answer is {json.dumps(right)[:40]}; must be one of the answers {', '.join(answers)}")
    said = {
        name: _when2call_answer(text, f"answers.{name}", strict=name == right, calls=name == "tool_call") for name, text in answers.items()
    }
    prompt = [{"role": "user", "content": asked}]
    return [_row(prompt, {"chosen": [said[right]], "rejected": [said[name]]}, tools) for name in said if name != right]


# name -> (the key sets that show it, what to tell a person, the converter)
PAIR_LAYOUTS: dict[str, tuple[tuple[set[str], ...], str, Callable[[dict], list[dict]]]] = {
    "preference": (
        ({"chosen", "rejected"},),
        "prompt (where chosen and rejected do not begin with it), chosen, rejected",
        _from_preference,
    ),
    "sharegpt": (({"conversations", "chosen", "rejected"},), "conversations, chosen, rejected (from and value)", _from_sharegpt),
    "kto": (({"prompt", "completion", "label"}, {"messages", "label"}), "prompt and completion, or messages, with label", _from_kto),
    "toolpref": (({"conversations", "label"},), "conversations, label", _from_toolpref),
    "when2call": (
        ({"question", "answers", "correct_answer"}, {"messages", "chosen_response", "rejected_response"}),
        "question, answers, correct_answer, or messages, chosen_response, rejected_response",
        _from_when2call,
    ),
}


# ---- their parts


def _row(prompt: Answer, said: dict[str, Answer], tools: object, **more: object) -> dict:
    tools = normalise_tools(tools)
    return {"prompt": prompt, **said, **({"tools": tools} if tools else {}), **more}


def _question_and_answers(prompt: object, answers: dict[str, object]) -> tuple[Answer, dict[str, Answer]]:
    """The prompt and the answers as all text or all messages, whichever way a row gives them."""
    texts = {isinstance(answer, str) for answer in answers.values()}
    if len(texts) > 1:
        raise DataError(" and ".join(f"{name} is {kind_of(answer)}" for name, answer in answers.items()) + "; must be alike")
    if texts == {True}:
        if prompt is None:
            raise DataError(f"{' and '.join(answers)} are text, and there is no prompt; must have a prompt, or be lists of messages")
        if isinstance(prompt, str):
            return prompt, answers
        said = {name: [{"role": "assistant", "content": answer}] for name, answer in answers.items()}
        return messages_of(prompt, "prompt"), {name: messages_of(answer, name) for name, answer in said.items()}
    said = {name: messages_of(answer if isinstance(answer, list) else [answer], name) for name, answer in answers.items()}
    whole = all(answer and answer[0]["role"] != "assistant" for answer in said.values())
    if prompt is None:
        return _split(said)
    if isinstance(prompt, str) and not whole:
        return [{"role": "user", "content": prompt}], said
    if isinstance(prompt, str):  # UltraFeedback: the question stands in both conversations, and by itself
        asked, said = _split(said)
        if not any(message["role"] == "user" and message["content"].strip() == prompt.strip() for message in asked):
            raise DataError("prompt is not what the user says in both conversations; leave out the prompt, or the conversations' questions")
        return asked, said
    asked = messages_of(prompt, "prompt")
    if asked and all(answer[: len(asked)] == asked for answer in said.values()):
        said = {name: answer[len(asked) :] for name, answer in said.items()}
    return asked, said


def _split(said: dict[str, list[dict]]) -> tuple[list[dict], dict[str, list[dict]]]:
    """Whole conversations at the last place up to which all say the same, and where the assistant is to speak."""
    shortest = min(map(len, said.values()))
    first, *others = said.values()
    alike = next((i for i in range(shortest) if any(other[i] != first[i] for other in others)), shortest)
    for end in range(alike, 0, -1):
        speaks_next = all(len(answer) > end and answer[end]["role"] == "assistant" for answer in said.values())
        if speaks_next and first[end - 1]["role"] in ("user", "tool"):
            return first[:end], {name: answer[end:] for name, answer in said.items()}
    raise DataError(f"{' and '.join(said)} have no question in common; must begin with the same messages, which the assistant answers")


def _after_the_user(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    end = asked[-1] + 1 if asked else 0
    return messages[:end], messages[end:]


def _margin(row: dict) -> dict[str, float]:
    if row.get("margin") is not None:
        return {"margin": _number(row["margin"], "margin")}
    for better, worse in SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            margin = _number(row[better], better) - _number(row[worse], worse)
            if margin < 0:
                raise DataError(f"{better} = {row[better]} is below {worse} = {row[worse]}; the chosen answer must not be the worse one")
            return {"margin": margin}
    return {}


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{what} is {kind_of(value) if not isinstance(value, float) else value}; must be a number")
    return float(value)


def _label(value: object) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"label is {json.dumps(value, default=str)[:40]}; must be true (a good answer) or false (a bad one)")
    return value


# ---- texts that hold calls

_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "call",
    "observation": "tool", "tool": "tool",
}  # fmt: skip
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_REASONING = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_TOOLCALL = re.compile(r"\s*<TOOLCALL>(.*)</TOOLCALL>\s*", re.DOTALL)


def _turns(raw: object, where: str, *, strict: bool) -> list[dict]:
    """Messages from turns that have {"from", "value"}, or are messages already. strict: a call that cannot be read is refused."""
    raw = decode_json(raw, where)
    if not isinstance(raw, list) or not any(isinstance(turn, dict) and "from" in turn for turn in raw):
        return messages_of(raw, where)
    messages: list[dict] = []
    for i, turn in enumerate(raw):
        place = f"{where}[{i}]"
        turn = object_of(turn, place)
        speaker, value = _SPEAKERS.get(turn.get("from")), turn.get("value")
        if speaker is None or not isinstance(value, str):
            shown = json.dumps(turn.get("from"))[:40]
            raise DataError(f"{place}: from is {shown} and value {kind_of(value)}; must be text from {', '.join(_SPEAKERS)}")
        if speaker == "assistant":
            messages += _spoken(value, place, strict)
        elif speaker == "call":
            messages.append(_listed_calls(value, place, strict))
        else:
            wrapped = _RESULT.fullmatch(value.strip()) if speaker == "tool" else None
            messages.append({"role": speaker, "content": wrapped.group(1) if wrapped else value})
    return messages_of(messages, where)


def _spoken(value: str, where: str, strict: bool) -> list[dict]:
    """One text in which the assistant writes calls and the results stand between them, as the turns that they are."""
    said, *rest = _RESULT.split(value)
    if not rest:
        return [_with_calls(said, where, strict)]
    messages = []
    for n, part in enumerate((said, *rest)):
        if n % 2:
            messages.append({"role": "tool", "content": part})
        elif part.strip():
            messages.append(_with_calls(part.strip(), where, strict))
    return messages


def _with_calls(text: str, where: str, strict: bool) -> dict:
    if "<tool_call>" not in text:
        return {"role": "assistant", "content": text}
    parsed = parse_calls(text)
    if parsed.malformed or not parsed.calls:
        if strict:
            raise DataError(f"{where}: the assistant's call cannot be read: {(parsed.malformed or [text])[0][:80]}")
        return {"role": "assistant", "content": text}
    reasoning = _REASONING.match(text)
    calls = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in parsed.calls]
    said = {"reasoning_content": reasoning and reasoning.group(1).strip(), "content": parsed.text}
    return {"role": "assistant", **{key: value for key, value in said.items() if value}, "tool_calls": calls}


def _listed_calls(text: str, where: str, strict: bool) -> dict:
    """A message from a call, or a list of them, as JSON text; what cannot be read is the message's words."""
    try:
        listed = decode_json(text, where)
        return {"role": "assistant", "tool_calls": calls_of(listed if isinstance(listed, list) else [listed], where)}
    except DataError:
        if strict:
            raise
        return {"role": "assistant", "content": text}


def _when2call_answer(raw: object, where: str, *, strict: bool, calls: bool = False) -> dict:
    """The assistant's message. calls: the text is a call. Elsewhere one is marked by <TOOLCALL>."""
    text = raw.get("content") if isinstance(raw, dict) else raw
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} is {kind_of(text)}; must be text")
    marked = _TOOLCALL.fullmatch(text)
    if not calls and not marked:
        return {"role": "assistant", "content": text}
    said = _listed_calls(marked.group(1) if marked else text, where, strict)
    return said if "tool_calls" in said else {"role": "assistant", "content": text}


# ---- what holds for every row


def _check(row: dict, *, offers: bool) -> None:
    """offers: the calls of a good answer must name tools of the row."""
    prompt, tools = row["prompt"], row.get("tools", [])
    answers = [name for name in (*GOOD, *BAD) if name in row]
    if isinstance(prompt, str):
        if tools:
            raise DataError("tools stand beside a text prompt, which no template can put them into; must be lists of messages")
        for name in answers:
            if not row[name]:
                raise DataError(f"{name} is empty; there is nothing to compare")
        return
    if not prompt:
        raise DataError("prompt is empty; there is no question")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise DataError(f"prompt ends with a message of the {prompt[-1]['role']}; must end with the user's or a tool's, which is answered")
    for name in answers:
        answer = row[name]
        if not answer:
            raise DataError(f"{name} is empty: nobody answers")
        for end, message in (("begins", answer[0]), ("ends", answer[-1])):
            if message["role"] != "assistant":
                raise DataError(f"{name} {end} with a message of the {message['role']}; must be the assistant's")
        if name in GOOD and row.get("label", True):
            check_results(prompt + answer, _place(name, len(prompt)))
            if offers:
                check_offered(answer, tools, f"{name}[{{}}]".format)
        else:
            check_results(prompt)


def _place(name: str, asked: int) -> Callable[[int], str]:
    return lambda i: f"prompt[{i}]" if i < asked else f"{name}[{i - asked}]"
