"""A tokenizer.json here and in transformers: equal ids of text and of conversations, from the files
that runs bring."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: run `make test-peer`"
)

from experiments.data import chat  # noqa: E402
from experiments.data.tokenizer import make_tokenizer  # noqa: E402
from tests.experiments import tokenizers as made  # noqa: E402

# as models' own settings write these formats, in short
JINJA = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "{{ '\\n\\n' + m['content'] | trim }}<|eot_id|>{% endfor %}",
    "llama2": "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}{% if m['role'] "
    "== 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first %}"
    "{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ m['content'] | trim + ' [/INST]' }}{% else %}{{ m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
}
SPECIAL = {
    "chatml": {"special": made.MARKED, "eos_token": "<|endoftext|>"},
    "llama3": {
        "special": (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "eos_token": "<|end_of_text|>",
        "bos_token": "<|begin_of_text|>",
    },
    "llama2": {"special": ("<s>", "</s>"), "eos_token": "</s>", "bos_token": "<s>"},
}
TALK = (
    ("system", "be te"),
    ("user", "an\n\nte né"),
    ("assistant", "teane"),
    ("user", "x"),
    ("assistant", "y te"),
)


@pytest.mark.parametrize("name", JINJA)
def test_ids_of_text_and_of_conversations(tmp_path, name):
    # no merge across the beginning of a reply, which is encoded apart here
    own = make_tokenizer(
        made.byte_level(tmp_path / "own", [("t", "e"), ("a", "n")], **SPECIAL[name])
    )
    (tmp_path / "brought").mkdir()
    for file, content in own.files.items():
        (tmp_path / "brought" / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "brought")
    assert (theirs.eos_token_id, len(theirs)) == (own.eos, own.vocabulary_size)
    text = "tean the né\n\n\t<x>"
    assert own.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    assert (
        own.decode(own.encode(text))
        == theirs.decode(theirs.encode(text, add_special_tokens=False))
        == text
    )
    messages = [{"role": role, "content": content} for role, content in TALK]
    expected = theirs.apply_chat_template(
        messages, chat_template=JINJA[name], tokenize=True, return_dict=False
    )
    turns = tuple((role, content.encode()) for role, content in TALK)
    ids, counted = chat.encoded(chat.Conversation(turns), name, own)
    assert ids.tolist() == expected
    assert own.decode(ids[counted]) == "teaney te"
