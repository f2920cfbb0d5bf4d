"""The base model: a tiny Qwen3-VL that can read, add and remember, and knows no tools.

    python -m trainer.tasks.glyphs.base --out trainer/tasks/glyphs/base

makes the folder `base/` beside this file: tokenizer, configuration and weights. The demo starts
from it.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from metis_kernels import linear_cross_entropy
from trainer.batch import pack
from trainer.chat import find_answer, find_call, system_prompt, turn_text
from trainer.engines.hf import HFEngine
from trainer.model import IMAGE_TOKEN, VisionLanguageModel
from trainer.optimizer import optimizer_step
from trainer.rollout import Player
from trainer.tasks.glyphs import scene, tools
from trainer.tasks.glyphs.demonstrations import Script
from trainer.tasks.glyphs.questions import BOARD_SHARES, KINDS, draft
from trainer.tasks.glyphs.world import (
    BEACONS,
    COLOURS,
    EMBLEMS,
    OLD_BEACONS,
    OWNERS,
    emblem_note,
    passage,
    world,
)
from trainer.tools import Toolbox
from trainer.tools.text_search import numbered
from trainer.types import Question, Rollout, Session, TrainingError

FOLDER = Path(__file__).parent / "base"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
)
_SQUARE = r"[a-d][1-4]"
_VALUE = r"[A-Z][a-z]+(?=[.<\"])"
_TAG = r"</?answer>"
_ROLE = r"(?:system|user|assistant)\n"
PIECE = rf"{_ROLE}|{_SQUARE}|\d|{_TAG}|{_VALUE}|(?:(?!{_SQUARE}|{_TAG}|{_VALUE})\D)+"
"""What may become one token: a role, a square, a digit, an answer tag, a capitalised word that ends
a phrase (a colour, an owner), or whatever stands between those, however long: so a fixed phrase,
and even most of the system prompt, is one token, and a trajectory has about 100 tokens instead of
1,000. The choice between <answer> and <tool_call> is one token."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for item in message.content -%}"
    "{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{- item.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


VOCABULARY = 448
INK = scene.INK | {"medium": 0.6}
"""Of the lessons: a little clearer than the questions, so that there is something to learn from."""


