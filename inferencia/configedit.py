"""A configuration's text for whoever edits it from afar: without secrets, and back.

``masked`` puts ``***`` in place of each secret and leaves all else as it is, byte for
byte. ``restored`` takes such a text, changed or not, and puts the secrets back: a
``***`` means what stood at that place before. The place goes by names, not by numbers:
a backend's key belongs to the backend of that name, wherever it now stands in the list,
and to nobody else.

A secret is the value of a key that holds one, or a part of another text (a value or a
comment) that looks like one: ``sk-...``, ``Bearer ...``, ``--api-key ...``,
``NAME_TOKEN=...``, ``//user:password@``. ``${env.NAME}`` is none; it only names one.

``protected`` says which changes are not for everybody who may edit (CONTRACT, section
3, ``admin.edit_commands``), ``at_next_start`` which are not felt before a restart.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import yaml

from inferencia import yamlfile
from inferencia.secret import MASK, looking_secret
from inferencia.yamlfile import Mapping, Node, Scalar, YamlError

# Parts that say what is run, who may come in, or where secrets go.
PROTECTED = (
    *("admin", "auth", "server", "tunnel", "swap", "llama", "models_dir"),
    *("usage.path", "state"),
)
_AT_NEXT_START = (
    *("server.host", "server.port", "server.listen", "server.tls", "log.format"),
    *("usage.path", "metrics.public", "tunnel", "state"),
)
# Parts that name files whose text may come up in errors.
_NAMING_FILES = ("auth", "swap")

# Keys whose value is a secret as a whole.
_SECRET_KEYS = re.compile(
    r"(?:server\.api_key(?:\.[^.]+)?|(?:tts_)?backends\[[^]]*\]\.(?:api_key|headers\..+)"
    r"|tunnel\.dial\.token|state\.url|(?:swap\.)?apiKeys\[\d+\]"
    # Also where no such key belongs.
    r"|(?:.*\.)?(?:api_?key|apiKey|token|password|secret))"
)
_VARIABLE = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")
# An anchor or a tag before a value.
_PROPERTIES = re.compile(r"(?:[&!]\S*\s+)*")
_COMMENT = re.compile(r"(?:(?<=\s)|^)#[^\r\n]*", re.MULTILINE)


class NotThere(Exception):
    """A ``***`` stands where no secret stood; ``problems`` says where, one a line."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class _Span:
    """A value or comment: where it stands in the text, and what it is called."""

    name: str  # its place, by names; "#" for a comment
    begin: int
    end: int
    is_secret: bool = False  # as a whole, by its key


@dataclass(frozen=True, slots=True)
class _Secret:
    """One secret in the text."""

    span: _Span
    begin: int
    end: int
    shown: str  # what is put in its place


def masked(text: str) -> str:
    """The text with ``***`` in place of each secret; it need not be right YAML."""
    return _replaced(text, [(s.begin, s.end, s.shown) for s in _secrets(text)])


def restored(text: str, original: str) -> str:
    """The text with each ``***`` replaced by the secret that stood there.

    Args:
        text: as it was sent.
        original: with all secrets, as the file is.

    Raises:
        NotThere: nothing, or not as much, stood there.
    """
    if MASK not in text:
        return text
    in_span: dict[_Span, list[_Secret]] = defaultdict(list)
    for secret in _secrets(original):
        in_span[secret.span].append(secret)
    known: dict[str, list[list[str]]] = defaultdict(list)
    for span, own in in_span.items():
        known[_called(span, original, own)].append(
            [original[secret.begin : secret.end] for secret in own]
        )
    changes: list[tuple[int, int, str]] = []
    problems = []
    for span in _spans(text):
        masks = list(_masks(span, text))
        if not masks:
            continue
        found = known.get(_called(span, text, ()))
        values = found.pop(0) if found else []
        if len(values) == len(masks):
            pairs = zip(masks, values, strict=True)
            changes += [(begin, end, value) for (begin, end), value in pairs]
        elif span.name != "#":  # in a comment, stars are stars
            problems.append(
                f"{span.name}: {MASK} stands for what was there, and "
                + ("that was no secret" if not values else "that was another text")
                + "; write the value out"
            )
    content = _replaced(text, changes)
    problems += _lent(text, original, content)
    if problems:
        raise NotThere(tuple(problems))
    return content


