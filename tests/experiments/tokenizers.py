"""Tokenizers so small that their ids can be written down."""

import io
import json

MARKED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save(folder, tokenizer, **settings):
    """`folder`/tokenizer.json, and its settings where there are any; the path."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder / "tokenizer.json")


def byte_level(folder, merges=(), special=MARKED, words=(), prefix=False, **settings):
    """A byte-level BPE as a file: byte b is id b, merge i is 256 + i, then special tokens, then
    added words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # the others follow, in order, from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
    vocabulary = {letter[byte]: byte for byte in range(256)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(word, special=False) for word in words])
    return save(folder, tokenizer, **settings)


def sentencepiece(path, **options):
    """A SentencePiece model with bytes for unknown letters, as a file."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog sat on the log"] * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return str(path)
