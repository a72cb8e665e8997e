"""From a YAML file and overrides to a frozen Recipe, or one RecipeError that lists everything that is wrong, each with its dotted key.

YAML is read as version 1.2 means it: only true and false are booleans (so `eval_strategy: no` is the word), 5e-5 is a number,
and a key that stands twice is an error. Nothing is converted in silence: "8" is not 8.
"""

import difflib
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from harness.errors import RecipeError
from harness.recipe.names import ELSEWHERE, advise_key
from harness.recipe.rules import check_rules
from harness.recipe.schema import Recipe, as_sources
from harness.resources import find_config, shipped_names

NO_RECIPES = ("backends/", "clusters/", "decide/", "pipelines/")
"""The folders of configs/ that hold other files."""


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override, validate. `path` is a file or the name of a shipped recipe; `overrides` are `key.path=value`.

    Raises RecipeError (exit code 2) that names file, dotted key, value, rule and remedy for everything that is wrong.
    """
    file = find_recipe(path)
    settings = read_yaml(file)
    if "stages" in settings:
        raise RecipeError(
            f"{path}: is a pipeline, which harness run, submit and fetch take; here name the recipe of one of its stages"
        )
    if isinstance(settings.get("data"), dict):
        # So that data.train.0.max_rows=3 finds a source, however the file wrote it.
        settings["data"] |= {key: as_sources(settings["data"][key]) for key in ("train", "eval") if key in settings["data"]}
    for override in overrides:
        apply_override(settings, override)
    settings.setdefault("output_dir", f"runs/{_recipe_name(file)}")
    recipe = validate(Recipe, settings, str(file))
    problems = check_rules(recipe)
    if problems:
        raise RecipeError("\n".join(f"{file}: {problem}" for problem in problems))
    return recipe


def find_recipe(path: str | Path) -> Path:
    file = find_config(str(path))
    if file is not None:
        return file
    if (own := Path(path).expanduser() / "recipe.yaml").is_file():
        raise RecipeError(f"{path}: is a run's folder, and no recipe; its recipe is {own}")
    known = [name for name in shipped_names("") if not name.startswith(NO_RECIPES)]
    beside = [str(found) for found in sorted(Path(path).expanduser().parent.glob("*.y*ml"))]
    close = difflib.get_close_matches(str(path), [*known, *beside], n=1, cutoff=0.75)
    if close:
        raise RecipeError(f"{path}: no such recipe; did you mean {close[0]}?")
    raise RecipeError(f"{path}: no such recipe; give the path of a YAML file or one of: {', '.join(known)}")


def _recipe_name(file: Path) -> str:
    """`configs/tiny/sft-lora.yaml` -> `tiny-sft-lora`; a file elsewhere -> its stem. A run folder's own recipe continues that folder."""
    parts = file.resolve().with_suffix("").parts
    for at in reversed(range(len(parts) - 1)):
        if parts[at] == "configs":
            return "-".join(parts[at + 1 :])
    return parts[-1]


# ---- YAML


class _Loader(yaml.SafeLoader):
    """PyYAML's, which reads YAML 1.1, with the scalars of YAML 1.2's core schema: there `no`, `1_000`, `1:30`, `<<` and dates are words."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the text 7e12 (a commit) stands in quotes, because it would be a number without them."""


