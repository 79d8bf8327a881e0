# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient generate``: complete a prompt with a base and its adapters, as it comes."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from QEfficient.cloud.__main__ import run
from QEfficient.cloud.progress import Progress, progress, quiet
from QEfficient.cloud.test import parse_adapters
from QEfficient.contract import ADAPTERS_DIR, BASE, MANIFEST_FILE, MODEL_FILE, PRECISIONS, Manifest
from QEfficient.errors import AdapterNotFoundError, ConfigError, QEffError
from QEfficient.options import option, parse, suggest
from QEfficient.store import is_local

if TYPE_CHECKING:
    from QEfficient.runtime.session import OrtSession


@dataclass(slots=True, kw_only=True)
class Options:
    """Complete prompts with a base and its adapters; text appears as it is generated.

    The base is exported and compiled the first time, which takes a while, and used again afterwards. Given the folder of
    a graph or a program instead, the adapters that were exported with the graph are used, and are not given by --adapter.
    """

    base: str = option(help="Folder or Hub id of the base model, or folder of a graph or program.", positional=True)
    adapter: list[str] = option([], "An adapter and its name; may be repeated.", metavar="NAME=PATH")
    use: list[str] = option(
        [], "Complete with this adapter, 'base' for none; may be repeated. Default: every adapter.", metavar="NAME"
    )
    prompt: list[str] = option([], "Text to complete, '-' for standard input; may be repeated.", metavar="TEXT")
    prompts: Path | None = option(None, "File of prompts, one a line, after those of --prompt.", metavar="FILE")
    chat: bool = option(False, "Put the prompt into the tokenizer's chat template.")
    system: str = option("", "System message of the chat; implies --chat.", metavar="TEXT")
    messages: Path | None = option(
        None,
        "JSON file of the chat so far, a list of {role, content}; a prompt goes behind it. Implies --chat.",
        metavar="FILE",
    )
    max_new_tokens: int = option(128, "Most tokens to generate.")
    temperature: float = option(0.0, "Randomness of the choice; 0 takes the likeliest token.")
    top_p: float = option(1.0, "Choose among the likeliest tokens that together have this probability.")
    set: list[str] = option(
        [],
        "Any other field of transformers' GenerationConfig, as JSON: top_k=40; may be repeated.",
        metavar="NAME=VALUE",
    )
    seed: int = option(0, "Start of the random numbers.")
    ctx_len: int | None = option(None, "Longest context, prompt and answer. Default: the base's own.")
    tokenizer: str = option("", "Folder or Hub id of the tokenizer. Default: the base's.", metavar="PATH")
    precision: str = option("fp32", "How the base's weights are held; a program has its own.", choices=PRECISIONS)
    block_size: int | None = option(
        None, "Weights that share a scale, at int8 and int4. Default: see 'qefficient compile --help'."
    )
    threads: int = option(0, "Threads; 0: one for each physical core that the process may use.")
    large_pages: bool = option(
        False,
        "Weights on large pages of memory, where the system has them: loading takes longer, tokens may be faster.",
    )


@dataclass(frozen=True, slots=True)
class _Ready:
    """Something that generates.

    Attributes:
        generate: Takes what transformers' ``generate`` takes.
        select: Takes the name of an adapter, or ``"base"``.
        adapters: Names that may be selected, without ``"base"``.
        base: Folder or Hub id of the base, for its tokenizer.
    """

    generate: Callable[..., Any]
    select: Callable[[str], Any]
    adapters: tuple[str, ...]
    base: str


def command(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse(Options, argv, prog="qefficient generate")
    adapters = parse_adapters(options.adapter)
    prompts, before = _read_prompts(options), _read_messages(options)
    arguments = _arguments(options)
    folder = _exported(options.base)
    if folder is None and is_local(options.base) and not (Path(options.base) / "config.json").is_file():
        raise ConfigError(
            f"{options.base!r} holds no base (no config.json), no graph and no program (no {MANIFEST_FILE})"
        )
    with quiet(), progress() as show:
        ready = _from_base(adapters, options, show) if folder is None else _from_graph(folder, adapters, options, show)
        names = options.use or list(ready.adapters) or [BASE]
        tokenizer = _load_tokenizer(options.tokenizer or ready.base)
    if before is not None and not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {options.tokenizer or ready.base!r} has no chat template; leave out --chat"
        )
    for inputs in [_encode(tokenizer, prompt, before) for prompt in prompts]:
        for name in names:
            ready.select(name)
            if len(names) > 1 and sys.stdout.isatty():
                print(f"\033[1m{name}\033[0m")
            elif len(names) > 1:
                print(f"[{name}]")
            _complete(ready, tokenizer, inputs, arguments, options.seed)
    return 0