def _lent(text: str, original: str, content: str) -> Iterator[str]:
    """Where a ``***`` came by an alias or a merge key and stands for another secret.

    An alias takes a secret to wherever it stands: to a backend at another URL, into a
    message or a list of models that somebody may read.
    """
    written = {
        span.name for span in _spans(text) if MASK in text[span.begin : span.end]
    }
    sent, old, new = map(_by_place, (text, original, content))
    for place, value in sent.items():
        is_same = place in old and old[place] == new.get(place)
        if MASK in value and place not in written and not is_same:
            yield f"{place}: an alias cannot bring a secret here; write the value out"


def _by_place(text: str) -> dict[str, str]:
    """Each value's text by its place, also behind aliases; a key's if it has stars."""
    try:
        root = yamlfile.parse(text.encode("utf-8", "replace"), merge_keys=True).root
    except YamlError:
        return {}
    names = _backend_names(text)
    return {_renamed(place, names): value for place, value in _written_out(root, "")}


def _written_out(node: Node, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Scalar):
        yield path, node.text
    elif isinstance(node, Mapping):
        for key, inner in node.items.items():
            here = yamlfile.below(path, key)
            if MASK in key:
                yield here, key
            else:
                yield from _written_out(inner, here)
    else:
        for index, inner in enumerate(node.items):
            yield from _written_out(inner, f"{path}[{index}]")


def _called(span: _Span, text: str, secrets: Sequence[_Secret]) -> str:
    """What a span is found by: its place, or a comment's text without its secrets."""
    if span.name != "#":
        return span.name
    changes = [(s.begin - span.begin, s.end - span.begin, s.shown) for s in secrets]
    return "#" + _replaced(text[span.begin : span.end], changes)


