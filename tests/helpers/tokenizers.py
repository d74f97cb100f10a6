"""Tokenizers that a test can read: a token per byte or per word, with the default template or one of those below."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tristage.data.template import DEFAULT_TEMPLATE, ensure_template

HI = [{"role": "user", "content": "Hi"}]
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    *HI,
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The assistant's header, written whenever it speaks, is neither the generation prompt's nor in the tags.
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '(calm)' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As templates of models that think: what an answer thought is left out once the user speaks again.
FORGETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q:' + m['content'] }}{% else %}"
    "{{ 'A:' + (m['content'] if loop.last else m['content'].split('</think>')[-1]) + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def byte_tokenizer(eos: str = "</s>", adds_bos: bool = False, **special) -> PreTrainedTokenizerFast:
    """One token a byte, so that any text comes back; special tokens as asked."""
    names = list(dict.fromkeys([eos, "<s>", "<|im_start|>", *special.values()]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(names)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token="<s>", **special)


def default(**options) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(**options)
    ensure_template(tokenizer)
    return tokenizer


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(eos="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Ids 0 [UNK], 1 </s>, then the words; a word "<s>" is its BOS, which the template puts in front."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = "<s>" if "<s>" in words else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]", bos_token=bos)
    tokenizer.chat_template = "{{ bos_token }}" * (bos is not None) + DEFAULT_TEMPLATE
    return tokenizer
