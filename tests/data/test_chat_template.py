"""Conversations written by chat templates: the text that transformers writes, and in it the assistant's turns."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import jinja2
import pytest
from codes import raises_code
from made_tokenizers import END, MARKED, PLAIN, SPECIAL, THINKING, made_tokenizer
from tokenizers import Tokenizer

from swarmtrain.data.chat_template import ChatTemplate
from swarmtrain.data.template_process import TemplateError, TemplateProcess
from swarmtrain.errors import RunFileError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "well"},
    {"role": "user", "content": "and the sun?"},
    {"role": "assistant", "content": "it shines"},
    {"role": "user", "content": "thanks"},
]


def written(template: str, messages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return each text of a conversation, and what of it the assistant wrote."""
    texts = ChatTemplate(template, SPECIAL).write(messages)
    return [(text, [text[begin:end] for begin, end in spans]) for text, spans in texts]


@pytest.mark.parametrize(("template", "newline"), [(PLAIN, "\n"), (MARKED, "")])
def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(template: str, newline: str) -> None:
    ((text, turns),) = written(template, CHAT)
    assert turns == [f"well{END}{newline}", f"it shines{END}{newline}"]
    assert text.startswith("<|system|>Be brief.") and "thanks" not in text, "what nobody answers teaches nothing"
    assert written(template, CHAT[:2]) == [] and len(written(template, CHAT[:3])) == 1


def test_where_a_template_writes_earlier_turns_otherwise_each_turn_is_a_text_in_which_it_is_the_last() -> None:
    first, second = written(THINKING, CHAT)
    assert first[1] == [f"<think></think>well{END}\n"] and first[0].endswith(first[1][0])
    assert second[1] == [f"<think></think>it shines{END}\n"] and f"<|assistant|>well{END}" in second[0]
    ((text, turns),) = written(THINKING, CHAT[:3])
    assert turns == [f"<think></think>well{END}\n"] and "Be brief." in text


def test_a_conversation_may_begin_with_the_assistant() -> None:
    chat = [{"role": "assistant", "content": "hello"}]
    assert written(PLAIN, chat) == [(f"<|assistant|>hello{END}\n", [f"hello{END}\n"])]
    strict = "{% if messages[0].role == 'tool' %}{% endif %}" + PLAIN
    assert written(strict, chat) == [(f"<|assistant|>hello{END}\n", [f"<|assistant|>hello{END}\n"])]


def test_a_template_that_answers_otherwise_than_it_asks_is_refused() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    with pytest.raises(jinja2.exceptions.TemplateError, match="as it asks for one"):
        ChatTemplate(template, {}).write(CHAT)


TEMPLATES = {
    "plain": PLAIN,
    "marked": MARKED,
    "thinking": THINKING,
    "whitespace": "{%- for m in messages %}\n  {{- m.role }}: {{ m['content'] | trim }}\n{% endfor %}",
    "filters": "{{ messages | tojson(indent=1) }}{{ messages[0].content.upper() | replace('B', '<') }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ bos_token }}"
    "{{ m.content }}{% endfor %}{{ pad_token }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    (expected,), _ = render([CHAT], chat_template=TEMPLATES[name], **SPECIAL)
    marked = ChatTemplate(TEMPLATES[name], SPECIAL)._rendered(CHAT)
    assert marked.replace("\ud800", "").replace("\udbff", "") == expected


def test_tokens_and_targets_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    made = made_tokenizer(MARKED)
    library = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made.bundle.tokenizer_json), **SPECIAL
    )
    wanted = library.apply_chat_template(
        CHAT[:5], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    ((text, spans),) = ChatTemplate(MARKED, SPECIAL).write(CHAT)
    tokens, is_target = made.encode_spans(text, spans)
    assert tokens.tolist() == wanted["input_ids"] and is_target.tolist() == [bool(x) for x in wanted["assistant_masks"]]


# ---------------------------------------------------------------- a stranger's program


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}{{ self.__init__.__globals__.os }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_what_is_not_its_business_is_refused(template: str) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError):
        ChatTemplate(template + PLAIN, SPECIAL).write([dict(message) for message in CHAT])


def test_every_peer_has_the_same_date() -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    assert ChatTemplate(template, SPECIAL)._rendered(CHAT).startswith("26 Jul 2024<|system|>")


def test_its_process_writes_one_conversation_after_the_other_and_survives_what_it_refuses() -> None:
    refuses = "{% if messages[0].role == 'tool' %}{{ raise_exception('no\ntools') }}{% endif %}"
    with TemplateProcess(refuses + PLAIN, SPECIAL) as process:
        assert process.write(CHAT) == [tuple(each) for each in ChatTemplate(PLAIN, SPECIAL).write(CHAT)]
        with pytest.raises(TemplateError, match="no"):
            process.write([{"role": "tool", "content": "x"}, *CHAT])
        assert process.write([{"role": "assistant", "content": "é ☃"}])[0][0] == f"<|assistant|>é ☃{END}\n"
        child = process._process
    assert child is not None and child._process.poll() is not None, "it ends with the block"


@pytest.mark.parametrize(
    ("template", "limit_s"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", 0.2),
        ("{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", 10.0),
    ],
    ids=["time", "memory"],
)
def test_a_template_that_takes_too_much_is_ended(template: str, limit_s: float) -> None:
    process = TemplateProcess(PLAIN + template, SPECIAL, limit_s, memory_bytes=128 << 20)
    with process, pytest.raises(TemplateError, match="takes more"):
        process.write(CHAT)


def test_its_process_ends_by_itself_when_its_peer_was_killed() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    task = {"template": endless, "special_tokens": {}, "memory_bytes": 128 << 20, "limit_s": 0.1}
    lines = "".join(json.dumps(each) + "\n" for each in (task, {"messages": CHAT}))
    ended = subprocess.run(
        [sys.executable, "-m", "swarmtrain.data.template_process"], input=lines.encode(), timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGALRM


def test_a_template_that_is_none_is_one_line() -> None:
    with raises_code("bad-chat-template", RunFileError, "model.tokenizer"), TemplateProcess("{% for %}", {}) as process:
        process.write(CHAT)