def _replaced(text: str, changes: Sequence[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for begin, end, value in sorted(changes):
        if begin < at:
            continue  # inside of one that was replaced
        parts += [text[at:begin], value]
        at = end
    return "".join([*parts, text[at:]])


def _masks(span: _Span, text: str) -> Iterator[tuple[int, int]]:
    """Where ``***`` stands in a span; the quotation marks around it go with it."""
    raw = text[span.begin : span.end]
    if raw.strip() in (MASK, f'"{MASK}"', f"'{MASK}'"):
        lead = len(raw) - len(raw.lstrip())
        yield span.begin + lead, span.begin + lead + len(raw.strip())
        return
    for found in re.finditer(re.escape(MASK), raw):
        yield span.begin + found.start(), span.begin + found.end()


# --- what is secret --------------------------------------------------------------


def _secrets(text: str) -> Iterator[_Secret]:
    for span in _spans(text):
        raw = text[span.begin : span.end]
        if span.is_secret:
            if not _is_plain_to_see(raw):
                end = span.begin + len(raw.rstrip())
                yield _Secret(span, span.begin, end, f'"{MASK}"')
            continue
        is_comment = span.name == "#"
        for begin, end in looking_secret(raw, is_comment=is_comment):
            shown, whole = MASK, len(raw.rstrip())
            is_inside = raw[:1] in "\"'" and begin == 1 and end == whole - 1
            if not is_comment and (begin == 0 or is_inside):
                # All of the value: in quotes, for "*" would begin an alias.
                begin, end, shown = 0, whole, f'"{MASK}"'
            yield _Secret(span, span.begin + begin, span.begin + end, shown)


def _is_plain_to_see(raw: str) -> bool:
    """Whether there is nothing, or only a variable's name."""
    inner = raw.strip(" \"'\r\n")
    if inner in ("", "~", "null", "Null", "NULL"):
        return True
    return not _VARIABLE.sub("", re.sub(r"(?i)^(?:bearer|basic)\s+", "", inner))


# --- where things stand ----------------------------------------------------------


def _spans(text: str) -> list[_Span]:
    """All values and comments, in order; behind an error of YAML, each line as one."""
    spans: list[_Span] = []
    end = len(text)
    try:
        for span in _values(text):
            spans.append(span)
    except (yaml.YAMLError, _TooDeep) as error:
        place: int = getattr(getattr(error, "problem_mark", None), "index", 0)
        stopped = text.rfind("\n", 0, place) + 1
        end = max(stopped, spans[-1].end if spans else 0)
    if spans:
        names = _backend_names(text)
        spans = [_named(span, names) for span in spans if span.begin < end]
    at = 0
    gaps = []
    for span in sorted(spans, key=lambda one: one.begin):
        gaps.append((at, span.begin))
        at = max(at, span.end)
    gaps.append((at, end))
    for begin, stop in gaps:
        for found in _COMMENT.finditer(text, begin, stop):
            spans.append(_Span("#", found.start(), found.end()))
    at = end
    while at < len(text):
        stop = text.find("\n", at) + 1 or len(text)
        spans.append(_Span("#", at, stop))
        at = stop
    return sorted(spans, key=lambda one: one.begin)


class _TooDeep(Exception):
    """More levels or values than a configuration has."""


def _values(text: str) -> Iterator[_Span]:
    """Each scalar that is a value, by its place."""
    # Same length as before, so that places in it are places in the text.
    hidden = _VARIABLE.sub(lambda m: f"{'x' * 6}{m[1]}x", text)
    # For each open collection: its path, whether it is a mapping, the key, a count.
    stack: list[tuple[str, bool, list[str | None], list[int]]] = []
    for event in yaml.parse(hidden, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        path, is_key = _place(stack, event)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(stack) > yamlfile.MAX_DEPTH:
                raise _TooDeep
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            stack.append((path, is_mapping, [None], [0]))
        elif isinstance(event, yaml.ScalarEvent) and not is_key:
            assert event.start_mark is not None and event.end_mark is not None
            begin, end = event.start_mark.index, event.end_mark.index
            properties = _PROPERTIES.match(text, begin, end)
            begin = properties.end() if properties else begin
            yield _Span(path, begin, end)


def _place(
    stack: list[tuple[str, bool, list[str | None], list[int]]], event: yaml.NodeEvent
) -> tuple[str, bool]:
    """The path of the value that begins, and whether it is a key instead."""
    if not stack:
        return "", False
    path, is_mapping, key, count = stack[-1]
    if not is_mapping:
        count[0] += 1
        return f"{path}[{count[0] - 1}]", False
    if key[0] is None:
        key[0] = event.value if isinstance(event, yaml.ScalarEvent) else "?"
        return path, True
    name, key[0] = key[0], None
    return yamlfile.below(path, name), False


def _backend_names(text: str) -> dict[str, str]:
    """``backends[0]`` by its name: ``backends[mlx]``; of those that have one alone."""
    try:
        root = yamlfile.parse(text.encode("utf-8", "replace"), merge_keys=True).root
    except YamlError:
        return {}
    names: dict[str, str] = {}
    for key in ("backends", "tts_backends"):
        listed = root.items.get(key) if isinstance(root, Mapping) else None
        if not isinstance(listed, yamlfile.Sequence):
            continue
        for index, name in enumerate(map(_name_of, listed.items)):
            names[f"{key}[{index}]"] = f"{key}[{name or index}]"
    often = Counter(names.values())
    return {place: name for place, name in names.items() if often[name] == 1}


def _name_of(node: Node) -> str:
    name = node.items.get("name") if isinstance(node, Mapping) else None
    return name.text if isinstance(name, Scalar) else ""


def _named(span: _Span, names: dict[str, str]) -> _Span:
    is_secret = _SECRET_KEYS.fullmatch(span.name) is not None
    return replace(span, name=_renamed(span.name, names), is_secret=is_secret)


def _renamed(place: str, names: dict[str, str]) -> str:
    """A place below a backend, by the backend's name."""
    number, bracket, rest = place.partition("]")
    return names.get(number + bracket, number + bracket) + rest


# --- what has changed ------------------------------------------------------------


def changes(old: Node, new: Node, path: str = "") -> Iterator[str]:
    """The paths of all values that are not the same; backends go by their names."""
    if isinstance(old, Mapping) != isinstance(new, Mapping):
        # A group that is not there is like one with nothing in it.
        old, new = _as_group(old), _as_group(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old.items, *new.items)):
            here = yamlfile.below(path, key)
            yield from changes(
                old.items.get(key, _NOTHING), new.items.get(key, _NOTHING), here
            )
    elif path in ("backends", "tts_backends"):
        before, after = _by_name(old), _by_name(new)
        for name in dict.fromkeys((*before, *after)):
            here = f"{path}[{name}]"
            yield from changes(
                before.get(name, _NOTHING), after.get(name, _NOTHING), here
            )
    elif not _same(old, new):
        yield path


_NOTHING = Scalar("null")


def _as_group(node: Node) -> Node:
    return node if _is_anything(node) else Mapping()


def _by_name(node: Node) -> dict[str, Node]:
    items = node.items if isinstance(node, yamlfile.Sequence) else ()
    return {_name_of(item) or str(place): item for place, item in enumerate(items)}


def _same(old: Node, new: Node) -> bool:
    if isinstance(old, Scalar) and isinstance(new, Scalar):
        if old.is_null or new.is_null:
            return old.is_null and new.is_null
        return old.text == new.text and old.is_text == new.is_text
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return not list(changes(old, new))
    if isinstance(old, yamlfile.Sequence) and isinstance(new, yamlfile.Sequence):
        if len(old.items) != len(new.items):
            return False
        return all(map(_same, old.items, new.items))
    return not _is_anything(old) and not _is_anything(new)


def _is_anything(node: Node) -> bool:
    if isinstance(node, Scalar):
        return not node.is_null
    return bool(node.items)


def protected(sent: Node, old: Node, new: Node, *, is_swap: bool) -> list[str]:
    """The changed places that are protected.

    Args:
        sent: what was sent, with ``***`` where nothing was said.
        old: what was there before.
        new: what would be there, with its secrets.
        is_swap: whether the whole file is a llama-swap configuration.
    """
    changed = list(changes(old, new))
    if is_swap:
        return changed
    found = [path for path in changed if _is_below(path, PROTECTED)]
    before, sent_now = _by_name(_at(old, "backends")), _by_name(_at(sent, "backends"))
    for name, node in _by_name(_at(new, "backends")).items():
        if name in before and not _may_be_moved(before[name], node, sent_now.get(name)):
            found += [
                path
                for path in changed
                if path.startswith(f"backends[{name}].")
                and _is_below(path.partition("].")[2], ("url", "headers"))
            ]
    # Naming another variable of ours would send its value somewhere.
    found += _new_variables(old, new)
    return list(dict.fromkeys(found))


def reaching_out(old: Node, new: Node) -> bool:
    """Whether to load what has changed reads files or variables not read before.

    What is wrong with these would be told together with what they hold.
    """
    paths = (path for path in changes(old, new) if _is_below(path, _NAMING_FILES))
    return any(paths) or any(_new_variables(old, new))


def _new_variables(old: Node, new: Node) -> Iterator[str]:
    """Where a variable is named that was not named there."""
    known = {(path, scalar.text) for path, scalar in _with_variables(old)}
    for path, scalar in _with_variables(new):
        if (path, scalar.text) not in known:
            yield path


def at_next_start(old: Node, new: Node) -> list[str]:
    """The changed places that only a restart puts into force."""
    return [path for path in changes(old, new) if _is_below(path, _AT_NEXT_START)]


def _is_below(path: str, places: Sequence[str]) -> bool:
    return any(
        path == place
        or path.startswith((f"{place}.", f"{place}["))
        or place.startswith(f"{path}.")
        for place in places
    )


def _at(root: Node, key: str) -> Node:
    return root.items.get(key, _NOTHING) if isinstance(root, Mapping) else _NOTHING


def _may_be_moved(old: Node, new: Node, sent: Node | None) -> bool:
    """Whether a backend may get another URL or headers, for no secret goes along."""
    is_moved = not _same(_at(old, "url"), _at(new, "url"))
    is_changed = is_moved or not _same(_at(old, "headers"), _at(new, "headers"))
    if not is_changed:
        return True
    if sent is None or any(MASK in s.text for _, s in _scalars(sent)):
        return False
    if is_moved and any(_VARIABLE.search(s.text) for _, s in _scalars(new)):
        return False
    has_secrets = _is_anything(_at(old, "api_key")) or _is_anything(_at(old, "headers"))
    return not has_secrets or _is_anything(_at(sent, "api_key"))


def _with_variables(root: Node) -> Iterator[tuple[str, Scalar]]:
    for path, scalar in _scalars(root):
        if _VARIABLE.search(scalar.text):
            yield path, scalar


def _scalars(node: Node, path: str = "") -> Iterator[tuple[str, Scalar]]:
    if isinstance(node, Scalar):
        yield path, node
    elif isinstance(node, Mapping):
        for key, inner in node.items.items():
            yield from _scalars(inner, yamlfile.below(path, key))
    else:
        for place, inner in enumerate(node.items):
            name = _name_of(inner) or str(place)
            yield from _scalars(inner, f"{path}[{name}]")