def _exported(given: str) -> Path | None:
    """Return the folder of the graph or program that was named, also by its ``model.onnx`` or its ``qpc-`` folder; ``None``: a base."""
    from QEfficient.compile.program import PROGRAM_DIR

    path = Path(given)
    tried = (path, path.parent if path.name == MODEL_FILE else path, path / PROGRAM_DIR)
    return next((folder for folder in tried if (folder / MANIFEST_FILE).is_file()), None)


def _from_base(adapters: dict[str, str], options: Options, show: Progress) -> _Ready:
    """Load, export and compile what has not been exported and compiled before."""
    for name in options.use:
        _check_known(name, [*adapters, BASE])
    show("exporting", options.base)
    if not adapters:
        from QEfficient.peft.base import export_base

        return _from_graph(export_base(options.base), {}, options, show, base=options.base)
    from QEfficient.peft.auto import QEffAutoPeftModelForCausalLM

    model = QEffAutoPeftModelForCausalLM.from_base(options.base, adapters)
    session = _open(model.export().parent, options, show)
    for name in options.use or adapters:
        if name != BASE:
            session.load_adapter(name, model.tensors_of(name))
    return _ready(session, tuple(adapters), options.base)


def _from_graph(folder: Path, adapters: dict[str, str], options: Options, show: Progress, *, base: str = "") -> _Ready:
    """Open a graph (compiled first, if it is no program yet) with the adapters that were exported with it."""
    if adapters:
        raise ConfigError(
            f"{folder} is an exported graph, which comes with its adapters: leave out --adapter, or give the base"
        )
    graph = folder.parent.parent if Manifest.read(folder).is_program else folder
    files = {file.stem: file for file in sorted((graph / ADAPTERS_DIR).glob("*.safetensors"))}
    if not files and Manifest.read(folder).adapter and options.use != [BASE]:
        raise ConfigError(
            f"no adapters lie beside {folder}: give its graph, the program in the graph's own folder (compiled without "
            "--output), or --use base"
        )
    for name in options.use:
        _check_known(name, [*files, BASE])
    session = _open(folder, options, show)
    _load_exported(session, graph, {name: files[name] for name in options.use or files if name != BASE})
    return _ready(session, tuple(files), base or str(session.manifest.base.get("name_or_path", "")))


def _open(folder: Path, options: Options, show: Progress) -> "OrtSession":
    """Open a program, or what a graph is compiled to."""
    from QEfficient.compile.program import compile_graph
    from QEfficient.runtime.session import OrtSession

    if not Manifest.read(folder).is_program:
        show("compiling", folder.name)
        folder = compile_graph(
            folder, precision=options.precision, block_size=options.block_size, ctx_len=options.ctx_len
        )
    elif options.precision != "fp32" or options.block_size is not None or options.ctx_len is not None:
        raise ConfigError(f"{folder} is a program, compiled already: leave out --precision, --block-size and --ctx-len")
    show("loading", folder.parent.name)
    return OrtSession(folder, threads=options.threads or None, large_pages=options.large_pages)


def _ready(session: "OrtSession", names: tuple[str, ...], base: str) -> _Ready:
    from QEfficient.runtime.generate import SessionModel

    return _Ready(SessionModel(session, generation_config=_defaults(base)).generate, session.set_adapter, names, base)


def _load_exported(session: "OrtSession", graph: Path, files: dict[str, Path]) -> None:
    """Load adapters that were exported with ``graph``."""
    from QEfficient.peft.adapters import fit, neutral_tensors, read_exported
    from QEfficient.runtime.laid_out import load_file

    def read(file: Path) -> Any:
        return fit(read_exported(file), session.manifest, neutral_tensors(graph))

    for name, file in files.items():
        load_file(session, name, file, partial(read, file))


def _defaults(base: str) -> Any:
    """Return the base's own defaults for generation, ``None`` if it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base)
    except (OSError, ValueError):
        return None


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"no tokenizer in {name!r} ({reason}); name one with --tokenizer") from e


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise AdapterNotFoundError(f"no adapter {name!r}{suggest(name, known)} (there are: {', '.join(known)})")


def _read_prompts(options: Options) -> list[str]:
    """Return every prompt; with --messages that end with the user's turn there may be none, which is an empty one."""
    found = [sys.stdin.read() if p == "-" else p for p in options.prompt]
    if options.prompts is not None:
        found += [line for line in _read(options.prompts, "--prompts").splitlines() if line.strip()]
    if not found and options.messages is None:
        raise ConfigError("nothing to complete: give --prompt, --prompts or --messages")
    return found or [""]


