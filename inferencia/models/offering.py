"""What is offered of the models that were found: how each is started, and the list.

Each model is offered twice, as goinfer does: as ``NAME``, and as ``GI_NAME``, which is
in no list and gets the arguments for goinfer's own API as well. The command is

    EXE --host 127.0.0.1 --port ${PORT} COMMON -m PATH [--mmproj FILE] FLAGS
"""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from inferencia.secret import starred

from .definitions import PORT_MACRO, ModelDefinition
from .finding import Findings, FoundModel

GOINFER_PREFIX = "GI_"
TEMPLATE = "template.jinja"
START_PORT = 5800
_MAX_PORT = 65535

_TEMPLATE_OPTION = "--chat-template-file"
_PROJECTOR_OPTIONS = frozenset({"--mmproj", "-mm"})
# What makes llama-server answer with vectors or ranks; a model that can do nothing
# else is of no use without.
_EMBEDDING_OPTIONS = frozenset(
    {"--embedding", "--embeddings", "--rerank", "--reranking"}
)


def to_definitions(
    findings: Findings,
    *,
    exe: str,
    common: str,
    goinfer: str,
    base: Path,
    start_port: int = START_PORT,
) -> tuple[ModelDefinition, ...]:
    """How to start each usable model, sorted by id.

    Args:
        exe: the llama-server, a path or a name to be looked for.
        common: arguments for all models, as they would be written in a shell.
        goinfer: those that ``GI_NAME`` gets in addition.
        base: the configuration's folder; a relative ``--chat-template-file`` is there,
            or is the one that comes with this program.
        start_port: the first model's port; the others have those that follow.

    Raises:
        ValueError: ``common`` or ``goinfer`` has a quotation mark too many.
    """
    shared = _split(common, "llama.args.common")
    own = _split(goinfer, "llama.args.goinfer")
    found: dict[str, ModelDefinition] = {}
    for model in findings.models:
        if not model.is_usable:
            continue
        plain = _definition(model, exe, shared, base)
        found[model.name] = plain
        name = GOINFER_PREFIX + model.name
        if findings.named(name) is None:
            command = _command(model, exe, (*shared, *own), base)
            found[name] = replace(
                plain,
                id=name,
                command=command,
                unlisted=True,
                use_model_name=model.name,
            )
    # With more models than ports some share one; they seldom run together, and a port
    # that is taken is found out when the model is started.
    ports = _MAX_PORT + 1 - start_port
    return tuple(
        replace(found[name], port=start_port + place % ports)
        for place, name in enumerate(sorted(found))
    )


def goinfer_listing(findings: Findings, loaded: Collection[str]) -> dict[str, Any]:
    """The answer to goinfer's ``GET /models``.

    Args:
        loaded: ids of the models that are loaded; ``GI_NAME`` counts for ``NAME``.
    """
    models = {}
    for model in findings.models:
        entry: dict[str, Any] = {
            "path": str(model.path),
            "size": model.size,
            "flags": starred(shlex.join(model.flags)),
            "params": _params(model),
            "loaded": model.name in loaded or GOINFER_PREFIX + model.name in loaded,
        }
        if model.error:
            entry["error"] = model.error
        models[model.name] = entry
    return {"count": len(models), "models": models}


def shipped_template() -> Path:
    """The template that passes the prompt on as it is."""
    return Path(str(resources.files("inferencia") / TEMPLATE))


def _split(arguments: str, key: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(arguments))
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).lower()}") from None


def _definition(
    model: FoundModel, exe: str, shared: Sequence[str], base: Path
) -> ModelDefinition:
    return ModelDefinition(
        id=model.name,
        command=_command(model, exe, shared, base),
        # Not "localhost", which may mean ::1 first; --host says which it is.
        proxy=f"http://127.0.0.1:{PORT_MACRO}",
        path=str(model.path),
    )


def _command(
    model: FoundModel, exe: str, arguments: Sequence[str], base: Path
) -> tuple[str, ...]:
    command = [exe, "--host", "127.0.0.1", "--port", PORT_MACRO, *arguments]
    command += ["-m", str(model.path)]
    if model.mmproj and not _PROJECTOR_OPTIONS & set(model.flags):
        command += ["--mmproj", str(model.mmproj)]
    if model.params and not _EMBEDDING_OPTIONS & {*arguments, *model.flags}:
        if model.params.is_reranker:
            command.append("--reranking")
        elif model.params.is_embedding:
            command.append("--embeddings")
    return _with_template([*command, *model.flags], base)


def _with_template(command: list[str], base: Path) -> tuple[str, ...]:
    """Say where a template is that is named without its folder."""
    for place, option in enumerate(command[:-1]):
        if option != _TEMPLATE_OPTION:
            continue
        named = base / command[place + 1]
        if named.is_file():
            command[place + 1] = str(named.absolute())
        elif command[place + 1] == TEMPLATE:
            command[place + 1] = str(shipped_template())
    return tuple(command)


def _params(model: FoundModel) -> dict[str, Any]:
    header = model.params
    return {
        "arch": header.architecture if header else "",
        "parameters": header.parameters if header else 0,
        "quant": header.quantisation if header else "",
        "ctx": header.context_length if header else 0,
        "template": header.has_template if header else False,
        "mmproj": str(model.mmproj) if model.mmproj else None,
    }
