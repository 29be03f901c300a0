"""A tiny random Llama with its own tokenizer and chat template, for vLLM, transformers and MLX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, THINK_START, THINK_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = (
    "What is three plus four? Three plus four is seven.",
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Write a function that adds two numbers. def add(a, b): return a + b",
    "Rewrite this sentence so that it is shorter and kinder to the reader.",
    "user assistant system teacher student token answer question number because therefore",
    "Grüße aus Köln, naïve café, 東京 and 日本語 need more than one byte for each letter.",
)


def build_tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    vocab_size: int = 384,
    max_position_embeddings: int = 512,
    corpus: Sequence[str] = CORPUS,
    chat_template: str | None = CHAT_TEMPLATE,
    initializer_range: float = 0.35,
) -> Path:
    """Write a checkpoint, tokenizer and generation config, and return the directory.

    Args:
        directory: Created when missing.
        seed: Decides the weights.
        num_layers: Decoder layers.
        hidden_size: A multiple of 64: heads are 32 wide, the narrowest that vLLM takes on a CPU.
        vocab_size: Width of the logits. The tokenizer fills it as far as the corpus gives merges.
        max_position_embeddings: Context, tokens.
        corpus: What the tokenizer's merges are learnt from.
        chat_template: None leaves the model without one.
        initializer_range: Wide, so that the distributions differ clearly between positions.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, vocab_size=vocab_size, corpus=corpus, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
        bos_token_id=SPECIAL_TOKENS.index(TURN_START),
        eos_token_id=SPECIAL_TOKENS.index(TURN_END),
        pad_token_id=SPECIAL_TOKENS.index(END_OF_TEXT),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(directory)
    generation = {
        "bos_token_id": SPECIAL_TOKENS.index(TURN_START),
        "eos_token_id": [SPECIAL_TOKENS.index(TURN_END), SPECIAL_TOKENS.index(END_OF_TEXT)],
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return directory


def write_tokenizer(
    directory: Path, *, vocab_size: int, corpus: Sequence[str] = CORPUS, chat_template: str | None
) -> None:
    """Train a byte-level BPE tokenizer on a few lines and save it as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    # transformers 5 names a class of its own making, which other loaders (MLX, Swift) do not know.
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
