"""The arms of a decision: how each of them asks an item. Everything else about the item stays as it is.

zero-shot           the base, asked as the row asks
instruction, NAME   a system prompt before the row's own: the format instruction, and each of the recipe's prompts
few-shot            earlier turns: examples from the tuning rows
retrieval           the nearest documents behind the row's own system message
NAME                a fine-tuned model, asked as the row asks; NAME+retrieval: with the documents
distilled           the small one, asked as the row asks
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.evaluate.decision.questions import asked_words
from harness.evaluate.decision.retrieve import Index, load_documents
from harness.evaluate.decision.schema import Decision, FewShot
from harness.evaluate.items import Item

BASE, DISTILLED = "base", "distilled"


@dataclass(frozen=True)
class Documents:
    index: Index
    top: int
    heading: str

    def show(self, item: Item) -> str | None:
        found = self.index.nearest(asked_words(item), self.top)
        return "\n".join([self.heading, *(self.index.documents[at] for at in found)]) if found else None


@dataclass(frozen=True)
class Examples:
    """`way`: "nearest" to the user's last words, or "draw N", one order for all items. Only such examples are shown as call what the item
    offers: a call of a tool that is not there would teach the model to make tools up."""

    rows: Sequence[Item]
    k: int
    way: str
    seed: int
    index: Index = field(repr=False)

    def show(self, item: Item) -> list[dict]:
        offered = {tool["function"]["name"] for tool in item.tools}
        chosen: list[Item] = []
        for at in self._order(item):
            row = self.rows[at]
            if row.id != item.id and all(call["name"] in offered for call in row.gold["calls"]):
                chosen.append(row)
            if len(chosen) == self.k:
                break
        # The nearest stands next to the question.
        return [message for row in reversed(chosen) for message in (*row.messages, row.gold["turn"]) if message["role"] != "system"]

    def _order(self, item: Item) -> list[int]:
        if self.way == "nearest":
            return self.index.nearest(asked_words(item), len(self.rows))
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}/{self.way}").shuffle(order)
        return order


@dataclass(frozen=True)
class Arm:
    """`kind`: zero-shot, prompt, few-shot, retrieval, tuned, tuned+retrieval or distilled. `model`: base, the name of a fine-tuned one, or
    distilled."""

    name: str
    kind: str
    model: str
    what: str
    """For people."""
    system: str | None = None
    examples: Examples | None = None
    documents: Documents | None = None

    def ask(self, item: Item) -> list[dict]:
        """The item's messages as this arm sends them. Rows are read and not written to."""
        own = [message for message in item.messages[:1] if message["role"] == "system"]
        parts = [self.system, own[0]["content"] if own else None, self.documents and self.documents.show(item)]
        system = [{"role": "system", "content": "\n\n".join(filter(None, parts))}] if any(parts) else []
        return [*system, *(self.examples.show(item) if self.examples else []), *item.messages[len(own) :]]


def plan_arms(decision: Decision) -> list[Arm]:
    """All but few-shot, whose examples have still to be chosen; plan_ways has that."""
    prompts = {"instruction": decision.instruction, **decision.prompts}
    arms = [Arm("zero-shot", "zero-shot", BASE, "the base, asked as the row asks")]
    for name, text in prompts.items():
        arms.append(Arm(name, "prompt", BASE, f"a system prompt of {len(text.split())} words", system=text))
    documents = None
    if decision.retrieval:
        asked = decision.retrieval
        documents = Documents(Index(load_documents(asked.documents)), asked.top, asked.heading)
        what = f"the nearest {asked.top} of {len(documents.index.documents)} documents (BM25) in the system prompt"
        arms.append(Arm("retrieval", "retrieval", BASE, what, documents=documents))
    for name in decision.tuned:
        arms.append(Arm(name, "tuned", name, "fine-tuned, asked as the row asks"))
        if documents:
            arms.append(Arm(f"{name}+retrieval", "tuned+retrieval", name, "fine-tuned, with the documents", documents=documents))
    if decision.distilled:
        arms.append(Arm("distilled", "distilled", DISTILLED, "the small model that was taught, asked as the row asks"))
    return arms


def plan_ways(decision: Decision, tuning: Sequence[Item]) -> list[Arm]:
    """The few-shot arm in every way of choosing that is tried: the one that does best on the tuning rows is run on the items."""
    asked = decision.few_shot or FewShot()
    index = Index([asked_words(item) for item in tuning])
    ways = ["nearest", *(f"draw {number}" for number in range(1, asked.draws + 1))]
    return [
        Arm(
            "few-shot",
            "few-shot",
            BASE,
            f"{asked.k} examples as earlier turns ({way})",
            examples=Examples(tuning, asked.k, way, decision.seed, index),
        )
        for way in ways
    ]
