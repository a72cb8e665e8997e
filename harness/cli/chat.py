"""`harness chat`: a conversation at a terminal, or through a pipe, one question a line."""

import json
import shutil
import sys
import textwrap
from pathlib import Path

import click

from harness.cli.tables import is_coloured, printable
from harness.errors import DataError, HarnessError, RecipeError
from harness.logs import quieten
from harness.run import RunDir
from harness.tools import did_you_mean

MAX_ROUNDS = 8
"""So often in a row may a model call tools that answer by themselves."""
COMMANDS = {
    "/help": "this list",
    "/reset": "begin a new conversation",
    "/undo": "take the last question back, with all that followed",
    "/system [TEXT]": "show what the model is told first; with TEXT, tell it that, in a new conversation",
    "/tools": "the tools that the model is offered",
    "/save FILE": "add the conversation to FILE, as a row that can be trained",
}


@click.command("chat")
@click.argument("target")
@click.option(
    "--tools",
    multiple=True,
    help="A .json list of tools, a .jsonl of rows that offer some, or Python functions: FILE.py or module:NAME. Of schemas and functions "
    "together the functions answer.",
)
@click.option("--system", metavar="TEXT", help="What the model is told before the first question.")
@click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Add each conversation to this file of rows when it ends.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="That an answer may have.  [default: 512, or what the model's positions leave]"
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn above temperature 0.")
@click.option("--model", help="What the server at a URL calls the model, where it serves several.")
@click.option("--api-key-variable", help="The environment variable with the server's key.")
@click.option(
    "--timeout-s", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True, help="Of one answer by a server."
)
def command(target, tools, system, save, max_new_tokens, temperature, seed, model, api_key_variable, timeout_s):
    """Talk to TARGET, a run, a model's folder, a hub id or the URL of an OpenAI-compatible server, and have its calls checked and answered.

    A call is answered by the Python function of its name where --tools names functions, else by you. Through a pipe each line is a question
    (or the result of a call, or a command); 1 is the exit code where one was not answered.
    """
    if not target.startswith(("http://", "https://")) and (model or api_key_variable):
        raise RecipeError("--model and --api-key-variable are for a URL, and the target is none")
    quieten()
    from harness.embedded import resolve
    from harness.tasks.answering import Connection, Settings
    from harness.tasks.chat import Chat, open_target
    from harness.tools.offered import load_all_offered

    offered = load_all_offered([resolve(name) for name in tools or tools_of_run(target)])
    settings = Settings(max_new_tokens=max_new_tokens or 512, temperature=temperature, seed=seed)
    who = open_target(target, settings, Connection(model, api_key_variable, timeout_s))
    sys.exit(_Terminal(Chat(who, settings, offered, system, shorten=max_new_tokens is None), save).talk(target))


def tools_of_run(target: str) -> list[str]:
    """The functions that a run of `task: rlhf` was trained with, by their name in its recipe."""
    from harness.recipe import load

    run = RunDir(Path(target).expanduser())
    named = load(run.recipe).rlhf.tools if run.recipe.is_file() and run.manifest.is_file() else None
    return [named] if named else []


