"""From one canonical row to token ids and a mask that says which of them are trained.

A conversation is rendered once and tokenised once; the mask comes from character spans of that one text, never from token ids
(pad may equal eos) and never from tokenising pieces. Which characters the assistant said is known, in this order, from

1. the `{% generation %}` markers of the tokenizer's own chat template;
2. the markers of a training template that the caller provides (tasks pass TRL's);
3. differences of prefixes: what `messages[:i]` plus the generation prompt is short of `messages[:i+1]`, where both really are
   prefixes of the whole (checked on every row).

Promises. Nothing but the assistant's turns is trained. The token that ends a turn is trained too, also where the markers leave it
out or the template writes it at the head of the next message; a turn that nothing ends is refused. A token that holds characters
of both sides of a boundary is not trained, unless the foreign ones are white space. What a row has and its template does not show
to the model (tools, calls, tool results, reasoning) is refused, because training on the rest would teach to invent it; so are calls
that read back as others (readback.py).
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from harness.data.encode import Encoder, Span, Tokens
from harness.data.readback import lost_calls
from harness.errors import DataError, ModelError

logger = logging.getLogger(__name__)

TrainingTemplate = Callable[[PreTrainedTokenizerBase], str | None] | str | None

REMEDY = "write a template with {% generation %} markers around what the assistant says and set data.chat_template to its path"


@dataclass(frozen=True)
class Rendered:
    """`ids` and `mask` are of one length; `turn_ends[i]` is the number of leading tokens that end with the i-th assistant turn
    (empty where every token is trained and turns are not told apart)."""

    ids: list[int]
    mask: list[bool]
    turn_ends: list[int]


def render(tokenizer: PreTrainedTokenizerBase, row: dict, *, training_template: TrainingTemplate = None, location: str = "row") -> Rendered:
    """`Renderer(...).render(row)` for a single row. Raises DataError for the row, ModelError for the tokenizer or its template."""
    return Renderer(tokenizer, training_template=training_template).render(row, location)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that end an assistant's turn in the tokenizer's own template; none without a template."""
    return Renderer(tokenizer).end_of_turn_ids() if tokenizer.chat_template else set()


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversations: bool = True,
    training_template: TrainingTemplate = None,
    stop_ids: Iterable[int] | None = None,
) -> None:
    """Raise ModelError unless rows can be tokenised, masked and padded, and generation can stop where training says stop.

    stop_ids: every token id at which generation stops (the model's generation_config). With it, a template whose turns end with
    none of these and not with eos is refused; without it, that is only logged, because many models keep a list of stops there.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: a slow tokenizer, which cannot say which characters a token covers; a tokenizer.json is needed")
    for kind in ("eos", "pad"):
        token, token_id = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
        if token is None or token_id is None:
            raise ModelError(f"{name}: the tokenizer has no {kind}_token; set one that is in its vocabulary")
        if not 0 <= token_id < len(tokenizer):
            raise ModelError(f"{name}: {kind}_token {token!r} has id {token_id}, outside the vocabulary of {len(tokenizer)}")
    if not conversations:
        return
    renderer = Renderer(tokenizer, training_template=training_template)
    ends = renderer.end_of_turn_ids()
    if not ends:
        raise ModelError(
            f"{name}: the chat template ends an assistant turn with no special token, so a model would never learn to stop; "
            "write {{ eos_token }} after the assistant's content and set data.chat_template to the path of that template"
        )
    stops = {tokenizer.eos_token_id, *(stop_ids or ())}
    if not ends & stops:
        written = " or ".join(sorted(map(repr, tokenizer.convert_ids_to_tokens(sorted(ends)))))
        message = f"{name}: the chat template ends an assistant turn with {written}, but generation stops at "
        message += f"{', '.join(map(repr, tokenizer.convert_ids_to_tokens(sorted(stops))))}"
        if stop_ids is not None:
            raise ModelError(f"{message}; add it to eos_token_id of the generation config, or make it the tokenizer's eos_token")
        logger.warning("%s; give generation both, or it runs past the end of a turn", message)


@dataclass
class Renderer:
    """Turns canonical rows into ids and masks for one tokenizer. Pickles, so that processes can share the work.

    training_template: a template, or a function that looks one up, used where the tokenizer's own has no markers.
    train_on: "assistant", or "all": every token of the row is trained.
    """

    tokenizer: PreTrainedTokenizerBase
    training_template: TrainingTemplate = None
    train_on: str = "assistant"
    _probed: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if callable(self.training_template):
            needed = self.tokenizer.chat_template is not None and not has_markers(self.tokenizer.get_chat_template())
            self.training_template = self.training_template(self.tokenizer) if needed else None

    @property
    def name(self) -> str:
        """Whose template it is: the recipe's file (model.load_tokenizer notes it), or the tokenizer's folder or hub id."""
        return getattr(self.tokenizer, "chat_template_file", None) or self.tokenizer.name_or_path or type(self.tokenizer).__name__

    def render(self, row: dict, location: str = "row") -> Rendered:
        if "messages" in row:
            return self._render_conversation(row, location)
        return self._render_text(row.get("prompt", ""), row["completion"] if "completion" in row else row["text"], location)

    def render_prompt(self, row: dict, location: str = "row") -> list[int]:
        """Ids of a conversation that the assistant is to answer, with the words that begin its turn. Raises DataError."""
        tools = row.get("tools") or None
        text, _ = self._write(self.template(tools), _with_content(row["messages"]), tools, location, prompt=True)
        return self._encoder.encode(text, location).ids

    # ---- plain text -------------------------------------------------------------------------------------------------------

    def _render_text(self, prompt: str, completion: str, location: str) -> Rendered:
        tokens = self._encoder.encode(prompt + completion, location, add_special_tokens=True)
        everything = self.train_on == "all" or not prompt
        start = 0 if everything else len(prompt)
        trained = set(tokens.inside((start, len(tokens.text))))
        eos = self.tokenizer.eos_token_id
        if not tokens.ids or tokens.ids[-1] != eos:
            tokens.ids.append(eos)
        trained.add(len(tokens.ids) - 1)
        return Rendered(tokens.ids, [t in trained for t in range(len(tokens.ids))], [len(tokens.ids)])

    # ---- conversations ----------------------------------------------------------------------------------------------------

    def _render_conversation(self, row: dict, location: str) -> Rendered:
        messages = _with_content(row["messages"])
        tools = row.get("tools") or None  # templates write boilerplate for an empty list
        template = self.template(tools)
        if self.train_on == "all":
            text, _ = self._write(template, messages, tools, location)
            self._check_shown(template, messages, tools, text, text, location)
            ids = self._encoder.encode(text, location).ids
            return Rendered(ids, [True] * len(ids), [])
        text, turns = self.turns_of(row, location)
        said = "\n".join(text[a:b] for turn in turns.values() for a, b in turn)
        self._check_shown(template, messages, tools, text, said, location)
        start = row.get("train_from", 0)
        for i, turn in turns.items():
            lost = lost_calls(messages[i], "".join(text[a:b] for a, b in turn)) if i >= start else None
            if lost:
                remedy = "change the row, or set data.chat_template to one that does not"
                raise DataError(
                    f"{location}: the calls of message {i} read back otherwise from the chat template of {self.name}: {lost}; {remedy}"
                )
        tokens = self._encoder.encode(text, location)
        return self._mask(tokens, list(turns.values()), list(turns), start, has_markers(template), template, location)

    def turns_of(self, row: dict, location: str = "row") -> tuple[str, dict[int, list[Span]]]:
        """A conversation as text, and for each message of the assistant, by its place, the characters that are its words."""
        messages, tools = _with_content(row["messages"]), row.get("tools") or None
        template = self.template(tools)
        text, spans = self._write(template, messages, tools, location)
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if has_markers(template):
            turns = self._turns_from_markers(template, messages, tools, assistant, spans, location)
        else:
            turns = self._turns_from_prefixes(template, messages, tools, assistant, text, location)
        return text, dict(zip(assistant, turns, strict=True))

    def _mask(
        self, tokens: Tokens, turns: list[list[Span]], assistant: list[int], train_from: int, marked: bool, template: str, location: str
    ) -> Rendered:
        mask, turn_ends = [False] * len(tokens.ids), []
        for index, turn in zip(assistant, turns, strict=True):
            covered = [tokens.inside(span) for span in turn if span[1] > span[0]]
            if not covered:  # the template writes nothing at all for this turn
                turn_ends.append(turn_ends[-1] if turn_ends else 0)
                continue
            end = self._end_of_turn(tokens, covered[-1], template, keep_tail=marked)
            if end is None:
                raise ModelError(
                    f"{location}: the chat template of {self.name} ends message {index} (assistant) with no special token, so a model "
                    "would never learn to stop there; write {{ eos_token }} after the assistant's content "
                    "and set data.chat_template to the path of that template"
                )
            covered[-1] = range(covered[-1].start, end)
            turn_ends.append(end)
            if index >= train_from:
                for tokens_said in covered:
                    mask[tokens_said.start : tokens_said.stop] = [True] * len(tokens_said)
        return Rendered(tokens.ids, mask, turn_ends)

    def _end_of_turn(self, tokens: Tokens, said: range, template: str, keep_tail: bool) -> int | None:
        """Number of leading tokens up to and with the one that ends the turn `said`; None if nothing ends it.

        keep_tail: leave white space that the span has after that token (a template's own markers are obeyed to the letter).
        """
        ids, terminators, added = tokens.ids, self._terminators(template), self._added_ids
        last = said.stop
        while last > said.start and tokens.blank(last - 1):
            last -= 1
        ends_inside = last > said.start and ids[last - 1] in terminators
        if ends_inside:
            return said.stop if keep_tail else last
        after = said.stop
        while after < len(ids) and tokens.blank(after):
            after += 1
        run = after
        while run < len(ids) and ids[run] in added:
            if ids[run] in terminators:
                return run + 1
            run += 1
        if last > said.start and ids[last - 1] in self._special_ids:  # one for this kind of turn only, as gpt-oss's <|call|>
            return said.stop if keep_tail else last
        return after + 1 if after < len(ids) and ids[after] in added else None

    def _turns_from_markers(
        self, template: str, messages: list, tools: list | None, assistant: list[int], spans: list[Span], location: str
    ) -> list[list[Span]]:
        if len(spans) == len(assistant):
            return [[span] for span in spans]
        # Several marked blocks in one turn, or none: count those that stand before the next turn begins.
        counts = [len(self._write(template, messages[:i], tools, location, prompt=True)[1]) for i in assistant[1:]] + [len(spans)]
        if counts != sorted(counts) or not assistant:
            raise ModelError(
                f"{location}: the chat template of {self.name} marks {len(spans)} spans for {len(assistant)} assistant turns, "
                f"and which belongs to which cannot be told; {REMEDY}"
            )
        return [spans[a:b] for a, b in zip([0, *counts], counts, strict=False)]

    def _turns_from_prefixes(
        self, template: str, messages: list, tools: list | None, assistant: list[int], text: str, location: str
    ) -> list[list[Span]]:
        turns = []
        for i in assistant:
            before = self._write(template, messages[:i], tools, location, prompt=True)[0]
            after = text if i == len(messages) - 1 else self._write(template, messages[: i + 1], tools, location)[0]
            if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
                raise ModelError(
                    f"{location}: the chat template of {self.name} has no {{% generation %}} markers, and what it writes up to "
                    f"message {i} changes with what follows, so the assistant's words cannot be told from the rest; {REMEDY}"
                )
            turns.append([(len(before), len(after))])
        return turns

    # ---- what the template must not swallow -------------------------------------------------------------------------------

    def _check_shown(self, template: str, messages: list, tools: list | None, text: str, said: str, location: str) -> None:
        def refuse(what: str, remedy: str) -> None:
            raise DataError(f"{location}: the chat template of {self.name} {what}; {remedy}, or set data.chat_template to one that does")

        if tools and not _has_words_of(tools, messages, template, text) and not self._shows_tools(template, messages, text):
            refuse(f"does not show tools to the model, and the row has {len(tools)}", "use a model whose template takes tools")
        calls = [call["function"]["name"] for m in messages for call in m.get("tool_calls", ())]
        for name in set(calls):
            if max(said.count(name), said.count(json.dumps(name)[1:-1])) < calls.count(name):
                refuse(f'drops a call of "{name}" that the assistant makes', "use a model whose template writes all tool calls")
        for index, message in enumerate(messages):
            words = re.sub(r"<think>.*?</think>", "", message["content"], flags=re.DOTALL).strip().splitlines()
            last = words[-1].strip() if words else ""
            if message.get("tool_calls") and last not in said:
                refuse(f"drops what message {index} says beside its tool call ({last[:40]!r})", "remove the words from the row")
        if any(m["role"] == "tool" for m in messages) and not self._shows(template, "tool"):
            refuse("does not show a tool's result to the model", "use a model whose template takes the role tool")
        if any(m.get("reasoning_content") for m in messages) and not self._shows(template, "reasoning"):
            refuse("does not write reasoning_content", "remove it from the row")

    def _shows_tools(self, template: str, messages: list, text: str) -> bool:
        try:
            return text != self._write(template, messages, None, "probe")[0]
        except DataError:  # it cannot do without them
            return True

    def _shows(self, template: str, kind: str) -> bool:
        """Whether a sentinel in a tool's result, or in the reasoning of the last turn, comes out of the template."""
        if (template, kind) not in self._probed:
            sentinel = "zq7sentinel"
            call = {"type": "function", "function": {"name": "probe", "arguments": {"a": 1}}}
            turns = {
                "tool": [
                    {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", **call}]},
                    {"role": "tool", "name": "probe", "tool_call_id": "call00001", "content": sentinel},
                ],
                "reasoning": [{"role": "assistant", "content": "a", "reasoning_content": sentinel}],
            }[kind]
            try:
                shown = sentinel in self._write(template, [{"role": "user", "content": "q"}, *turns], None, "probe")[0]
            except DataError:  # it takes no such message, or only beside others: the row itself was rendered, so let it pass
                shown = True
            self._probed[template, kind] = shown
        return self._probed[template, kind]

    # ---- the template and the tokenizer -----------------------------------------------------------------------------------

    def template(self, tools: list | None = None) -> str:
        """The template that rows are rendered with: the tokenizer's own if it has markers or no training template is given."""
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"{self.name}: rows are conversations, but the tokenizer has no chat template; set data.chat_template to a file, or to "
                "templates/plain-tools.jinja, which ships with harness and fits any tokenizer"
            )
        own = self.tokenizer.get_chat_template(tools=tools)
        return own if has_markers(own) else self.training_template or own

    def mask_source(self) -> str:
        """What says which tokens of a conversation are trained, in words."""
        if self.train_on == "all":
            return "none, every token is trained"
        if self.tokenizer.chat_template is None:
            return "completions and texts (the tokenizer has no chat template)"
        template = self.template()
        if not has_markers(template):
            return "differences between prefixes of the conversation"
        return "the markers of the chat template" if template != self.training_template else "the markers of a training template"

    def end_of_turn_ids(self) -> set[int]:
        """Ids of the tokens that end an assistant's plain turn, in the middle and at the end of a conversation."""
        return set(self._terminators(self.template()))

    def after_last_turn_ids(self) -> list[int]:
        """Ids that a conversation has after the token that ends its last turn, which whoever answers does not write: a line break in many
        templates, mostly none."""
        said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        try:
            ids = self._encoder.encode(self.write(said, None, "probe"), "probe").ids
        except DataError:  # a template for other conversations than this
            return []
        ends = self.end_of_turn_ids()
        return ids[max((at + 1 for at, token in enumerate(ids) if token in ends), default=len(ids)) :]

    def _terminators(self, template: str) -> frozenset[int]:
        if template not in self._probed:
            self._probed[template] = self._probe_terminators(template)
        return self._probed[template]

    def _probe_terminators(self, template: str) -> frozenset[int]:
        """What a conversation of two turns has after the assistant's last word: at the very end, and before the next message."""
        middle, final = "zqmiddle", "zqfinal"
        said = [("user", "q"), ("assistant", middle), ("user", "q"), ("assistant", final)]
        messages = [{"role": role, "content": text} for role, text in said]
        try:
            tokens = self._encoder.encode(self._write(template, messages, None, "probe")[0], "probe")
        except DataError:  # a template for other conversations than this; each row's own tokens decide then
            return frozenset()

        def run_after(word: str) -> list[int]:
            start = tokens.text.rfind(word) + len(word)
            after = [tokens.ids[t] for t in range(bisect_left(tokens.starts, start), len(tokens.ids)) if not tokens.blank(t)]
            plain = next((n for n, token in enumerate(after) if token not in self._added_ids), len(after))
            return after[:plain]

        found, at_end = set(run_after(final)[-1:]), run_after(middle)
        if not found & set(at_end):
            found |= set(at_end[:1])
        return frozenset(found)

    def control_token_in(self, row: dict) -> str | None:
        """A control token that stands in the row's own words: the tokenizer takes it for a real one, as the end of a turn."""
        words = json.dumps(row.get("messages", ()), ensure_ascii=False)
        found = self._control_tokens.search(words)
        return found and found.group()

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def _control_tokens(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, self.special_tokens())) or "(?!)")

    def special_tokens(self) -> list[str]:
        """The longest first, as a pattern needs them."""
        return sorted(self.tokenizer.convert_ids_to_tokens(sorted(self._special_ids)), key=len, reverse=True)

    @cached_property
    def _special_ids(self) -> set[int]:
        marked = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return marked | set(self.tokenizer.all_special_ids)

    @cached_property
    def _added_ids(self) -> set[int]:
        return self._special_ids | set(self.tokenizer.get_added_vocab().values())

    def write(self, messages: list[dict], tools: list[dict] | None, location: str = "row", prompt: bool = False) -> str:
        """A conversation as the template writes it. Raises DataError where the template refuses it."""
        return self._write(self.template(tools), messages, tools, location, prompt)[0]

    def _write(self, template: str, messages: list, tools: list | None, location: str, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text of a conversation, and the character spans that the template marks as the assistant's."""
        marked = has_markers(template)
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{location}: the chat template of {self.name} refuses this row: {error}") from error
        return texts[0], spans[0] if marked else []


def _has_words_of(tools: list[dict], messages: list[dict], template: str, text: str) -> bool:
    """Whether a tool's name or description stands in the text, and nowhere that it could come from but the tools."""
    elsewhere = template + json.dumps(messages, ensure_ascii=False)
    words = (word for tool in tools for word in (tool["function"]["name"], tool["function"].get("description")) if word)
    return any(word in text and word not in elsewhere for word in words)


def _with_content(messages: list[dict]) -> list[dict]:
    """Many templates add or test message.content; for a turn that only calls tools, "" is what servers hand them too."""
    return [message if "content" in message else {**message, "content": ""} for message in messages]


def has_markers(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
