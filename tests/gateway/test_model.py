"""The text side of a checkpoint, and tokenizing without holding up the loop."""

import asyncio
import dataclasses
import json

import pytest

from gateway.api.body import encode
from gateway.model import load_model
from moering.errors import CheckpointError
from tests.gateway.harness import run
from tests.tiny import write_checkpoint


@pytest.fixture
def path(tmp_path):
    return write_checkpoint(tmp_path / "model-x", layers=1, experts=2)


def test_what_it_reads(path):
    model = load_model(path)
    assert (model.name, model.context_tokens, model.vocab_size, model.eos_ids) == ("model-x", 4096, 320, (2,))
    assert model.special_ids == {0, 1, 2}
    assert load_model(path, "other", 100).context_tokens == 100


def test_a_template_file_wins_over_the_field(path):
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content | tojson }}")
    template = load_model(path).template
    assert template is not None
    assert template.render([{"role": "user", "content": "ü"}], True, {}) == '<|im_start|>"ü"'


def test_without_a_template_or_generation_config(path):
    (path / "generation_config.json").unlink()
    (path / "tokenizer_config.json").unlink()
    model = load_model(path)
    assert model.template is None and model.eos_ids == (2,)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_file_that_is_missing_or_broken_is_named(path, file, content):
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        load_model(path)


def test_a_context_beyond_the_models_is_refused(path):
    with pytest.raises(CheckpointError, match=r"5000 tokens; .*config\.json allows 4096"):
        load_model(path, context_tokens=5000)


def test_a_template_that_does_not_parse_is_refused(path):
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{% if %}"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the chat template does not parse"):
        load_model(path)
    (path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: the chat template does not parse") as e:
        load_model(path)
    assert "\n" not in str(e.value)


def test_a_template_that_is_no_text_is_refused(path):
    (path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        load_model(path)


@pytest.mark.parametrize("value", ["2", [2, None], 2.5])
def test_an_end_of_text_that_is_no_id_is_refused(path, value):
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load_model(path)


def test_the_loop_turns_while_a_long_prompt_is_tokenized(model):
    async def main():
        wide, text = dataclasses.replace(model, max_prompt_chars=1 << 30), "hello world " * 20_000
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        counter = asyncio.create_task(count())
        ids = await encode(wide, text, "prompt", True)
        counter.cancel()
        assert turns > 100, "the tokenizer kept the interpreter to itself"
        assert ids == model.tokenizer.encode(text).ids

    run(main())
