"""Chat templates, conversations, letters and prompts that cannot be: folders of models, files of rows."""

import json
import pathlib
import shutil

PLAIN = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
TEMPLATES = {  # folder -> template, and what is said of it
    "system": ("{{ raise_exception('System role not supported') }}", "row 0: the chat template fails on it: System role"),
    "undefined": ("{{ messages[0].author.name }}", "row 0: the chat template fails on it: UndefinedError"),
    "types": ("{{ 1 + messages }}", "row 0: the chat template fails on it: TypeError"),
    "zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError in its line 1"),
    "sandbox": ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes longer than"),
    "power": ("{{ 7 ** (10 ** 9) }}", "it takes longer than"),
    "large": ("{{ 'x' * 10 ** 10 }}", "it takes more memory than it may"),
    "long": ("{{ 'x' * 17000000 }}", "it writes 17,000,000 characters"),
    "grows": ("{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "it takes "),
    "drops": ("{{ messages[0].content }}", "row 0: the chat template leaves out message 1"),
    "counts": ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "row 0: the chat template leaves out message 0"),
}  # fmt: skip
SAY = lambda role, content: {"role": role, "content": content}
CHAT = [SAY("user", "so"), SAY("assistant", "then")]
ROWS = {  # file -> its second row, and what is said of it
    "image": ({"messages": [SAY("user", [{"type": "image"}])]}, "row 1: message 0: content has a part of type 'image'"),
    "number": ({"messages": [SAY("user", 5)]}, "row 1: message 0: content must be text, or parts with text, but is 5"),
    "null": ({"messages": [SAY("user", None)]}, "row 1: message 0 of role 'user' has no content"),
    "object": ({"messages": [SAY("assistant", {"a": 1})]}, "row 1: message 0: content must be text"),
    "role": ({"messages": [SAY(None, "a")]}, "row 1: messages must be a string or messages"),
    "calls": ({"messages": [SAY("assistant", "a") | {"tool_calls": "add"}]}, "row 1: message 0: tool_calls must be a"),
    "lost_call": (
        {"messages": [*CHAT[:1], SAY("assistant", "a") | {"tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}]},
        "row 1: the chat template leaves out the tool call of message 1",
    ),
    "tools": ({"messages": CHAT, "tools": "[{"}, "row 1: tools is a text, but not JSON"),
    "tool_defs": ({"messages": CHAT, "tools": None, "tool_defs": 5}, "row 1: tool_defs must be a list of JSON schemas"),
    "kwargs": ({"messages": CHAT, "chat_template_kwargs": {"tokenize": False}}, "row 1: chat_template_kwargs has tokenize"),
    "letter": ({"messages": [SAY("user", "Ö")]}, "row 1: the tokenizer has no token for 'Ö'"),
    "half": ({"messages": [SAY("user", "a\ud83d")]}, "half of a surrogate pair"),
}  # fmt: skip
SHORT = ["--steps", "1", "--batch_size", "2", "--output", "OUT"]
CASES: list[tuple[str, list[str], str]] = [
    *(
        (f"a template that {name}", ["sft", "--model", f"TMP/{name}", "--dataset", "TMP/chat.jsonl", *SHORT], said)
        for name, (_, said) in TEMPLATES.items()
    ),
    *(
        (f"a row of {name}", ["sft", "--model", "TMP/plain", "--dataset", f"TMP/{name}.jsonl", *SHORT], said)
        for name, (_, said) in ROWS.items()
    ),
    ("a letter", ["sft", "--model", "BASE", "--dataset", "TMP/text.jsonl", *SHORT], "the tokenizer has no token for 'É'"),
    ("messages without a template", ["sft", "--model", "BASE", "--dataset", "TMP/chat.jsonl", *SHORT], "no chat template"),
    (
        "prompts that are all too long",
        ["grpo", "--model", "BASE", "--dataset", "TMP/prompts.jsonl", "--reward", "length", "--max_prompt_length", "2", *SHORT],
        "all 2 prompts have more than max_prompt_length 2 tokens, the shortest 5; raise it",
    ),
    (
        "no length",
        ["grpo", "--model", "BASE", "--dataset", "TMP/prompts.jsonl", "--reward", "length", "--max_prompt_length", "0", *SHORT],
        "--max_prompt_length must be a whole number at least 1 and at most 1,000,000, or null, but is 0",
    ),
    (
        "an end token that is none",
        ["sft", "--model", "BASE", "--dataset", "TMP/text.jsonl", "--eos_token", "<|end|>", *SHORT],
        "eos_token '<|end|>' is no token of",
    ),
    (
        "a prompt that a system ends",
        ["grpo", "--model", "TMP/plain", "--dataset", "TMP/system.jsonl", "--reward", "length", *SHORT],
        "row 0: a prompt ends with the role 'system'",
    ),
]  # fmt: skip


def prepare(tmp: pathlib.Path, base: str) -> None:
    """A model's folder for every template, and the files of rows."""
    for name, (template, _) in {**TEMPLATES, "plain": (PLAIN, "")}.items():
        shutil.copytree(base, tmp / name)
        (tmp / name / "chat_template.jinja").write_text(template, encoding="utf-8")
    write = lambda name, *rows: (tmp / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
    )
    write("chat", {"messages": CHAT})
    write("text", {"text": "so"}, {"text": "É"})
    write("prompts", {"prompt": "1+1="}, {"prompt": "1+1+1="})
    write("system", {"prompt": [SAY("system", "so")]})
    for name, (row, _) in ROWS.items():
        write(name, {"messages": CHAT}, row)
