"""What most tests share: a tiny random target whose output is no mere loop, a tokenizer, and helpers around them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specauf.data.dataset import TokenDataset
from specauf.drafter.config import DFlashConfig
from specauf.target import Target

torch.set_num_threads(1)
hypothesis.settings.register_profile("any-machine", deadline=None)  # no test is a stopwatch
hypothesis.settings.load_profile("any-machine")


def make_target(vocab: int = 61, hidden: int = 32, layers: int = 6, seed: int = 0, scale: float = 3.0) -> Target:
    """Weights scaled up so that the output depends on the context; the two highest ids never occur in prompts."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=vocab - 1,
            bos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=True,
        )
    )
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    return Target(model, None, "tiny")


def make_talker(tokenizer: PreTrainedTokenizerFast, layers: int = 6, seed: int = 0) -> Target:
    """Ends some answers soon, others not within a dozen tokens, and never says what the tokenizer cannot."""
    target = make_target(vocab=len(tokenizer) + 8, layers=layers, seed=seed)
    target.tokenizer = tokenizer
    bias = torch.zeros(len(tokenizer) + 8)
    bias[len(tokenizer) :] = bias[0] = -1e4
    bias[tokenizer.eos_token_id] = 2.5
    target.head_bias = bias
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = tokenizer.eos_token_id
    return target


def make_geometry(
    target: Target, block_size: int = 5, layers: int = 2, taps: int = 2, draft_vocab_size: int | None = None
) -> DFlashConfig:
    return DFlashConfig.for_target(
        target.config,
        block_size=block_size,
        num_hidden_layers=layers,
        mask_token_id=target.config.vocab_size - 2,
        num_taps=taps,
        draft_vocab_size=draft_vocab_size,
    )


@pytest.fixture(scope="session")
def target() -> Target:
    return make_target()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 58, (n,), generator=generator).tolist() for n in (3, 7, 5, 12, 1, 9, 4, 6)]


def make_dataset(rows: list[tuple[int, list[int], list[bool]]], meta: dict[str, object] | None = None) -> TokenDataset:
    """A dataset from rows of (uid, tokens, supervised?) in plain lists."""
    return TokenDataset.from_rows(
        [(uid, torch.tensor(ids, dtype=torch.int32), torch.tensor(m, dtype=torch.uint8)) for uid, ids, m in rows],
        meta or {},
    )


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "user assistant system question answer",
    "0123456789 café",
    "x\n\n",
    "x\n  y",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    text = backend.to_str()

    def make(template: str | None = CHATML) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>")
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "in", "two", "green", "trees"]


def write_world(
    root: Path, tokenizer: PreTrainedTokenizerFast, conversations: int, words: int, tasks: Mapping[str, int]
) -> Path:
    """Write what a command reads: `target`, `chat.jsonl`, and `tasks/` with three prompts of `tasks[name]` turns per task."""
    target = make_target(vocab=len(tokenizer) + 8)
    target.model.config.eos_token_id = target.model.generation_config.eos_token_id = tokenizer.eos_token_id
    target.model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    rng = random.Random(0)

    def text(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    with (root / "chat.jsonl").open("w") as file:
        for i in range(conversations):
            said = [{"from": who, "value": text(words)} for who in ("human", "gpt", "human", "gpt")]
            file.write(json.dumps({"id": f"c{i}_0", "conversations": said}) + "\n")
    (root / "tasks").mkdir()
    for name, turns in tasks.items():
        rows = [{"id": f"{name}/{i}", "turns": [text(words // 2) for _ in range(turns)]} for i in range(3)]
        (root / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
