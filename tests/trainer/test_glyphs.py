"""The task: known answers, known need of a tool, splits that never meet."""

import numpy as np
import pytest

from trainer.chat import find_call
from trainer.tasks import load_task
from trainer.tasks.glyphs import base, scene, tools
from trainer.tasks.glyphs.demonstrations import Script, call_for
from trainer.tasks.glyphs.questions import KINDS, draft
from trainer.tasks.glyphs.world import BEACONS, OLD_BEACONS, split_of
from trainer.tools import FunctionTool
from trainer.types import Observation, Session


def test_the_mix_is_a_distribution_with_both_needs():
    assert sum(kind.share for kind in KINDS.values()) == pytest.approx(1)
    needed = sum(kind.share for kind in KINDS.values() if kind.needs_tool)
    assert needed == pytest.approx(0.64)


def test_the_mix_holds_among_any_few_questions_in_a_row():
    kinds = [draft("train", n).question.kind for n in range(400)]
    for name, kind in KINDS.items():
        for start in range(0, 400, 25):
            assert abs(kinds[start : start + 25].count(name) - 25 * kind.share) < 2
        assert abs(kinds.count(name) - 400 * kind.share) < 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_is_a_function_of_split_and_index(kind):
    first, again = draft("train", 7, kind), draft("train", 7, kind)
    assert first.question.text == again.question.text
    assert first.question.images[0].tobytes() == again.question.images[0].tobytes()
    other = draft("heldout", 7, kind)
    assert first.question.images[0].tobytes() != other.question.images[0].tobytes()
    assert first.question.kind == kind
    assert first.question.needs_tool is KINDS[kind].needs_tool
    assert first.question.id != other.question.id


@pytest.mark.parametrize("kind", ["product_hard", "fact_search", "emblem"])
def test_train_and_heldout_never_ask_about_the_same_thing(kind):
    def key(fact):
        return fact[0] * 100 + fact[1] if isinstance(fact, tuple) else fact

    for split in ("train", "heldout"):
        assert {split_of(key(draft(split, n, kind).fact)) for n in range(60)} == {split}


def test_what_is_searched_for_is_not_what_is_known():
    known = {draft("heldout", n, "fact_known").fact for n in range(200)}
    searched = {draft("heldout", n, "fact_search").fact for n in range(200)}
    assert known <= set(OLD_BEACONS) and searched <= set(BEACONS)


def test_a_small_digit_is_lost_in_the_overview_and_clear_in_a_crop():
    """The need of a tool is in the pixels: two small digits differ by far more than the noise at
    full resolution, and by less than a few times of it once the picture is shrunk."""
    one, eight = scene.FONT[1], scene.FONT[8]
    ink = (one - eight).__abs__().sum() ** 0.5  # distance in ink, one pixel a dot
    contrast = 220.0
    full = contrast * ink / scene.NOISE
    shrunk = contrast * ink / 16 / (scene.NOISE / 4)  # a pixel is the mean of 16
    assert full > 25 and shrunk < full / 3.9


@pytest.fixture(scope="module")
def toolbox():
    return tools.toolbox(failures=0.0, distractions=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tool_tells_the_answer(toolbox, kind, run):
    """Played with reliable tools, every demonstration's observation holds the answer."""
    for index in range(5):
        one = draft("heldout", index, kind)
        script = Script(one, np.random.default_rng(index))
        text = "".join(piece for piece, _ in script.next_turn(None))
        session = Session(list(one.question.images), seed=index)
        call, observation = run(toolbox.execute(find_call(text), session))
        assert observation.status == "ok", observation
        assert call.name == call_for(one)[0]
        if kind.startswith("glyph"):
            assert observation.images[0].size == (32, 32)
        else:
            assert one.question.answer in observation.text
        last = "".join(piece for piece, _ in script.next_turn(observation))
        assert last.endswith(f"<answer>{one.question.answer}</answer>")


def test_a_script_calls_again_when_the_tool_was_busy():
    one = draft("train", 3, "fact_search")
    script = Script(one, np.random.default_rng(0))
    script.next_turn(None)
    busy = Observation("Error: the tool is busy, try again.", status="tool_error")
    for _ in range(2):
        assert find_call("".join(t for t, _ in script.next_turn(busy)))
    assert script.calls == 3
    last = "".join(t for t, _ in script.next_turn(busy))
    assert find_call(last) is None


def test_a_wrong_guess_is_context_and_a_right_one_a_lesson():
    one = draft("train", 3, "glyph_medium")
    right = 0
    for seed in range(100):
        pieces = Script(one, np.random.default_rng(seed)).next_turn(None)
        untrained = [text for text, trained in pieces if not trained]
        assert one.question.answer not in untrained
        right += not untrained
        whole = "".join(text for text, _ in pieces)
        assert whole.startswith("<reason>It may be ") and "<tool_call>" in whole
    assert 45 < right < 75


@pytest.mark.parametrize(
    "said", ["7", "1776", '1. "Beacon 12 shines Red."', '1. "Emblem of Hale."']
)
def test_unreliable_tools_fail_and_mislead_at_the_stated_rates(run, said):
    def tell() -> str:
        """Say it."""
        return said

    tool = tools.Unreliable(FunctionTool(tell), failures=0.25, distractions=0.25)

    def play():
        return [run(tool.call(Session([], seed=seed, calls=1))) for seed in range(400)]

    seen = play()
    failed = sum(one.status == "tool_error" for one in seen)
    wrong = [one.text for one in seen if one.status == "ok" and one.text != said]
    assert 0.18 < failed / 400 < 0.32 and 0.18 < len(wrong) / 400 < 0.32
    assert {len(text) for text in wrong} == {len(said)} or not said.isdigit()
    assert seen == play(), "luck is a function of the seed and the number of the call"


def test_a_demonstration_that_its_tool_contradicts_is_no_lesson():
    from trainer.types import Question, Rollout, Turn

    def fault(text, status="ok", formatted=True):
        question = Question("q", "k", "?", (), "Red")
        turns = [Turn("call", None, Observation(text)), Turn("answer")]
        rollout = Rollout(question, 0, [], [], [], [], 0, turns, status, formatted=formatted)
        return load_task("glyphs").fault(rollout)

    assert fault('1. "Beacon 12 shines Blue."') == "contradicted"
    assert fault('1. "Beacon 12 shines Red."') is None
    assert fault("") is None, "a picture"
    assert fault("", formatted=False) == "format"
    assert fault("Red", status="tool_infra") == fault("Red", "tool_infra", False) == "tool_infra"


def test_demonstrations_nearly_always_call():
    task = load_task("glyphs")
    questions, scripts = task.demonstrations(seed=0, count=600, direct_share=0.05)
    direct = [q.kind for q, s in zip(questions, scripts, strict=True) if s.direct]
    assert 0.01 < len(direct) / len(questions) < 0.05
    assert not {"glyph_small", "product_hard", "fact_search", "emblem"} & set(direct)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="there is no task 'chess'"):
        load_task("chess")


def test_the_base_model_has_the_tokenizer_that_its_recipe_makes(vlm):
    """Whoever changes a prompt, a template or a wording has to make the base model again. (The
    order of the pieces is that of their counts, and so of the mix: it does not matter.)"""
    made = base.learn_tokenizer(base.texts_of_the_task(tools.toolbox()), base.VOCABULARY)
    assert set(made.get_vocab()) == set(vlm.tokenizer.get_vocab())
    assert made.chat_template == vlm.tokenizer.chat_template
