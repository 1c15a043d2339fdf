"""Chat templates in the formats of well-known models; what they write, put together by hand; and a tokenizer."""

# ruff: noqa: S106 - a token is no password
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from backbones import save_tiny_causal_tokenizer
from transformers import AutoTokenizer

Parts = list[tuple[str, bool]]  # texts, and whether the assistant has to write them

CHATML = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA_3 = """\
{%- for message in messages %}{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + \
message['content'] | trim + '<|eot_id|>' %}{%- if loop.index0 == 0 %}{%- set content = bos_token + content %}\
{%- endif %}{{ content }}{%- endfor %}\
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """\
{{- bos_token }}{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}\
{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}\
{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}\
{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"""

GEMMA = """\
{{ bos_token }}{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}\
{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"""

QWEN = """\
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}\
{%- if tools %}{{- '<|im_start|>system\\n' + system + '\\n\\n# Tools\\n\\n<tools>' }}\
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}\
{%- else %}{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%- endif %}\
{%- for message in messages %}\
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}\
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}\
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}\
{%- for call in message.tool_calls %}{%- set call = call.function if call.function is defined else call %}\
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\\n</tool_call>' }}\
{%- endfor %}{{- '<|im_end|>\\n' }}\
{%- elif message.role == 'tool' %}\
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}\
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}\
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}\
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As Qwen3's: turns before the last question lose their thinking, and the last turn always has some.
THINKING = """\
{%- set ns = namespace(last=-1) %}\
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
{%- for message in messages %}{%- set content = message.content %}{%- set thinking = '' %}\
{%- if message.role == 'assistant' and '</think>' in content %}\
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}\
{%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or thinking) %}\
{{- '<|im_start|>assistant\\n<think>\\n' + thinking + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}\
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

PHI = """\
{%- for message in messages %}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- '<|endoftext|>' }}{%- endif %}"""

# CHATML with the assistant's part marked.
MARKED = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}\
{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\
{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Turns end with a line, and the generation prompt ends within a token.
PLAIN = """\
{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

# The system's text stands before the last question alone.
MOVING = """\
{%- for message in messages %}{%- if message.role == 'user' %}{{- '[INST] ' }}\
{%- if loop.index0 + 2 >= messages | length %}{{- messages[0].content + ' ' }}{%- endif %}\
{{- message.content + ' [/INST]' }}\
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"""


def _every_turn(begin: str, end: str, after: str, trim: bool = False, **names: str) -> Callable[..., Parts]:
    """Turns of one form; ``begin`` has the role in braces, ``names`` replace those of roles."""

    def parts(messages: list[dict[str, Any]], tools: Any = None) -> Parts:
        found: Parts = []
        for message in messages:
            role = message["role"]
            found.append((begin.format(names.get(role, role)), False))
            text = message["content"].strip() if trim else message["content"]
            found += [(text + end, role == "assistant"), (after, False)]
        return found

    return parts


def _qwen(messages: list[dict[str, Any]], tools: Any = None) -> Parts:
    system = messages[0]["content"] if messages[0]["role"] == "system" else "You are a helpful assistant."
    if tools:
        system += "\n\n# Tools\n\n<tools>" + "".join("\n" + json.dumps(tool) for tool in tools) + "\n</tools>"
    parts = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            texts = [message["content"]] if message["content"] else []
            for call in message.get("tool_calls") or []:
                texts.append(f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>")
            parts.append(("<|im_start|>assistant\n", False))
            parts += [("\n".join(texts) + "<|im_end|>", True), ("\n", False)]
        elif message["role"] == "user":
            parts.append((f"<|im_start|>user\n{message['content']}<|im_end|>\n", False))
        elif message["role"] == "tool":
            first = messages[number - 1]["role"] != "tool"
            last = number + 1 == len(messages) or messages[number + 1]["role"] != "tool"
            text = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            parts.append(("<|im_start|>user" * first + text + "<|im_end|>\n" * last, False))
    return parts


def _mistral(messages: list[dict[str, Any]], tools: Any = None) -> Parts:
    parts = [("<s>", False)]
    for message in messages:
        answer = message["role"] == "assistant"
        parts.append((f" {message['content']}</s>" if answer else f"[INST] {message['content']} [/INST]", answer))
    return parts


def _around(before: str, parts: Callable[..., Parts], after: str) -> Callable[..., Parts]:
    return lambda messages, tools=None: [(before, False), *parts(messages, tools), (after, False)]


_chatml = _every_turn("<|im_start|>{}\n", "<|im_end|>", "\n")
_llama = _every_turn("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "", trim=True)
_gemma = _every_turn("<start_of_turn>{}\n", "<end_of_turn>", "\n", trim=True, assistant="model")

BY_HAND: dict[str, tuple[str, Callable[..., Parts]]] = {
    "ChatML": (CHATML, _chatml),
    "Llama 3": (LLAMA_3, _around("<s>", _llama, "")),
    "Mistral": (MISTRAL, _mistral),
    "Gemma": (GEMMA, _around("<s>", _gemma, "")),
    "Qwen": (QWEN, _qwen),
    "Phi": (PHI, _around("", _every_turn("<|{}|>\n", "<|end|>", "\n"), "<|endoftext|>")),
    "marked": (MARKED, _chatml),
    "plain": (PLAIN, _every_turn("{}: ", "\n", "")),
}
"""Name → a template and, by hand, the parts of what it renders for turns (and tools)."""

SYSTEM_REFUSED = ("Mistral", "Gemma")

_TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
]


def save_chat_tokenizer(folder: str | Path, template: str | None = None) -> str:
    """A tokenizer that puts ``<s>`` before texts and knows the special tokens of all these templates."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_causal_tokenizer(folder, add_bos=True, pad_token="<pad>"))
    tokenizer.add_tokens(_TOKENS, special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokens_of(tokenizer: Any, parts: Parts) -> tuple[list[int], list[bool]]:
    """Tokens of what the assistant writes and of what is between, each by itself, and whether they are the former."""
    ids, trained = [], []
    for own, run in groupby(parts, key=lambda part: part[1]):
        new = tokenizer("".join(text for text, _ in run), add_special_tokens=False)["input_ids"]
        ids += new
        trained += [own] * len(new)
    return ids, trained
