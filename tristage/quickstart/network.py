"""The quickstart's tokenizer and networks: ordinary Hugging Face objects, small enough to train on one core.

A token is a word with the space after it ("Name ", "four "), a list separator (", "), a full stop or a line break, so
that an item is one and the same token anywhere in an answer, and joining the tokens gives the text back:

    "Human: " "Name " "four " "fruits" "." "\\n" "Assistant: " | "fig" ", " "pear" "." "<eos>"

The bar is where the prompt ends. No token reaches across it, so a prompt and an answer tokenised apart and
concatenated equal the whole conversation tokenised at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
MAX_POSITIONS = 128
TOKEN = r"\w+:? ?|, ?|[^\w,]"

# The answer's last token is its EOS and nothing follows it, so that the rendered conversation is exactly the generation
# prompt, the answer and EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this template knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the chat template set, knowing the tokens of `texts` and of the template.

    Text made of those tokens survives decode(encode(text)) unchanged; any other piece becomes <unk>. <bos> exists
    because some tools ask for it; the template does not use it. pad_is_eos makes EOS the pad token too, as many
    published models do.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(special_tokens=[PAD, EOS, BOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(["Human: \nAssistant: ", *texts], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=EOS if pad_is_eos else PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_network(
    tokenizer: PreTrainedTokenizerFast, architecture: str = "llama", size: str = "small", seed: int = 0
) -> PreTrainedModel:
    """An untrained causal language model in float32: about 0.7 million parameters ("small") or 136 thousand ("tiny").

    "llama" has rotary positions and RMSNorm; "opt" and "gpt2" have learned absolute positions and LayerNorm. All tie
    their embeddings and have no dropout. The same seed gives the same weights and leaves the global generator as it
    was.
    """
    config = _network_config(tokenizer, architecture, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _network_config(tokenizer: PreTrainedTokenizerFast, architecture: str, size: str) -> PretrainedConfig:
    if size not in ("small", "tiny"):
        raise ValueError(f"size must be small or tiny, not {size!r}")
    hidden, num_layers, num_heads = (128, 4, 4) if size == "small" else (64, 2, 2)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if architecture == "llama":
        return LlamaConfig(
            **common,
            initializer_range=hidden**-0.5,
            hidden_size=hidden,
            intermediate_size=hidden * 2 if size == "small" else hidden * 3,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=MAX_POSITIONS,
            attention_dropout=0.0,
            tie_word_embeddings=True,
        )
    if architecture == "opt":
        return OPTConfig(
            **common,
            init_std=hidden**-0.5,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=hidden * 3 if size == "small" else hidden * 5,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            layerdrop=0.0,
            tie_word_embeddings=True,
        )
    if architecture == "gpt2":
        return GPT2Config(
            **common,
            initializer_range=hidden**-0.5,
            n_embd=hidden,
            n_inner=hidden * 3 if size == "small" else hidden * 5,
            n_layer=num_layers,
            n_head=num_heads,
            n_positions=MAX_POSITIONS,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            summary_first_dropout=0.0,
            tie_word_embeddings=True,
        )
    raise ValueError(f"architecture must be llama, opt or gpt2, not {architecture!r}")
