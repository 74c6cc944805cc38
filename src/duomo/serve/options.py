"""The server's command line, declared once: every option is a typed field with its flag and one sentence.

Flags of FastDeploy's server, which this model's users have in their scripts, are accepted: with its meaning
where there is one here, and otherwise with one line that says why there is none (`WITHOUT_MEANING`).
A bad value is a ConfigError of one line. The defaults are ours: loopback only, no key needed there, no
private addresses fetched, context from the checkpoint, sequences and pages from the memory there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from duomo.errors import ConfigError
from duomo.serve.flags import DEPRECATED, WITHOUT_MEANING, json_of, parse_limits

REASONING_PARSERS = ("ernie-45-vl", "ernie-45-vl-thinking", "ernie-x1")


def flag(default: Any, meaning: str, *names: str, **more: Any) -> Any:
    """A field whose flag is its name with dashes; `names` are other spellings, `more` the bounds."""
    metadata = {"meaning": meaning, "names": names, **more}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Options:
    """What `duomo serve` was asked. Sizes are in the unit of the name; None means: decided from the model."""

    # The model
    model: str | None = flag(None, "Checkpoint folder; without it the embedded model.")
    served_model_name: tuple[str, ...] = flag(
        (), "Name(s) clients may use; without it any name is accepted.", kind="words"
    )
    max_model_len: int | None = flag(None, "Context in tokens; from the checkpoint without it.", low=16)
    max_num_seqs: int | None = flag(None, "Requests decoded together.", low=1)
    max_num_batched_tokens: int | None = flag(None, "Tokens of one step, prefill chunks included.", low=16)
    block_size: int | None = flag(None, "Tokens of one page of keys and values.", low=1)
    kv_mb: int | None = flag(
        None, "Megabytes for keys and values; from the memory there is without it.", low=1
    )
    ram: str | None = flag(
        None,
        "All memory duomo may use, as 5G; below the model's size experts are read from disk when chosen.",
    )
    weights_idle_s: float = flag(
        300.0, "Seconds after the last picture until weights for pictures leave memory.", low=0
    )
    kv_cache_dtype: str | None = flag(
        None, "Keys and values as float32, bfloat16 or int8.", choices=("float32", "bfloat16", "int8")
    )
    dtype: str | None = flag(None, "Weights as float32 or bfloat16.", choices=("float32", "bfloat16"))
    enable_prefix_caching: bool = flag(True, "Keep keys and values of prompts seen before.")
    encoder_cache_dir: str | None = flag(None, "Folder where picture features survive a restart.")
    seed: int | None = flag(None, "Seed of requests that give none.", low=0)
    engine: str = flag(
        "model",
        "Who answers: the model, fixed text (scripted) to try clients with, or the time (clock) to measure "
        "the server.",
        choices=("model", "scripted", "clock"),
    )
    engine_process: bool = flag(True, "Run the engine in a process of its own, so that its end is not ours.")
    num_drafts: int = flag(0, "Tokens guessed ahead from the text so far; never changes the output.", low=0)
    scripted_delay_s: float = flag(0.0, "Seconds before each token of --engine scripted and clock.", low=0)
    # Thinking and tools
    reasoning_parser: str | None = flag(
        None,
        "How thinking, answer and calls are told apart; from the checkpoint without it.",
        choices=REASONING_PARSERS,
    )
    tool_call_parser: str | None = flag(
        None, "Accepted: tool calls are read in the one form the model has.", choices=REASONING_PARSERS
    )
    thinking: str = flag(
        "auto", "Thinking of requests that say nothing: on, off or auto.", choices=("on", "off", "auto")
    )
    reasoning_max_tokens: int | None = flag(None, "Thinking budget of requests that give none.", low=0)
    # Adapters
    lora_root: str | None = flag(None, "Folder that adapters may be loaded from while serving.")
    lora_modules: tuple[str, ...] = flag((), "Adapters to load at start, each as NAME=FOLDER.", kind="words")
    # Media
    limit_mm_per_prompt: dict[str, int] = flag(  # noqa: RUF009
        {}, 'Pictures and videos of one request, as JSON: {"image": 16, "video": 1}.', kind="limits"
    )
    mm_processor_kwargs: dict[str, Any] = flag(  # noqa: RUF009
        {}, 'Defaults of preprocessing, as JSON: {"image_max_pixels": 1003520}.', kind="json"
    )
    allowed_local_media_path: str | None = flag(None, "Folder that file: addresses may name files in.")
    allow_private_media: bool = flag(False, "Fetch media from private and loopback addresses too.")
    media_timeout_s: float = flag(10.0, "Seconds to fetch one picture or video.", low=0.1)
    media_workers: int = flag(2, "Processes that decode pictures and videos.", low=1, high=64)
    media_memory_mb: int = flag(2048, "Megabytes that decoding one file may take.", low=16)
    max_processor_cache: float = flag(
        0.0625, "GiB of decoded media kept for the next turn; 0 or less keeps none.", low=-1
    )
    media_decode_s: int = flag(60, "Seconds of computing that decoding one file may take.", low=1)
    media_max_mb: float = flag(32.0, "Megabytes of one encoded picture or video.", low=0.01)
    media_total_mb: float = flag(128.0, "Megabytes of all encoded media of a request.", low=0.01)
    # HTTP
    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(8180, "Port to listen on; 0 takes a free one.", low=0, high=65535)
    max_concurrency: int = flag(256, "Requests running or waiting; one more gets 429.", low=1)
    max_body_mb: float = flag(64.0, "Megabytes of one request body.", low=0.001)
    request_timeout_s: float = flag(60.0, "Seconds a request may take to arrive, head and body.", low=0.05)
    keep_alive_s: float = flag(10.0, "Seconds of silence before a stream gets a comment.", low=0.01)
    slow_client_s: float = flag(60.0, "Seconds a reader may stand still before it is dropped.", low=0.1)
    cors_origin: tuple[str, ...] = flag((), "Origin that browsers may call from; repeatable.", kind="list")
    page: bool = flag(True, "Serve the page at /.")
    docs: bool = flag(True, "Serve /docs and /openapi.json.")
    # Keys
    api_key: tuple[str, ...] = flag((), "Key that clients must send; repeatable.", kind="list")
    api_key_file: str | None = flag(None, "File of keys, one a line; # opens a comment.")
    metrics_need_key: bool = flag(False, "Ask for a key at /metrics and /load too.")
    # Running
    shutdown_timeout_s: float = flag(
        30.0, "Seconds to finish what runs after SIGTERM.", "--timeout-graceful-shutdown", low=0
    )
    on_engine_death: str = flag(
        "restart", "When the engine dies: restart it, or exit 1.", choices=("restart", "exit")
    )
    log_level: str = flag("info", "How much is logged.", choices=("debug", "info", "warning", "error"))
    log_prompts: bool = flag(False, "Log prompts and answers; they are not logged without this.")
    notes: tuple[str, ...] = field(default=(), metadata={"hidden": True})  # one line for each flag set aside

    def adapters(self) -> dict[str, str]:
        """Names and folders of --lora-modules. ConfigError if one is spelled otherwise."""
        pairs = [module.partition("=") for module in self.lora_modules]
        for name, equals, folder in pairs:
            if not name or not equals or not folder:
                raise ConfigError(f"--lora-modules has {name + equals + folder!r}; write NAME=FOLDER")
        return {name: folder for name, _, folder in pairs}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; duomo serve --help lists the flags")


def parse(argv: Sequence[str]) -> Options:
    """Options from a command line, over those of `--config FILE` (YAML or JSON, dashes or underscores)."""
    names = vars(_parser().parse_args(list(argv)))
    set_aside: list[str] = names.pop("set_aside", None) or []
    config = names.pop("config", None)
    from_file, more_set_aside = _from_file(config) if config else ({}, [])
    set_aside = [*more_set_aside, *set_aside]
    given = {**from_file, **{k: v for k, v in names.items() if v is not None}}
    notes = tuple(
        f"--{name} was given and has no effect here: {WITHOUT_MEANING.get(name) or DEPRECATED[name]}"
        for name in dict.fromkeys(set_aside)
    )
    return checked(replace(Options(**given), notes=notes))


def checked(options: Options) -> Options:
    """The same options, or a ConfigError naming the first that cannot be."""
    for name in fields(Options):
        value, more = getattr(options, name.name), name.metadata
        spelled = "--" + name.name.replace("_", "-")
        if value is None or not more:
            continue
        if "choices" in more and value not in more["choices"]:
            raise ConfigError(f"{spelled} is {value!r}; it must be one of {', '.join(more['choices'])}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = more.get("low", float("-inf")), more.get("high", float("inf"))
            if not low <= value <= high:
                bounds = f"between {low:g} and {high:g}" if high != float("inf") else f"at least {low:g}"
                raise ConfigError(f"{spelled} is {value:g}; it must be {bounds}")
    for spelled, folder in (
        ("--allowed-local-media-path", options.allowed_local_media_path),
        ("--lora-root", options.lora_root),
        *(("--lora-modules", folder) for folder in options.adapters().values()),
    ):
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{spelled} {folder} is not a folder")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="duomo serve",
        description="Answer over HTTP: OpenAI's wire format, and a page at /.",
        allow_abbrev=False,
        argument_default=None,
    )
    for option in fields(Options):
        if option.metadata.get("hidden"):
            continue
        spellings = ["--" + option.name.replace("_", "-"), *option.metadata["names"]]
        parser.add_argument(*spellings, dest=option.name, default=None, **_argument(option.type, option))
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with the same names.")
    for name in (*WITHOUT_MEANING, *DEPRECATED):
        spellings = [f"--{name}", "-tp"] if name == "tensor-parallel-size" else [f"--{name}"]
        parser.add_argument(*spellings, action=_SetAside, nargs="?", dest="set_aside", help=argparse.SUPPRESS)
    return parser


def _argument(annotation: Any, option: Any) -> dict[str, Any]:
    """How argparse reads one field. Annotations are strings here (`from __future__ import annotations`)."""
    shown = option.default if isinstance(option.default, (int, float, str)) else None
    meaning = option.metadata["meaning"].replace("%", "%%")
    if annotation == "bool":
        said = f"{meaning} (default: {'yes' if option.default else 'no'})"
        return {"action": argparse.BooleanOptionalAction, "help": said}
    kind = option.metadata.get("kind")
    reads: dict[str, Any] = {"help": meaning if shown is None else f"{meaning} (default: {shown})"}
    if kind == "list":
        return {**reads, "action": "append", "metavar": "TEXT"}
    if kind == "words":
        return {**reads, "nargs": "+", "metavar": "NAME"}
    if kind == "json":
        return {**reads, "type": json_of, "metavar": "JSON"}
    if kind == "limits":
        return {**reads, "type": parse_limits, "metavar": "JSON"}
    if "choices" in option.metadata:
        return {**reads, "choices": option.metadata["choices"]}
    plain = {"int": int, "int | None": int, "float": float}.get(annotation, str)
    return {**reads, "type": plain, "metavar": {int: "N", float: "X"}.get(plain, "TEXT")}


class _SetAside(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = "tensor-parallel-size" if option_string == "-tp" else (option_string or "").lstrip("-")
        namespace.set_aside = [*(namespace.set_aside or []), name]


def _from_file(path: str) -> tuple[dict[str, Any], list[str]]:
    """The options in a file, and the names in it that have no effect here."""
    known = {option.name: option for option in fields(Options) if not option.metadata.get("hidden")}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    values = _mapping(path, text)
    given: dict[str, Any] = {}
    set_aside: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        dashed = str(key) if str(key) in WITHOUT_MEANING else name.replace("_", "-")
        if dashed in (*WITHOUT_MEANING, *DEPRECATED):
            set_aside.append(dashed)
            continue
        if name not in known:
            raise ConfigError(
                f"--config {path} has {key!r}, which is no option; duomo serve --help lists them"
            )
        given[name] = _typed(path, name, known[name].type, value)
    return given, set_aside


def _typed(path: str, name: str, annotation: Any, value: Any) -> Any:
    """A value from a file, held to the field's type; a list becomes a tuple, an int a float where asked."""
    if annotation.startswith("tuple"):
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif annotation.startswith("dict"):
        if isinstance(value, dict):
            return value
    elif value is None and "None" in annotation:
        return None
    else:
        kinds: dict[str, tuple[type, ...]] = {
            "bool": (bool,),
            "int": (int,),
            "float": (int, float),
            "str": (str,),
        }
        if isinstance(value, kinds[annotation.split(" ")[0]]) and not (
            isinstance(value, bool) and annotation != "bool"
        ):
            return value
    raise ConfigError(f"--config {path}: {name} is {value!r}; it must be {annotation.replace(' | None', '')}")


def _mapping(path: str, text: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:  # JSON is YAML too; only true YAML needs the library
        return json_of(text)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold names and values, one a line")
    return values
