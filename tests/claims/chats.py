"""200 chats at once that share a system prompt, with prefix reuse and without: `python tests/claims/chats.py`.

Writes docs/evidence/chats.md: how long they took, the two servers by turns, and whether each answer is the one made
alone.
"""

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import openai

from parallax.config import TransformerConfig
from parallax.tokenizers.plain import ByteTokenizer
from tests.parallax.serving.server import serving, write_run

CHATS, ROUNDS, SYSTEM_TOKENS, ANSWER_TOKENS = 200, 2, 500, 8
PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "chats.md"
CONFIG = TransformerConfig(
    vocab_size=257, embed_dim=192, num_layers=6, num_heads=6, num_kv_heads=3, head_dim=32, mlp_dim=512,
    max_seq_len=1024, tie_embeddings=False,
)  # fmt: skip
FLAGS = ("--capacity", "1024", "--context", "extend", "--slots", "16", "--chat-template", "plain")


def messages(number: int) -> Any:
    system = ("You are a patient guide to the museums of the town. " * 20)[:SYSTEM_TOKENS]
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Visitor {number} asks where room {number * 7 % 90} is."},
    ]


async def answer(client: openai.AsyncOpenAI, model: str, number: int) -> str:
    done = await client.chat.completions.create(
        model=model, messages=messages(number), max_tokens=ANSWER_TOKENS, seed=number, temperature=0.7
    )
    return done.choices[0].message.content or ""


async def ask_all(address: str, model: str, at_once: int) -> tuple[float, list[str]]:
    """Seconds, and the answers."""
    gate = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=3600, max_retries=0) as client:

        async def one(number: int) -> str:
            async with gate:
                return await answer(client, model, number)

        began = time.perf_counter()
        answers = await asyncio.gather(*(one(number) for number in range(CHATS)))
        return time.perf_counter() - began, answers


def main() -> None:
    seconds: dict[str, list[float]] = {"reused": [], "read again": []}
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "museum", ByteTokenizer(), CONFIG)
        with serving(run, *FLAGS) as fast, serving(run, *FLAGS, "--prefix-tokens", "0") as slow:
            _, alone = asyncio.run(ask_all(slow.address, slow.model, 1))
            for _ in range(ROUNDS):
                for name, server in (("reused", fast), ("read again", slow)):
                    took, answers = asyncio.run(ask_all(server.address, server.model, CHATS))
                    seconds[name].append(took)
                    different += sum(one != other for one, other in zip(answers, alone, strict=True))
            reused = fast.gauge("prompt_tokens_reused")
    ratios = [slow / fast for fast, slow in zip(*seconds.values(), strict=True)]
    rows = [f"| {name} | {' | '.join(f'{each:.1f}' for each in took)} |" for name, took in seconds.items()]
    rounds = [f"round {number + 1}" for number in range(ROUNDS)]
    lines = [
        f"# {CHATS} chats at once with a shared system prompt",
        "",
        f"Written by `python tests/claims/chats.py`: {CONFIG.num_params():,} parameters of random weights on",
        f"{os.cpu_count()} CPU cores, a system prompt of {SYSTEM_TOKENS} tokens, answers of at most {ANSWER_TOKENS},",
        "16 slots. Seconds, the two servers by turns:",
        "",
        f"| the shared beginning is | {' | '.join(rounds)} |",
        f"| --- | {' | '.join(['---'] * ROUNDS)} |",
        *rows,
        "",
        f"{min(ratios):.1f} times as fast at least. Of {2 * ROUNDS * CHATS} answers {different} differed from the one",
        f"made alone. {reused:.0f} tokens of prompts were not read again.",
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