def _read_messages(options: Options) -> list[dict[str, str]] | None:
    """Return the chat before the prompt; ``None`` if there is no chat."""
    turns: Any = []
    if options.messages is not None:
        try:
            turns = json.loads(_read(options.messages, "--messages"))
        except ValueError as e:
            raise ConfigError(f"--messages {options.messages} is not JSON: {e}") from e
        good = isinstance(turns, list) and all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        )
        if not good or not turns:
            raise ConfigError(f'--messages {options.messages} must hold a list of {{"role": ..., "content": ...}}')
    if options.system:
        turns = [{"role": "system", "content": options.system}, *turns]
    return turns if turns or options.chat else None


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{name} {path} cannot be read: {e}") from e


def _arguments(options: Options) -> dict[str, Any]:
    """Return the arguments of transformers' ``generate``, checked."""
    if options.threads < 0:
        raise ConfigError(f"--threads must be at least 0, not {options.threads}")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    if not 0 <= options.seed < 1 << 63:
        raise ConfigError(f"--seed must be at least 0 and below 2**63, not {options.seed}")
    if not 0 <= options.temperature < float("inf") or not 0 < options.top_p <= 1:
        raise ConfigError(
            f"--temperature must be at least 0 and --top-p in (0, 1], not {options.temperature} and {options.top_p}"
        )
    arguments: dict[str, Any] = {"do_sample": options.temperature > 0, "max_new_tokens": options.max_new_tokens}
    if options.temperature > 0:
        arguments |= {"temperature": options.temperature, "top_p": options.top_p}
    elif options.top_p != 1:
        raise ConfigError("--top-p changes nothing without --temperature, which is 0: the likeliest token is taken")
    return arguments | _others(options.set, arguments)


def _others(pairs: Sequence[str], beside: dict[str, Any]) -> dict[str, Any]:
    """Return what ``--set`` says, checked by transformers' own configuration together with the arguments ``beside`` it."""
    if not pairs:
        return {}
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict())  # type: ignore[no-untyped-call]
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f"--set takes NAME=VALUE of transformers' GenerationConfig, not {pair!r}{suggest(name, known)}"
            )
        try:
            found[name] = json.loads(value)
        except ValueError as e:
            raise ConfigError(f"--set {pair}: the value must be JSON, {name}=40 or {name}='\"text\"' ({e})") from e
    try:
        GenerationConfig(**{**beside, **found}).validate()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as e:
        raise ConfigError(f"--set: {str(e).strip().splitlines()[0]}") from e
    return found


def _encode(tokenizer: Any, prompt: str, before: list[dict[str, str]] | None) -> Any:
    """Return a prompt's tokens as ``generate`` takes them, behind the chat ``before`` it if there is one."""
    if before is not None:
        from jinja2 import TemplateError

        turns = [*before, {"role": "user", "content": prompt}] if prompt else before
        form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            inputs = tokenizer.apply_chat_template(turns, **form)
        except TemplateError as e:
            raise ConfigError(f"the chat template refuses these messages: {e}") from e
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].shape[1]:
        raise ConfigError("an empty prompt is no token for this tokenizer: there is nothing to complete")
    return inputs


def _complete(ready: _Ready, tokenizer: Any, inputs: Any, arguments: dict[str, Any], seed: int) -> None:
    """Print one completion as it comes, and how fast it came to standard error."""
    import torch
    from transformers import TextStreamer

    columns = inputs["input_ids"].shape[1]
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        arguments = {"pad_token_id": tokenizer.eos_token_id, **arguments}
    if "stop_strings" in arguments:
        arguments = {**arguments, "tokenizer": tokenizer}
    several = arguments.get("num_return_sequences") or 1
    streamed = several == 1 and (arguments.get("num_beams") or 1) == 1  # beams change until the end
    if streamed:
        arguments = {**arguments, "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}
    torch.manual_seed(seed)
    start = time.perf_counter()
    try:
        out = ready.generate(**inputs, **arguments)
    except (ValueError, TypeError) as e:
        if isinstance(e, QEffError):
            raise
        raise ConfigError(
            f"transformers refuses these options: {(str(e).strip() or type(e).__name__).splitlines()[0]}"
        ) from e
    seconds = time.perf_counter() - start
    rows = getattr(out, "sequences", out)[:, columns:]  # --set return_dict_in_generate=true
    for n, row in enumerate(rows if not streamed else (), 1):
        print(f"[{n}]\n" * (several > 1) + tokenizer.decode(row, skip_special_tokens=True))
    new = rows.numel()
    print(f"({new} tokens, {new / seconds:.1f} tokens/s)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run("generate"))