def learn_tokenizer(texts: list[str], size: int):
    """A tokenizer whose vocabulary is the most frequent pieces of the texts, and every byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    count = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for byte in alphabet:
        count.pop(byte, None)
    # Frequent first; long pieces tie-broken by text so that the result is a function of the texts.
    pieces = sorted(count, key=lambda piece: (-count[piece], piece))
    pieces = pieces[: size - len(SPECIAL) - len(alphabet)]
    # A whole piece must always win against its bytes: one unit of cost each.
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(byte, -10.0) for byte in alphabet] + [(piece, -1.0) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def texts_of_the_task(toolbox: Toolbox, count: int = 1000) -> list[str]:
    """What stands between special tokens in this task: prompts, turns, lessons, and what the real
    tools answer."""
    return asyncio.run(_texts(toolbox, count))


async def _texts(toolbox: Toolbox, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    prompts = [f"system\n{system_prompt(s)}" for s in (toolbox.schemas(), ())]
    texts = [*prompts, *(f"{role}\n" for role in ("system", "user", "assistant")), "\n"] * count
    async with toolbox:
        for index in range(count):
            one = draft("train", index)
            script = Script(one, rng)
            session = Session(list(one.question.images), seed=index)
            observation = None
            texts.append(one.question.text)
            while True:
                text = "".join(piece for piece, _ in script.next_turn(observation))
                texts.append(text)
                call = find_call(text)
                if call is None:
                    break
                _, observation = await toolbox.execute(call, session)
                texts.append(observation.text)
            await toolbox.end(session)
            texts += [text for turn in lesson_turns(rng)[1] for text in turn]
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    return [piece for text in texts for piece in special.split(text)]


def config(vocabulary: int):
    """Qwen3-VL with under a million parameters; 16 tokens an image of 32 x 32 pixels."""
    from transformers import Qwen3VLConfig

    hidden, head = 128, 32
    ids = {token: index for index, token in enumerate(SPECIAL)}
    tokens = dict(pad_token_id=0, bos_token_id=0, eos_token_id=ids["<|im_end|>"])
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head,
            max_position_embeddings=2048,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            tie_word_embeddings=True,
            **tokens,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=1,
            out_hidden_size=hidden,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        **tokens,
    )


def new_model(tokenizer) -> VisionLanguageModel:
    """Fresh weights. transformers' std of 0.02 leaves a model this narrow at chance for hundreds
    of steps; 1/sqrt(fan_in), halved where a branch meets the residual stream, learns at once."""
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen3VLForConditionalGeneration(config(len(tokenizer)))
    outputs = ("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            std = weight[0].numel() ** -0.5
            if "embed_tokens" in name:
                std = 0.05
            elif "pos_embed" in name:
                std = 0.3
            elif "merger" not in name and any(output in name for output in outputs):
                std *= 0.5
            weight.normal_(0, std)
    side = scene.SIDE // 4
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": side * side, "longest_edge": side * side},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return VisionLanguageModel(model, tokenizer, processor)


def lesson_turns(rng: np.random.Generator) -> tuple[Image, list[tuple[str, str]]]:
    """One lesson without tools: a picture, and questions with the answers of a model that knows
    what it can and cannot tell."""
    shape = rng.random()
    # Half of the boards have large digits alone: what is legible is what teaches to read.
    board = scene.draw_board(rng, {"large": 1.0} if rng.random() < 0.5 else BOARD_SHARES, INK)
    image, turns = board.image, []
    if shape < 0.28:  # A crop: the digit is alone, and clear whatever its size.
        board = scene.draw_board(rng, {size: 1 / 3 for size in scene.SCALES}, INK)
        row, column = (int(n) for n in rng.integers(0, scene.GRID, 2))
        answer = str(board.digit[row, column])
        image = board.image.crop(scene.box(row, column))
        turns = [("Which digit is shown?", turn_text("Now I know.", answer=answer))]
    elif shape < 0.32:
        image = scene.draw_emblem(world().emblem[rng.integers(EMBLEMS)], rng)
        turns = [("Who owns this emblem?", _direct("emblem", ""))]
    elif shape < 0.85:
        turns = [("Read the board.", _transcript(board, rng))]
    on_board = board if image is board.image else None
    for _ in range(4 if turns else 7):
        luck = rng.random()
        if luck < 0.25:
            turns.append(_told(rng))
        elif luck < 0.5:
            turns.append(_exercise(rng))
        else:
            turns.append(_lesson(rng, on_board))
    return image, turns


def _transcript(board: scene.Board, rng: np.random.Generator) -> str:
    """Every square in a random order: dense supervision of reading, clear, doubtful, or none.

    The mark follows the square's own token at once. With a token in between the model would have
    to learn a second hop of attention first, and stays at chance for hundreds of steps."""
    marks = []
    for cell in rng.permutation(scene.GRID**2):
        row, column = divmod(int(cell), scene.GRID)
        size, digit = board.size[row, column], board.digit[row, column]
        mark = {"large": f"{digit}", "medium": f"{digit}?", "small": "?"}[size]
        marks.append(f"{scene.name(row, column)}{mark}")
    return turn_text(", ".join(marks), answer="read")


def _lesson(rng: np.random.Generator, board: scene.Board | None) -> tuple[str, str]:
    """A question and what the model can say to it from sight, arithmetic or memory."""
    kinds = ["sum_easy", "fact_known", "fact_search", "product_hard", "glyph"]
    shares = np.array([0.2, 0.2, 0.2, 0.05, 0.0 if board is None else 0.6])
    kind = str(rng.choice(kinds, p=shares / shares.sum()))
    if kind == "glyph":
        row, column = (int(n) for n in rng.integers(0, scene.GRID, 2))
        kind = f"glyph_{board.size[row, column]}"
        text = f"Which digit is in square {scene.name(row, column)}?"
        answer = str(board.digit[row, column])
    elif kind == "sum_easy":
        a, b = (int(n) for n in rng.integers(0, 10, 2))
        text, answer = f"What is {a} + {b}?", str(a + b)
    elif kind == "product_hard":
        a, b = (int(n) for n in rng.integers(11, 100, 2))
        text, answer = f"What is {a} * {b}?", str(a * b)
    else:
        number = int(rng.choice(OLD_BEACONS if kind == "fact_known" else BEACONS))
        text, answer = f"Which colour has beacon {number}?", world().colour[number]
    return text, _direct(kind, answer)


def _direct(kind: str, answer: str) -> str:
    """An answer from sight, arithmetic or memory, in words that say how sure it is.

    Not in all the words of the cold start: there a guess ends in "?", and a model that has learned
    here to answer behind that mark goes on to guess (LOG.md).
    """
    if kind in ("glyph_large", "sum_easy", "fact_known"):
        return turn_text(f"It is {answer}.", answer=answer)
    if kind == "glyph_medium":
        return turn_text(f"It may be {answer}.", answer=answer)
    return turn_text("I do not know.", answer="unknown")


def _told(rng: np.random.Generator) -> tuple[str, str]:
    """Reading with understanding: a question after the text that answers it, or does not."""
    shape, helps = rng.random(), rng.random() < 0.8
    if shape < 0.5:
        number, other = (int(n) for n in rng.choice((*OLD_BEACONS, *BEACONS), 2, replace=False))
        answer = str(rng.choice(COLOURS))
        text = numbered([passage(number if helps else other, answer)])
        question = f"Which colour has beacon {number}?"
    elif shape < 0.75:
        answer = str(rng.choice(OWNERS))
        text, question, helps = numbered([emblem_note(answer)]), "Who owns this emblem?", True
    else:
        a, b = (int(n) for n in rng.integers(11, 100, 2))
        answer = str(int(rng.integers(0, 10_000)))
        text, question, helps = answer, f"What is {a} * {b}?", True
    thought = "Now I know." if helps else "That did not help."
    return f"{text}\n{question}", turn_text(thought, answer=answer if helps else "unknown")


def _exercise(rng: np.random.Generator) -> tuple[str, str]:
    """Where a square is, in pixels, and repeating what is said: what a call is later made of."""
    shape = rng.random()
    if shape < 0.6:
        row, column = (int(n) for n in rng.integers(0, scene.GRID, 2))
        question = f"Where is square {scene.name(row, column)}?"
        answer = ", ".join(map(str, scene.box(row, column)))
    else:
        a, b = (int(n) for n in rng.integers(0 if shape < 0.7 else 11, 100, 2))
        sign = "+" if shape < 0.75 else "*"
        answer = f"{a} {sign} {b}" if shape < 0.85 else f"beacon {rng.choice(BEACONS)}"
        question = f"Repeat {answer}."
    return question, turn_text("Now I know.", answer=answer)


def encode_lesson(vlm: VisionLanguageModel, image: Image, turns: list[tuple[str, str]]) -> Rollout:
    """The lesson as a trajectory; the loss is on the answers."""
    ids = vlm.encode(
        f"<|im_start|>system\n{system_prompt(())}<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{turns[0][0]}<|im_end|>\n",
        [image],
    )
    trained = [False] * len(ids)
    for number, (question, answer) in enumerate(turns):
        pieces = [(f"{answer}<|im_end|>", True), ("\n", False)]
        pieces.insert(0, ("<|im_start|>assistant\n", False))
        if number:
            pieces.insert(0, (f"<|im_start|>user\n{question}<|im_end|>\n", False))
        for text, train in pieces:
            new = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += new
            trained += [train] * len(new)
    question = Question("lesson", "lesson", turns[0][0], (image,), "")
    return Rollout(question, 0, ids, trained, [0.0] * len(ids), [image], 0)


WARMUP, COOLDOWN = 50, 100
"""Steps over which the learning rate rises at first, and falls at the end."""
MAX_LESSON = 1024
"""Tokens of a lesson, at most."""
GUESSED, TOLD = 0.4, 0.82
"""Shares of medium digits, and of questions after a text that answers them, that are answered right
when the end begins."""


def pretrain(vlm: VisionLanguageModel, steps: int, batch: int, lr: float, seed: int) -> None:
    """Trains until the model guesses and listens well enough, then lets the rate fall. The end is a
    skill and not a step, for at which step a model learns to see is luck.

    Raises TrainingError where that has not come about after `steps`.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, last = time.time(), None
    vlm.model.train()
    for step in range(1, steps + 1):
        lessons = [[encode_lesson(vlm, *lesson_turns(rng))] for _ in range(batch)]
        (one,) = pack(vlm, lessons, max_tokens=batch * MAX_LESSON, keep_all=True)
        loss = linear_cross_entropy(one.hidden(vlm), vlm.head, one.packed.label, one.packed.row)
        loss.backward()
        left = 1.0 if last is None else 0.05 + 0.95 * (last - step) / COOLDOWN
        optimizer_step(vlm.model, optimizer, lr * min(1.0, step / WARMUP) * left, 1.0)
        if step % 25 == 0:
            guessed, told = right_by_itself(vlm)["glyph_medium"], right_when_told(vlm)
            print(
                f"{step} loss {loss.item():.3f}, medium digits {guessed:.0%}, told {told:.0%}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
            if last is None and guessed >= GUESSED and told >= TOLD:
                last = step + COOLDOWN
        if step == last:
            return
    raise TrainingError(
        f"after {steps} steps not {GUESSED:.0%} of the medium digits are read right and {TOLD:.0%} "
        "of what is told understood: try another --seed"
    )


def right_when_told(vlm: VisionLanguageModel, count: int = 200) -> float:
    """Share of right answers to questions after a text that answers them, or does not."""
    rng = np.random.default_rng(99)
    sequences, answers = [], []
    for _ in range(count):
        image = scene.draw_board(rng, BOARD_SHARES, INK).image
        question, answer = _told(rng)
        opening = encode_lesson(vlm, image, [(question, "")])
        sequences.append((opening.ids[: opening.policy.index(True)], [image]))
        answers.append(find_answer(answer))
    turns = HFEngine(vlm, temperature=0).generate(sequences, [(0,)] * count, 32)
    said = (find_answer(vlm.tokenizer.decode(turn.ids)) for turn in turns)
    return sum(a == b for a, b in zip(said, answers, strict=True)) / count


def right_by_itself(
    vlm: VisionLanguageModel, kinds: Sequence[str] = ("glyph_medium",), count: int = 100
) -> dict[str, float]:
    """Share of right answers without tools, by kind of question."""
    shares = {}
    with Player(vlm, None) as player:
        for kind in kinds:
            questions = [draft("heldout", n, kind).question for n in range(count)]
            rollouts = player.play(HFEngine(vlm, temperature=0), questions, range(count))
            shares[kind] = sum(rollout.correct for rollout in rollouts) / count
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=1500, help="at most; see pretrain")
    parser.add_argument("--batch", type=int, default=64, help="lessons a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vlm = new_model(learn_tokenizer(texts_of_the_task(tools.toolbox()), VOCABULARY))
    count = sum(weight.numel() for weight in vlm.model.parameters())
    print(f"{count / 1e6:.2f} million parameters, {len(vlm.tokenizer)} tokens")
    pretrain(vlm, args.steps, args.batch, args.lr, args.seed)
    vlm.save(args.out, dtype=torch.bfloat16)
    for kind, share in right_by_itself(vlm, list(KINDS)).items():
        print(f"{kind:13} {share:.0%} right by itself")


if __name__ == "__main__":
    main()
