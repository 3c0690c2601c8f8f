"""``inferencia models``: the GGUF files of this machine, without the daemon.

    models              a table of them; what is wrong with a file stands beside it
    models show NAME    all that is known of one, and the command that would run it
    models rm NAME      deletes its files, after asking once
    models pull REPO    see ``pullcommand``

``register`` describes them to argparse, ``run`` carries one out and returns what to
print. Files are looked for where the gateway looks: in ``models_dir``, or else in the
usual folders.
"""

import argparse
import dataclasses
import difflib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferencia import folders
from inferencia.config import Loaded
from inferencia.inuse import loaded_models, processes_with
from inferencia.keycommands import BAD_USAGE, DONE, FAILED, Outcome
from inferencia.localmodels import estimated
from inferencia.models.download import size_text
from inferencia.models.finding import Findings, FoundModel, find_models, is_arriving
from inferencia.models.offering import (
    GOINFER_PREFIX,
    goinfer_listing,
    to_definitions,
)
from inferencia.models.removing import (
    describes_another,
    parts_of,
    removal,
)


def register(
    subparsers: "argparse._SubParsersAction[Any]",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Add ``models`` and its commands to the program's parser.

    Args:
        parents: what every command takes, such as ``-c FILE``.
    """
    about = "list, describe, download and delete the GGUF files of this machine"
    models = subparsers.add_parser(
        "models", help=about, description=f"{about}.", parents=parents
    )
    _add_json(models)
    models.set_defaults(models_command="list")
    commands = models.add_subparsers(dest="models_command", metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=about, description=f"{about}.", parents=parents
        )
        return parser

    _add_json(command("list", "show all models (also without a command)"))
    show = command("show", "show all that is known of one, and what would run it")
    show.add_argument("name", metavar="NAME")
    _add_json(show)
    pull = command("pull", "download one from Hugging Face, or $HF_ENDPOINT")
    pull.add_argument(
        "reference",
        metavar="REPO[:QUANT]",
        help="such as unsloth/Qwen3-8B-GGUF:Q4_K_M (default: Q4_K_M, or the only one)",
    )
    remove = command("rm", "delete one with all its files")
    remove.add_argument("name", metavar="NAME")
    remove.add_argument("--yes", action="store_true", help="do not ask")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write JSON")


@dataclass(frozen=True, slots=True)
class Asking:
    """Whoever sits at the terminal; tests put themselves there."""

    is_there: bool
    ask: Callable[[str], str] = input


def run(
    options: argparse.Namespace, loaded: Loaded, env: Mapping[str, str], person: Asking
) -> Outcome:
    """Carry out ``list``, ``show`` or ``rm``.

    Args:
        options: as parsed by what ``register`` added.
        loaded: the configuration.
        env: the environment.
        person: to be asked before something is deleted.
    """
    searched = searched_folders(loaded, env)
    findings = find_models(searched)
    match options.models_command:
        case "show":
            return _show(options, findings, loaded, env)
        case "rm":
            return _remove(options, findings, searched, loaded, env, person)
    return _list(options, findings, searched, loaded, env)


def searched_folders(loaded: Loaded, env: Mapping[str, str]) -> tuple[Path, ...]:
    """``models_dir``, or else those of the usual folders that exist."""
    if loaded.config.models_dir:
        return loaded.config.models_dir
    return tuple(folder for folder in folders.model_folders(env) if folder.is_dir())


# --- list ------------------------------------------------------------------------


def _list(
    options: argparse.Namespace,
    findings: Findings,
    searched: Sequence[Path],
    loaded: Loaded,
    env: Mapping[str, str],
) -> Outcome:
    in_memory = loaded_models(loaded, env)
    notes = _notes(*findings.problems, in_memory.doubt)
    if options.json:
        listing = goinfer_listing(findings, set(in_memory.paths))
        return Outcome(DONE, out=_json(listing), err=notes)
    if not findings.models:
        where = ", ".join(map(str, searched)) or "the usual folders"
        note = (
            f"no GGUF files in {where}; get one with: "
            "inferencia models pull OWNER/NAME\n"
        )
        return Outcome(DONE, err=note + _notes(*findings.problems))
    rows = [_row(model, model.name in in_memory.paths) for model in findings.models]
    return Outcome(DONE, out=_table(rows), err=notes)


def _notes(*problems: str) -> str:
    return "".join(f"note: {problem}\n" for problem in problems if problem)


def _json(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


_COLUMNS = ("NAME", "SIZE", "PARAMS", "QUANT", "CONTEXT", "FLAGS", "NOTE")
_RIGHT = frozenset({"SIZE", "PARAMS", "CONTEXT"})


def _row(model: FoundModel, is_loaded: bool) -> tuple[str, ...]:
    header = model.params
    notes = ["loaded"] if is_loaded else []
    if model.mmproj:
        notes.append("with projector")
    if model.error:
        notes.append(model.error)
    return (
        model.name,
        size_text(model.size),
        _count(header.parameters) if header else "",
        header.quantisation if header else "",
        f"{header.context_length}" if header and header.context_length else "",
        shlex.join(model.flags),
        "; ".join(notes),
    )


def _count(number: int) -> str:
    """Parameters as people say them: ``8.19B``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number) if number else ""


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns under their names, without those in which nothing stands."""
    filled = [
        place for place in range(len(_COLUMNS)) if any(row[place] for row in rows)
    ]
    rows = [_COLUMNS, *rows]
    widths = {place: max(len(row[place]) for row in rows) for place in filled}

    def cell(row: tuple[str, ...], place: int) -> str:
        if _COLUMNS[place] in _RIGHT:
            return row[place].rjust(widths[place])
        return row[place].ljust(widths[place])

    lines = ("  ".join(cell(row, place) for place in filled) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


# --- show ------------------------------------------------------------------------


def _show(
    options: argparse.Namespace,
    findings: Findings,
    loaded: Loaded,
    env: Mapping[str, str],
) -> Outcome:
    model = _named(options.name, findings)
    if model is None:
        return _unknown(options.name, findings)
    command, goinfer = _commands(model, findings, loaded, env)
    if options.json:
        listing = goinfer_listing(findings, set(loaded_models(loaded, env).paths))
        entry = {"name": model.name, **listing["models"][model.name]}
        entry["files"] = [str(path) for path in parts_of(model)]
        entry["header"] = dataclasses.asdict(model.params) if model.params else None
        entry["command"] = list(command)
        return Outcome(DONE, out=_json(entry))
    facts = _facts(model)
    if command:
        memory = estimated(command)
        facts["memory"] = f"about {size_text(memory)}" if memory else ""
        facts["command"] = shlex.join(command)
        facts["goinfer"] = shlex.join(goinfer)
    width = max(map(len, facts)) + 2
    lines = (f"{name:<{width}}{text}\n" for name, text in facts.items() if text)
    return Outcome(DONE, out="".join(lines))


def _facts(model: FoundModel) -> dict[str, str]:
    """What there is to say, in order; what is empty is not known."""
    header = model.params
    parts = parts_of(model)
    count = f" ({len(parts)} files)" if len(parts) > 1 else ""
    facts = {
        "name": model.name,
        "problem": model.error,
        "path": f"{model.path}{count}",
        "size": size_text(model.size),
        "projector": str(model.mmproj) if model.mmproj else "",
        "flags": shlex.join(model.flags),
        "flags from": model.origin,
    }
    if header is None:
        return facts
    kind = "writes text"
    if header.is_reranker:
        kind = "ranks documents"
    elif header.is_embedding:
        kind = "makes embeddings"
    numbers = {
        "layers": header.block_count,
        "embedding": header.embedding_length,
        "vocabulary": header.vocabulary,
    }
    return facts | {
        "title": header.name,
        "kind": kind,
        "architecture": header.architecture,
        "parameters": _count(header.parameters),
        "quantisation": header.quantisation,
        "context": f"{header.context_length} tokens" if header.context_length else "",
        "template": "has a chat template" if header.has_template else "none",
        **{name: str(number) for name, number in numbers.items() if number},
    }


def _commands(
    model: FoundModel, findings: Findings, loaded: Loaded, env: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The command that would run a model, and goinfer's; empty if there is none."""
    llama = loaded.config.llama
    try:
        definitions = to_definitions(
            findings,
            exe=shutil.which(llama.exe, path=env.get("PATH")) or llama.exe,
            common=llama.args.common,
            goinfer=llama.args.goinfer,
            base=loaded.folder,
        )
    except ValueError:  # the quotation marks of llama.args; ``check`` says so
        return (), ()
    found = {definition.id: definition.command for definition in definitions}
    plain = found.get(model.name, ())
    return plain, found.get(GOINFER_PREFIX + model.name, ())


