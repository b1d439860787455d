"""A folder's tokenizer: tokenizer.json as it stands, else what transformers makes of older files.
Never from the network.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from rlhf.models.json_files import SIZE, read_object, read_text
from rlhf.ranges import above, problem

FAST = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
OLDER = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
BESIDE = (CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json")
SMALL = 16_000_000  # bytes of what lies beside the vocabulary
TOKENS = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
FIELDS: Mapping[str, Any] = {  # of tokenizer_config.json
    **dict.fromkeys(TOKENS, str | dict | None),
    "chat_template": str | list | None,
    "added_tokens_decoder": dict | None,
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), list | dict | None),
    "padding_side": Literal["left", "right"],
    "truncation_side": Literal["left", "right"],
    "model_max_length": Annotated[float, above(0)] | None,
    "tokenizer_class": str | None,
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), bool | None
    ),
}


def read(folder: Path) -> Any:
    """The tokenizer of a folder; None where there is none.

    tokenizer.json is taken as it stands: AutoTokenizer puts some families' own pre-tokenizer in its
    place, which gives other ids.  Without it AutoTokenizer makes one of vocab.json and merges.txt,
    of vocab.txt, or of a sentencepiece model, by the class that tokenizer_config.json or the
    config's family names.

    Raises: ValueError naming the file that is broken, or too large, or from which no tokenizer can
    be made.
    """
    fast = (folder / FAST).exists()
    older = [name for name in OLDER if (folder / name).exists()]
    if not fast and not older:
        return None
    # Sizes before contents: the libraries read all of a file at once.
    for name, limit in (
        (FAST, SIZE),
        *((name, SIZE) for name in OLDER),
        *((name, SMALL) for name in BESIDE),
    ):
        if (folder / name).is_file() and (size := (folder / name).stat().st_size) > limit:
            raise ValueError(
                f"{folder / name} has {size:,} bytes, but such a file has at most {limit:,}"
            )
    if (folder / CONFIG).exists():
        _check_config(folder / CONFIG)
    try:
        return _load(folder, fast)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # A panic of the Rust library is a BaseException, but no Exception.
        why = _why(folder, [FAST] if fast else older, error)
        raise ValueError(why) from error


def _load(folder: Path, fast: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if fast:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    # No code of the folder runs, and no network: the folder is all there is.
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    # A class that reads other files than these makes an empty tokenizer without an error.
    known = tokenizer.get_vocab()
    if not known.keys() - set(tokenizer.all_special_tokens) or not _entries(folder) <= known.keys():
        raise ValueError(
            f"{type(tokenizer).__name__} reads other files; tokenizer_class in {CONFIG} names the "
            "class to take"
        )
    return tokenizer


def _entries(folder: Path) -> set[str]:
    """The vocabulary's entries as the files have them, where they are text."""
    if (folder / "vocab.json").exists():
        return set(read_object(folder / "vocab.json"))
    if (folder / "vocab.txt").exists():
        return {line for line in read_text(folder / "vocab.txt").split("\n") if line}
    return set()


def _why(folder: Path, vocabulary: list[str], error: BaseException) -> str:
    """What is wrong with a tokenizer's files: the first that is no JSON, or the library's error."""
    # Our own readers name the file and the byte; the libraries' errors seldom do.
    there = [name for name in (*vocabulary, *BESIDE) if (folder / name).exists()]
    for name in there:
        try:
            if name.endswith(".json"):
                read_object(folder / name)
            elif not name.endswith(".model"):
                read_text(folder / name)
        except ValueError as broken:
            return str(broken)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    said = kind + " ".join(str(error).split())[:300]
    cure = f"AutoTokenizer.from_pretrained(name).save_pretrained(folder) writes a {FAST}"
    if vocabulary[-1].endswith(".model"):
        cure = f"pip install sentencepiece tiktoken protobuf, or elsewhere {cure}"
    return f"{folder}: no tokenizer can be made of {', '.join(there)}: {said}; {cure}"


def _check_config(file: Path) -> None:
    """Kinds of the fields of tokenizer_config.json that are read."""
    for name, value in read_object(file, SMALL).items():
        if name in FIELDS and (wanted := _problem(FIELDS[name], value)):
            raise ValueError(f"{file}: {name} must be {wanted}, but is {value!r:.80}")
        if name in TOKENS and isinstance(value, dict) and not isinstance(value.get("content"), str):
            raise ValueError(
                f"{file}: {name} must be text or an object with its content, but is {value!r:.80}"
            )
        if name == "added_tokens_decoder":
            for number, entry in (value or {}).items():
                if not number.isdecimal() or not isinstance(entry, dict) or "content" not in entry:
                    raise ValueError(
                        f"{file}: {name} must have objects by their ids, but {number!r:.40} is "
                        f"{entry!r:.80}"
                    )
        if name == "chat_template" and isinstance(value, list):
            named = [
                entry
                for entry in value
                if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
            ]
            if len(named) < len(value) or not all(
                isinstance(entry["template"], str) for entry in named
            ):
                raise ValueError(
                    f"{file}: chat_template must be text, or a list of names and templates, but is "
                    f"{value!r:.80}"
                )


def _problem(hint: Any, value: Any) -> str | None:
    kinds = getattr(hint, "__args__", ()) if isinstance(hint, type(str | None)) else ()
    if not {dict, list}.intersection(kinds):
        return problem(hint, value)
    known = {str: "text", dict: "an object", list: "a list"}
    return None if type(value) in kinds else " or ".join(known.get(kind, "null") for kind in kinds)
