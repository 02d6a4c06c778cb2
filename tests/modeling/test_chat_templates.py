"""A chat template without its tokenizer renders as the tokenizer does."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from lark_store.errors import CheckpointError
from lark_store.modeling.chat_templates import chat_template_of
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.schema.catalog import Checkpoint

MESSAGES = [{"role": "user", "content": "Is it, é?\n"}, {"role": "assistant", "content": " yes"}]
TEMPLATES = {
    "simple": "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "spaced": "{%- for m in messages %}\n    {%- if m.role == 'user' %}\n{{ bos_token }}{{ m.content }}\n    "
    "{%- else %}\n        {%- generation %}\n{{ m.content }}\n        {%- endgeneration %}\n    {%- endif %}\n"
    "{%- endfor %}\n",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0] | tojson }}{{ date_string }}",
    "loop": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "prompting": "{{ messages[0].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "refusing": "{{ raise_exception('only users') }}",
}


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["base"], tmp_path / "model")


def render(tokenizer):
    try:
        return tokenizer.apply_chat_template(MESSAGES, tokenize=False, date_string="26 Jul 2024")
    except Exception as error:  # noqa: BLE001  # a template's own
        return repr(error)


@pytest.mark.parametrize("form", ["file", "config", "named"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_like_the_tokenizer(folder, name, form):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}
    config.pop("chat_template", None)
    if form == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    else:
        template = TEMPLATES[name]
        others = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        config["chat_template"] = template if form == "config" else others
    path.write_text(json.dumps(config))
    light = chat_template_of(Checkpoint(name="base", path=str(folder), revision=None))
    assert render(light) == render(AutoTokenizer.from_pretrained(folder))
    assert Renderer(make_variant("v", "chatml", "auto", 8), light).own_chat


def test_a_checkpoint_without_files_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        chat_template_of(Checkpoint(name="gone", path=str(tmp_path / "gone"), revision=None))


@pytest.mark.parametrize("is_text", [True, False])
def test_a_template_that_cannot_be_read_is_an_error(folder, monkeypatch, is_text):
    path = folder / "chat_template.jinja"
    path.write_bytes(b"a" if is_text else b"\xff")
    read = type(path).read_text

    def refuse(self, **options):
        if self.name == path.name and is_text:
            raise PermissionError("not yours")
        return read(self, **options)

    monkeypatch.setattr(type(path), "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"chat_template.jinja` can't be read: "):
        chat_template_of(Checkpoint(name="base", path=str(folder), revision=None))
