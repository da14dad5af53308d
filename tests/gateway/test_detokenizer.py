"""Text that comes token by token equals the text of the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from gateway.detokenizer import ByteLevelDetokenizer, WindowDetokenizer, byte_pieces


def pieces(detokenizer, ids) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def sentencepiece() -> Tokenizer:
    """Like Mixtral's: words with a leading ▁, and bytes for what the vocabulary lacks."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁", "cat", "▁cat", "é", "▁世", "s"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def test_byte_level_equals_the_whole_for_any_ids(model):
    @given(st.lists(st.integers(0, 319), max_size=30), st.booleans())
    def check(ids, skip):
        text = "".join(pieces(model.detokenizer(skip), ids))
        assert text == model.tokenizer.decode(ids, skip_special_tokens=skip)

    assert isinstance(model.detokenizer(True), ByteLevelDetokenizer)
    check()


@given(st.text(max_size=20))
def test_byte_level_never_sends_half_a_code_point(text):
    alphabet = byte_pieces_of_alphabet()
    ids = [alphabet.index(bytes([b])) for b in text.encode("utf-8", "replace")]
    out = pieces(ByteLevelDetokenizer(alphabet, frozenset()), ids)
    assert "".join(out) == text.encode("utf-8", "replace").decode()
    assert out[-1] == ""


def byte_pieces_of_alphabet() -> list[bytes]:
    return [bytes([b]) for b in range(256)]


def test_byte_pieces_follow_the_library(model):
    table = byte_pieces(model.tokenizer)
    for token_id in range(320):
        whole = model.tokenizer.decode([token_id], skip_special_tokens=False)
        assert table[token_id].decode("utf-8", "replace") == whole


WORDS = st.sampled_from([1, 2, 259, 260, 261, 262, 263, 264, 265])
EMOJI = [3 + b for b in "🎉".encode()]


@given(st.lists(st.one_of(WORDS.map(lambda w: [w]), st.just(EMOJI)), max_size=12))
def test_sentencepiece_equals_the_whole(groups):
    tokenizer = sentencepiece()
    ids = [i for group in groups for i in group]
    out = pieces(WindowDetokenizer(tokenizer, frozenset({1, 2})), ids)
    assert "".join(out) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in out)


def test_sentencepiece_holds_back_until_a_code_point_is_complete():
    out = pieces(WindowDetokenizer(sentencepiece(), frozenset()), [259, *EMOJI, 265])
    assert out == ["the", "", "", "", "🎉", "s", ""]


@pytest.mark.parametrize("broken", [[3 + 0xF0] * 40, [3 + 0xE4, 3 + 0xB8]])
def test_bytes_that_never_become_text_come_out_as_replacements(broken):
    out = "".join(pieces(WindowDetokenizer(sentencepiece(), frozenset()), broken))
    assert out == "\ufffd" * len(broken)