# --- which one -------------------------------------------------------------------


def _named(name: str, findings: Findings) -> FoundModel | None:
    """The model of a name, however its letters are written, or of a path."""
    plain = name.removeprefix(GOINFER_PREFIX)
    for asked in (name, plain):
        if model := findings.named(asked):
            return model
    path = os.path.abspath(name)
    alike = [
        model
        for model in findings.models
        if model.name.lower() == plain.lower() or str(model.path) == path
    ]
    return alike[0] if len(alike) == 1 else None


def _unknown(name: str, findings: Findings) -> Outcome:
    names = {model.name.lower(): model.name for model in findings.models}
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f'; nearest: "{names[near[0]]}"' if near else ""
    note = f'no model "{name}"{hint}. inferencia models lists all.\n'
    return Outcome(FAILED, err=note)


# --- rm --------------------------------------------------------------------------


def _remove(
    options: argparse.Namespace,
    findings: Findings,
    searched: Sequence[Path],
    loaded: Loaded,
    env: Mapping[str, str],
    person: Asking,
) -> Outcome:
    model = _named(options.name, findings)
    if model is None:
        return _unknown(options.name, findings)
    parts = parts_of(model)
    if describes_another(model):
        note = f"{model.name} is what {model.origin} describes; delete that file\n"
        return Outcome(FAILED, err=note)
    if reason := _use(model, parts, loaded, env):
        note = f"{model.name} is not deleted: {reason}\n"
        return Outcome(FAILED, err=note)
    doomed = removal(model, findings, searched)
    size = size_text(doomed.size)
    listed = "".join(f"  {path}\n" for path in doomed.paths)
    if not options.yes:
        if not person.is_there:
            note = f"this would delete {size}; say --yes to do it:\n{listed}"
            return Outcome(BAD_USAGE, err=note)
        answer = person.ask(f"{listed}Delete {model.name}, {size}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return Outcome(FAILED, err="nothing was deleted\n")
    doomed.carry_out(searched)
    return Outcome(DONE, out=f"deleted {model.name}, {size}\n{listed}")


def _use(
    model: FoundModel, parts: Sequence[Path], loaded: Loaded, env: Mapping[str, str]
) -> str:
    """Who needs its files now; "" if nobody does."""
    real = os.path.realpath(model.path)
    in_memory = loaded_models(loaded, env).paths
    if model.name in in_memory or real in map(os.path.realpath, in_memory.values()):
        return "the gateway has it loaded; unload it first"
    if users := processes_with(parts):
        who = ", ".join(f"{user.program} (process {user.pid})" for user in users)
        return f"{who} uses it; stop it first"
    if is_arriving(model.path):
        return "it is being downloaded right now; stop that first"
    return ""