_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+0123456789."),
    ),
)
_Loader.yaml_implicit_resolvers = {}
# The writer also keeps YAML 1.1's, so that other readers understand its files in the same way.
_Dumper.yaml_implicit_resolvers = {first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise RecipeError(f"{node.start_mark.name}:{line}: the key {key!r} is not a word; put it in quotes")
        if key in seen:
            raise RecipeError(f"{node.start_mark.name}:{line}: `{key}` already stands in line {seen[key]}; keep one of them")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(file: Path) -> dict:
    """The mapping that a YAML file holds. Raises RecipeError that names file and line."""
    try:
        with open(file, encoding="utf-8") as stream:
            settings = yaml.load(stream, _Loader)  # noqa: S506 - a SafeLoader with stricter scalars
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise RecipeError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else {"list": "a list", "str": "one text"}.get(type(settings).__name__, repr(settings))
        raise RecipeError(f"{file}: holds {found}, not a mapping of keys to values; see configs/tiny/sft-lora.yaml")
    return settings


def apply_override(settings: dict, override: str) -> None:
    """Put the value of `key.path=value` into `settings`. Raises RecipeError for what cannot be put there."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key.path=value, for example train.learning_rate=1e-4")
    value = read_value(text, override)
    target: Any = settings
    *parents, leaf = key.split(".")
    for at, part in enumerate(parents):
        target = _step_into(target, part, override, ".".join(parents[:at]))
    if isinstance(target, list):
        index = _list_index(target, leaf, override)
        target[index] = value
    else:
        target[leaf] = value


def read_value(text: str, override: str) -> Any:
    """What stands after the `=`, as YAML; as plain text where it is not YAML (a path with a colon), and for nothing the empty text."""
    stream = io.StringIO(text)
    stream.name = f"override {override!r}"
    try:
        return yaml.load(stream, _Loader) if text else ""  # noqa: S506
    except yaml.YAMLError as error:
        if text.lstrip()[:1] in ("[", "{"):
            raise RecipeError(f"override {override!r}: its value is not YAML: {getattr(error, 'problem', error)}") from None
        return text


def _step_into(target: Any, part: str, override: str, where: str) -> Any:
    if isinstance(target, list):
        return target[_list_index(target, part, override)]
    inner = target.get(part)
    if inner is None:
        inner = target[part] = {}
    if not isinstance(inner, (dict, list)):
        raise RecipeError(f"override {override!r}: `{f'{where}.{part}' if where else part}` is {inner!r}, not a section; override it whole")
    return inner


def _list_index(target: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise RecipeError(f"override {override!r}: {part!r} is not an index of a list of {len(target)}; indices start at 0")
    return int(part)


# ---- validation


def validate(schema: type[BaseModel], settings: dict, file: str, elsewhere: dict[str, str] = ELSEWHERE):
    """`schema` filled from `settings`. Raises RecipeError with a line for each thing that is wrong; `elsewhere`: as in `advise_key`."""
    try:
        # Through JSON: there lists are tuples and an integer is a float, and nothing else is converted.
        return schema.model_validate_json(json.dumps(settings))
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(error, schema, settings, file, elsewhere))) from None
    except TypeError as error:
        raise RecipeError(f"{file}: holds a value that is neither text, number, true, false, list nor mapping ({error})") from None


def _explain(error: ValidationError, schema: type[BaseModel], settings: dict, file: str, elsewhere: dict[str, str]) -> list[str]:
    """One line per wrong key. A union reports each of its members; they are one line here."""
    grouped: dict[tuple, list[dict]] = {}
    for problem in error.errors(include_url=False):
        grouped.setdefault(_dotted(problem["loc"], settings), []).append(problem)
    lines = []
    for location, problems in grouped.items():
        key, first = ".".join(map(str, location)), problems[0]
        if first["type"] == "extra_forbidden":
            siblings, parent = _fields_at(schema, location[:-1]), ".".join(map(str, location[:-1])) or "the top level"
            advice = advise_key(str(location[-1]), siblings, leaf_keys(schema), elsewhere)
            lines.append(f"{file}: {key}: unknown key in {parent}; {advice}")
        elif first["type"] == "missing":
            lines.append(f"{file}: {key}: is required and is not there")
        else:
            rules = " or ".join(dict.fromkeys(_rule(problem) for problem in problems))
            lines.append(f"{file}: {key} = {json.dumps(first['input'], default=str)}; must be {rules}")
    return lines


def _dotted(location: tuple, settings: Any) -> tuple:
    """pydantic's location without the names of union members: only what can be followed in the settings, and the last key."""
    kept, here = [], settings
    for part in location:
        in_mapping, in_list = isinstance(here, dict) and part in here, isinstance(here, list) and isinstance(part, int)
        if in_mapping or in_list and part < len(here):
            kept.append(part)
            here = here[part]
        elif isinstance(here, dict) and isinstance(part, str) and re.fullmatch(r"\w+", part) and part == location[-1]:
            kept.append(part)
    return tuple(kept)


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a section (a mapping of keys)",
    "model_attributes_type": "a section (a mapping of keys)",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
}


def _rule(problem: dict) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return re.sub(r"'(\w[^']*)'", r"\1", context["expected"]).replace("True", "true").replace("False", "false")
    for limit, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if limit in context:
            return f"{sign} {context[limit]}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    return _TYPES.get(kind, problem["msg"][0].lower() + problem["msg"][1:])


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_of(inner))), None)


def _fields_at(schema: type[BaseModel], location: tuple) -> list[str]:
    section = schema
    for part in location:
        if isinstance(part, str):
            # A name that the writer chose, such as a pipeline's stage, is no field, and leads into the section that stands before it.
            field = section.model_fields.get(part)
            section = field and _section_of(field.annotation) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def leaf_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        section = _section_of(field.annotation)
        if section:
            found |= {key: where for key, where in leaf_keys(section, f"{prefix}{name}.").items() if key not in found}
        found.setdefault(field.alias or name, prefix + (field.alias or name))
    return found


# ---- the way back


def render_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it again gives the same recipe."""
    return render_yaml(recipe.model_dump(mode="json"))


def render_yaml(settings: dict) -> str:
    """What `read_yaml` reads as the same settings."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def render_value(value: Any) -> str:
    """One value on one line, as it would stand in a recipe."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def difference_from_defaults(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, for every leaf that is not what an empty recipe would have."""
    return _differences(recipe, "")


def _differences(section: BaseModel, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + name
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            inner = _differences(value, key + ".")
            found |= inner or ({key: {}} if default is None else {})
        elif value != default:
            found[key] = json.loads(json.dumps(value, default=lambda item: item.model_dump(mode="json", exclude_defaults=True)))
    return found


def recipe_digest(recipe: Recipe) -> str:
    """Hex digest of everything that decides what is trained; where it is written, how it is tracked, saved and watched are left out,
    and so are the licences of the data."""
    settings = without_licences(recipe.model_dump(mode="json", exclude={"output_dir", "tracking", "checkpoint", "watchdog"}))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def without_licences(settings: dict) -> dict:
    """A recipe's settings without those of its sources that decide nothing: a licence that is found out later changes no run."""
    data = settings["data"]
    sources = {
        part: [{key: value for key, value in source.items() if key != "license"} for source in data[part]]
        for part in ("train", "eval")
        if part in data
    }
    return settings | {"data": data | sources}
