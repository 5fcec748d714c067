"""Incremental text and stop strings: the pieces, however they are cut, are the text."""

from __future__ import annotations

import random

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvjax.errors import RequestError
from kvjax.generate.stopping import StopStrings, TextStream, borders, truncate_tokens

CORPUS = [
    "def find(self, key):\n    return self.table.get(key, None)  # nothing found\n",
    "the quick brown fox jumps over the lazy dog, and the dog did not mind at all",
    "größer naïve café 😀 日本語 text in many scripts",
] * 3


def byte_level() -> Tokenizer:
    """256 single bytes and one special token: every character beyond ASCII takes several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    """Merges of bytes, some of which end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece-like: the space before the first word is not part of the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<end>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's decoder: words of letters, and byte tokens for everything else, the newline included; ~ has no text."""
    vocab = {"<unk>": 0, "<end>": 1, "~": 2}
    for name in [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcdefghijklmnopqrstuvwxyz") + ["▁t", "▁th"]:
        vocab[name] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "t"), ("▁t", "h")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.Replace("~", ""),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<end>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """Words joined by spaces, ## continuing one, punctuation drawn to what precedes it."""
    words = ["[UNK]", "the", "dog", "did", "not", "mind", ",", ".", "n't", "do", "##ing", "##s", "##t"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {f.__name__: f() for f in (byte_level, byte_level_bpe, metaspace, byte_fallback, word_piece)}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
spelling_tokenizers = pytest.mark.parametrize(
    "tokenizer", [TOKENIZERS[name] for name in ("byte_level", "byte_level_bpe", "byte_fallback")]
)

many = hypothesis.settings(max_examples=150, deadline=None)
texts = st.text(st.sampled_from("the dog\n😀👩‍🚀é日\ufffd,.") | st.characters(codec="utf-8"), max_size=60)


def cut(items, seed: int) -> list:
    """The same items in pieces of random length, empty ones among them."""
    generator, pieces, start = random.Random(seed), [], 0
    while start < len(items):
        length = generator.choice([0, 1, 1, 2, 3, 7, 40])
        pieces.append(items[start : start + length])
        start += length
    return pieces


# ---------------------------------------------------------------------------------------------- text from tokens


@every_tokenizer
@many
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**32))
def test_pieces_of_any_tokens_joined_equal_the_decoded_whole(tokenizer, data, seed):
    """Any tokens, also such as are no text: broken characters, special tokens, ids beyond the vocabulary."""
    size = tokenizer.get_vocab_size()
    favourites = data.draw(st.lists(st.integers(0, size + 2), min_size=1, max_size=6))
    tokens = data.draw(st.lists(st.integers(0, size + 2) | st.sampled_from(favourites), max_size=120))
    stream = TextStream(tokenizer)
    pieces = [stream.push(piece) for piece in cut(tokens, seed)]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)


@every_tokenizer
@many
@hypothesis.given(text=texts, seed=st.integers(0, 2**32))
def test_pieces_of_a_text_joined_equal_the_decoded_whole_and_never_show_half_a_character(tokenizer, text, seed):
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(tokens)
    stream, shown = TextStream(tokenizer), ""
    for piece in cut(tokens, seed):
        shown += stream.push(piece)
        assert whole.startswith(shown)
    assert shown + stream.finish() == whole


def test_a_character_over_several_tokens_comes_with_its_last_one():
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode("a😀é.").ids]
    assert pieces == ["a", "", "", "", "😀", "", "é", "."]
    assert not stream.holding


def test_a_run_of_byte_tokens_comes_with_the_token_after_it():
    """One wrong byte would turn the whole run into U+FFFD, so none of it is certain before."""
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = [tokenizer.token_to_id(name) for name in ("▁", "a", "<0xC3>", "<0xA9>", "b", "<0x0A>")]
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in tokens] == ["", "a", "", "", "éb", ""]
    assert stream.holding
    assert stream.finish() == "\n"
    assert TextStream(tokenizer).push(tokens) == "aéb"


@pytest.mark.parametrize("count", [7, 16, 40])
def test_the_space_behind_many_tokens_without_text_is_not_taken_for_the_first_of_a_text(count):
    tokenizer = TOKENIZERS["byte_fallback"]
    the, dog = (tokenizer.encode(word).ids for word in ("the", "dog"))
    stream = TextStream(tokenizer)
    shown = "".join(stream.push([token]) for token in [*the, *[tokenizer.token_to_id("~")] * count, *dog])
    assert shown == "the dog"


