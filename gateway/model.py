"""What the gateway knows of the model: tokenizer, chat template, context length, end-of-text ids. No weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from gateway.chat_template import ChatTemplate
from gateway.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer, byte_pieces
from gateway.errors import bad_request
from moering.errors import CheckpointError

_NORMALIZER_SHRINKS = 4  # characters that a tokenizer's normalizer may make one of
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Model:
    """The text side of a checkpoint."""

    name: str  # what clients call it
    checkpoint_name: str  # its directory's name
    created: int  # seconds since 1970
    context_tokens: int
    vocab_size: int  # of the model's output, which may be larger than the tokenizer's
    eos_ids: tuple[int, ...]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    pieces: list[bytes] | None  # of a byte-level vocabulary
    special_ids: frozenset[int]
    max_prompt_chars: int  # a longer text has more tokens than fit the context, whatever it says

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """A fresh one for one choice."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if self.pieces is not None:
            return ByteLevelDetokenizer(self.pieces, skipped)
        return WindowDetokenizer(self.tokenizer, skipped)

    def encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; a 400 for text that is not valid Unicode."""
        try:
            # Unlike `encode`, this lets other threads run: with it a long prompt held up all streams for seconds.
            encodings = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeError, TypeError) as e:  # lone surrogates, which JSON can carry
            raise bad_request(f"'{param}' is not valid Unicode text", param) from e
        return list(encodings[0].ids)

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens, special ones included."""
        # As with `encode`: of one list alone, the other threads would wait for it.
        return str(self.tokenizer.decode_batch([ids], skip_special_tokens=False)[0])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token by itself, for log-probabilities."""
        if self.pieces is not None:
            return self.pieces[token_id] if token_id < len(self.pieces) else b""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False)).encode()


def load_model(path: str | Path, served_name: str = "", context_tokens: int = 0) -> Model:
    """Read the text side of the checkpoint in directory `path`; raise `CheckpointError` naming the file."""
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory")
    config = _read_json(root / "config.json", required=True)
    text_config = config.get("text_config", config)
    tokenizer = _read_tokenizer(root / "tokenizer.json")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    limit = _integer(text_config.get("max_position_embeddings", 0), "max_position_embeddings", root)
    if context_tokens > limit > 0:
        raise CheckpointError(f"a context of {context_tokens} tokens; {root / 'config.json'} allows {limit}")
    return Model(
        name=served_name or root.resolve().name,
        checkpoint_name=root.resolve().name,
        created=int((root / "config.json").stat().st_mtime),
        context_tokens=context_tokens or limit,
        vocab_size=_integer(text_config.get("vocab_size", tokenizer.get_vocab_size()), "vocab_size", root),
        eos_ids=_eos_ids(root, text_config),
        tokenizer=tokenizer,
        template=_read_template(root),
        pieces=byte_pieces(tokenizer) if isinstance(tokenizer.decoder, ByteLevel) else None,
        special_ids=frozenset(special),
        max_prompt_chars=(context_tokens or limit) * _longest_token_chars(tokenizer) * _NORMALIZER_SHRINKS,
    )


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(f"cannot read {path}: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _longest_token_chars(tokenizer: Tokenizer) -> int:
    return max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _eos_ids(root: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """End-of-text ids: those of generation_config.json, else of config.json."""
    value = _read_json(root / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_integer(i, "eos_token_id", root) for i in ids)


def _integer(value: Any, name: str, root: Path) -> int:
    if type(value) is not int:
        raise CheckpointError(f"{root}: {name} {value!r:.100} is not an integer")
    return value


def _read_template(root: Path) -> ChatTemplate | None:
    """`chat_template.jinja`, else the field in tokenizer_config.json (text, or a list of named ones)."""
    config = _read_json(root / "tokenizer_config.json")
    path, source = root / "tokenizer_config.json", config.get("chat_template")
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    jinja_file = root / "chat_template.jinja"
    if jinja_file.is_file():
        path, source = jinja_file, _read_text(jinja_file)
    if not isinstance(source, str):
        return None
    try:
        return ChatTemplate(source, {name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name)))})
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e


def _token_text(value: Any) -> str:
    """A special token is a string, or a map whose `content` is one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