class _Terminal:
    """What a person types and sees."""

    def __init__(self, chat, save: Path | None):
        self.chat, self.save, self.unanswered = chat, save, 0
        self.types = sys.stdin.isatty()
        self.coloured = is_coloured()
        self.column = 0

    def talk(self, target: str) -> int:
        self._greet(target)
        while (line := self._read("you> ")) is not None:
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._ask(line)
            except HarnessError as error:
                if not self.types:
                    self._end()
                    raise
                self._tell(str(error), "red")
        self._end()
        return 1 if self.unanswered and not self.types else 0

    def _greet(self, target: str) -> None:
        step = getattr(self.chat.who, "identity", {}).get("step")
        self._tell(f"{target}{f', step {step}' if step is not None else ''}", bold=True)
        if self.chat.offered.tools:
            functions = len(self.chat.offered.functions)
            answered = f"{functions} of them answered by functions" if functions else "answered by you"
            names = ", ".join(tool["function"]["name"] for tool in self.chat.offered.tools)
            self._tell(f"{len(self.chat.offered.tools)} tools, {answered}: {names}", dim=True)
        else:
            self._tell("no tools are offered (--tools)", dim=True)
        if self.types:
            self._tell("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves", dim=True)

    # ---- questions

    def _ask(self, question: str) -> None:
        from harness.tasks.chat import NotAnswered

        if self.chat.waits:
            # A call without its result ends a conversation; nothing can follow it.
            self._end()
            self.chat.reset()
            self._tell("(a new conversation)", dim=True)
        self.chat.ask(question)
        try:
            for _ in range(MAX_ROUNDS):
                if not self._take_turn():
                    return
        except NotAnswered as error:
            self.unanswered += 1
            self._line(f"! {error}; the question is taken back", "red")
        except KeyboardInterrupt:
            self.chat.take_back()
            self.unanswered += 1
            self._line("stopped; the question is taken back", "yellow")
        else:
            self._tell(f"! {MAX_ROUNDS} rounds of calls in a row; the next question goes on from here", "yellow")

    def _take_turn(self) -> bool:
        """Whether the model is to speak again: it has called tools, and has their results."""
        self._write("model> ", fg="green", bold=True)
        turn = self.chat.answer(self._write)
        self._line("")
        if turn.fault:
            self._tell(f"  ! {turn.fault.kind}: {turn.fault.reason}", "red")
        for call, problems in zip(turn.calls, turn.problems, strict=True):
            shown = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
            self._tell(f"  → {call.name}({shown})  {'' if problems else 'fits its schema'}", "red" if problems else "cyan")
            for problem in problems:
                self._tell(f"    ! {problem.kind}: {problem}", "red")
        self._tell(f"  {turn.tokens} tokens in {turn.seconds:.1f} s", dim=True)
        if not turn.calls or not self.chat.offered.tools:
            return False
        results = self._results(turn)
        if results is None:
            self._tell("  left at the call; the next question begins a new conversation", dim=True)
            return False
        self.chat.give(turn, results)
        return True

    def _results(self, turn) -> list[str] | None:
        """Of every call of the turn, in their order; None where the person leaves it at the calls."""
        from harness.tools.offered import error_result

        results, offered = [], self.chat.offered
        for call, problems in zip(turn.calls, turn.problems, strict=True):
            if offered.functions and problems:
                result = error_result("; ".join(map(str, problems)))
            elif call.name in offered.functions:
                result = offered.run(call)
            else:
                result = self._read(f"  result of {call.name} (empty: leave it at the call)> ")
                if not result:
                    return None
                results.append(result)
                continue
            self._tell(f"  ← {result}", "red" if result.startswith('{"error": ') else "cyan")
            results.append(result)
        return results

    # ---- commands

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            for usage, meaning in COMMANDS.items():
                self._tell(f"{usage:<16}{meaning}")
        elif name == "/reset":
            self._end()
            self.chat.reset()
        elif name == "/undo":
            question = self.chat.take_back()
            self._tell("there is no question to take back" if question is None else f"taken back: {question}", dim=True)
        elif name == "/system":
            if rest:
                self._end()
                self.chat.system = rest
                self.chat.reset()
            self._tell(self.chat.system or "(nothing)", dim=True)
        elif name == "/tools":
            for tool in self.chat.offered.tools:
                self._tell(_describe(tool["function"]))
        elif name == "/save" and rest:
            self._save(Path(rest).expanduser())
        else:
            known = [usage.split()[0] for usage in COMMANDS]
            raise RecipeError(f"{line}: {'name a file' if name == '/save' else f'no such command{did_you_mean(name, known)}'} (/help)")

    def _end(self) -> None:
        """Of a conversation: with --save it is added to the file, or it is said why not."""
        if self.save is None or not self.chat.has_begun:
            return
        try:
            self._save(self.save)
        except DataError as error:
            click.echo(f"not saved: {error}", err=True)

    def _save(self, path: Path) -> None:
        from harness.tasks.chat import save_row

        save_row(self.chat, path)
        self._tell(f"added to {path}", dim=True)

    # ---- the screen

    def _read(self, prompt: str) -> str | None:
        """A line, without its blanks; None at the end. In a pipe nothing is asked, and the line is shown after the prompt."""
        if not self.types:
            line = sys.stdin.readline()
            self._line(f"{prompt}{line.strip()}" if line else "")
            return line.strip() if line else None
        import readline  # noqa: F401 - its being loaded gives input() a history and an editor

        # What stands between \1 and \2 has no width to readline.
        shown = f"\1\x1b[1;34m\2{prompt}\1\x1b[0m\2" if self.coloured else prompt
        while True:
            try:
                return input(shown).strip()
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                click.echo()

    def _write(self, text: str, **style) -> None:
        """Without an end of line, at once."""
        text = printable(text)
        click.echo(click.style(text, **style) if self.coloured else text, nl=False)
        self.column += len(text)

    def _line(self, text: str, fg: str | None = None) -> None:
        """On a line of its own, after whatever has been written on this one."""
        if self.column:
            click.echo()
            self.column = 0
        if text:
            self._tell(text, fg)

    def _tell(self, text: str, fg: str | None = None, **style) -> None:
        """Wrapped to the terminal, under its own beginning; in a pipe each is one line."""
        text = printable(text.rstrip())
        if sys.stdout.isatty():
            begins = " " * (len(text) - len(text.lstrip()) + 2)
            width = max(40, min(100, shutil.get_terminal_size().columns))
            text = textwrap.fill(text, width, subsequent_indent=begins, break_on_hyphens=False, drop_whitespace=True)
        click.echo(click.style(text, fg=fg, **style) if self.coloured else text)


def _describe(function: dict) -> str:
    parameters = function.get("parameters", {})
    required = parameters.get("required", ())
    shown = ", ".join(f"{name}{'' if name in required else '?'}" for name in parameters.get("properties", {}))
    said = " ".join(function.get("description", "").split())
    return f"  {function['name']}({shown}){f': {said}' if said else ''}"
