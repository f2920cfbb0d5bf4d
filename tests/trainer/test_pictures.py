"""The pictures of a run and of a comparison."""

from __future__ import annotations

from synthetic import NEEDS, check_svg, make_comparison, make_run

from trainer.pictures import SHAPES, write_comparison, write_picture


def test_arms_tell_apart_without_colour():
    assert len(set(SHAPES)) == 7


def test_picture(tmp_path):
    path = write_picture(make_run(tmp_path / "demo"))
    texts = [e.text for e in check_svg(path).iter("{http://www.w3.org/2000/svg}text")]
    assert {*NEEDS, "accuracy", "tool rate", "tool needed", "no tool needed"} <= set(texts)


def test_comparison(tmp_path):
    folder = make_comparison(tmp_path / "compare")
    path = write_comparison(folder)
    root = check_svg(path)
    assert (root.get("width"), root.get("height")) == ("720", "420")
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(t.startswith("HDPO w_tool=0.15, seed") for t in titles) == 3
    assert sum(t.startswith("SFT start") for t in titles) == 3