def test_a_stream_starts_anew_after_finish():
    tokenizer = TOKENIZERS["metaspace"]
    tokens = tokenizer.encode("the dog").ids
    stream = TextStream(tokenizer)
    assert [stream.push(tokens) + stream.finish() for _ in range(2)] == ["the dog", "the dog"]


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def decode(self, tokens):
        self.decoded += len(tokens)
        return self._tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("byte_level", "😀" * 500),
        ("byte_level", "the dog did. " * 150),
        ("byte_level_bpe", "größer 日本語 😀 " * 80),
        ("metaspace", "the dog " * 250),
        ("byte_fallback", "日" * 600 + " the dog" * 40),
        ("byte_level", "\x00" * 500),
    ],
)
def test_the_work_grows_linearly_with_the_tokens(name, text):
    tokens = TOKENIZERS[name].encode(text).ids
    assert len(tokens) >= 500
    for silent in ([], [0] * 500):  # the first token of each is special: it has no text
        counting = Counting(TOKENIZERS[name])
        truncate_tokens(silent + tokens, counting, ("never there",))
        # At most 4 * WINDOW = 32 tokens are decoded for one, and as many again, twice per window, to cut it back.
        assert counting.decoded < 40 * len(tokens)


@pytest.mark.parametrize("byte", [0x80, 0xC3, 0xFF, 0xF0])
def test_endless_broken_bytes_take_linear_work_too(byte):
    tokenizer = TOKENIZERS["byte_level"]
    alphabet = {tokenizer.decode([t]): t for t in range(257)}
    broken = next(t for t in range(1, 257) if bytes_of(tokenizer.id_to_token(t)) == bytes([byte]))
    tokens = [alphabet["a"], *[broken] * 600]
    counting = Counting(tokenizer)
    stream = TextStream(counting)
    pieces = [stream.push([token]) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert counting.decoded < 40 * len(tokens)


def bytes_of(name: str) -> bytes:
    """The bytes a byte-level token stands for: printable ones stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(ord(c) if ord(c) < 256 else others[ord(c) - 256] for c in name)


# ---------------------------------------------------------------------------------------------- stop strings

# Two letters, so that stop strings overlap themselves and each other.
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops) -> tuple[str, str | None]:
    """By definition: the earliest end of any stop string; at equal ends the longest."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@many
@hypothesis.given(st.text("abc", max_size=60), stop_lists, st.integers(0, 2**32))
@hypothesis.example("aaab", ["aab"], 0)
@hypothesis.example("cabab", ["b", "ab", "abab"], 0)
def test_the_first_stop_string_ends_the_text_however_it_is_cut(text, stops, seed):
    watch, shown = StopStrings(stops), ""
    for piece in cut(text, seed):
        shown += watch.push(piece)
        assert first_stop(text, stops)[0].startswith(shown)
    shown += watch.finish()
    assert (shown, watch.found) == first_stop(text, stops)


@many
@hypothesis.given(st.text("abc", max_size=30), stop_lists)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text, stops):
    hypothesis.assume(first_stop(text, stops)[1] is None)
    watch = StopStrings(stops)
    shown = "".join(watch.push(character) for character in text)
    held = text[len(shown) :]
    longest = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
    assert len(held) == longest


def test_nothing_follows_a_stop_string():
    watch = StopStrings(("\n\n",))
    assert [watch.push(p) for p in ("a\n", "b\n", "\nc", "d")] == ["a", "\nb", "", ""]
    assert watch.found == "\n\n"
    assert watch.finish() == ""


@pytest.mark.parametrize("stop", ["end", ("",), (3,)])
def test_stop_strings_that_mean_nothing_are_refused(stop):
    with pytest.raises(RequestError, match="non-empty strings"):
        StopStrings(stop)


@many
@hypothesis.given(st.text("ab", max_size=12))
def test_borders_are_the_longest_proper_prefixes_that_are_suffixes(pattern):
    for length, border in enumerate(borders(pattern), 1):
        prefix = pattern[:length]
        assert border == max(n for n in range(length) if prefix.endswith(prefix[:n]))


# ---------------------------------------------------------------------------------------------- tokens up to a stop


@spelling_tokenizers
@many
@hypothesis.given(data=st.data(), before=texts, after=texts)
def test_the_fewest_tokens_whose_text_has_the_stop_string_are_kept(tokenizer, data, before, after):
    stop = data.draw(st.sampled_from(["\n", "the", "😀é", "日\n", " dog.", "x😀"]))
    tokens = tokenizer.encode(before + stop + after).ids
    stops = (stop, "dog dog dog")
    fewest = next(n for n in range(len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    kept = truncate_tokens(tokens, tokenizer, stops)
    assert kept.tokens == tokens[:fewest]
    assert kept.text == tokenizer.decode(tokens)[: tokenizer.decode(tokens).index(stop)]
    assert kept.stop == stop


@every_tokenizer
@many
@hypothesis.given(text=texts)
def test_without_a_stop_string_nothing_is_cut(tokenizer, text):
    tokens = tokenizer.encode(text).ids
    for stops in ((), ("\x00never",)):
        assert truncate_tokens(tokens, tokenizer, stops) == (tokens, tokenizer.decode(tokens), None)


def test_a_newline_as_byte_token_ends_the_tokens_itself():
    """Its text is certain only with the next token, but the token is not needed."""
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = tokenizer.encode("the\ndog").ids
    newline = tokenizer.token_to_id("<0x0A>")
    for given in (tokens, tokens[: tokens.index(newline) + 1]):
        kept = truncate_tokens(given, tokenizer, ("\n",))
        assert kept.tokens[-1] == newline
        assert (kept.text, kept.stop) == ("the", "\n")
