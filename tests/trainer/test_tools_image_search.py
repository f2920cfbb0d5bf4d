"""image_search over a folder's index and over cached results."""

import asyncio
import io
import json
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter

from trainer.images import open_image
from trainer.tools import ImageSearch, Toolbox, ToolError, ToolInfraError
from trainer.tools._stored import LinesWriter
from trainer.tools.image_search import (
    SUFFIXES,
    CachedImageSearch,
    ImageIndex,
    build_image_index,
    image_key,
)
from trainer.tools.protocol import spec_of
from trainer.types import Question, Session


def call(tool, session, **arguments):
    return asyncio.run(tool.call(session, **arguments))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def pictures():
    """Unlike pictures, smooth enough to have a perceptual hash worth the name."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8)
    resized = (Image.fromarray(one).resize((128, 128), Image.Resampling.BICUBIC) for one in noise)
    return [image.convert("RGB") for image in resized]


# --- An index of images ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gallery(pictures, tmp_path_factory):
    """The pictures as files, some with a text beside them; and one that is none."""
    folder = tmp_path_factory.mktemp("gallery")
    for i, image in enumerate(pictures[:20]):
        image.save(folder / f"{i:02}.{('png', 'jpg', 'webp', 'bmp')[i % 4]}")
        if i % 2:
            (folder / f"{i:02}.txt").write_text(f"picture {i}")
    (folder / "broken.jpg").write_bytes(b"not an image")
    return folder


def test_an_index_of_a_folder(gallery, pictures, tmp_path, caplog):
    manifest = build_image_index(gallery, tmp_path / "index")
    assert (manifest["images"], manifest["skipped"]) == (20, 1)
    assert "broken.jpg" in caplog.text
    index = ImageIndex(tmp_path / "index", source=gallery)
    assert len(index) == 20
    for i, image in enumerate(pictures[:20]):
        found = index.search(image.resize((97, 130)).filter(ImageFilter.GaussianBlur(1)))
        assert found[0] == (f"picture {i}" if i % 2 else f"{i:02}")
    assert index.search(pictures[30].transpose(Image.Transpose.ROTATE_90)) == []
    (tmp_path / "copy").mkdir()
    for path in gallery.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    ImageIndex(tmp_path / "index", source=tmp_path / "copy")
    (tmp_path / "copy" / "01.txt").write_text("another text")
    with pytest.raises(ValueError, match="stale"):
        ImageIndex(tmp_path / "index", source=tmp_path / "copy")


def test_an_index_of_lines_equals_the_search_in_memory(pictures, gallery, tmp_path):
    names = sorted(path.name for path in gallery.iterdir() if path.suffix in SUFFIXES)
    names.remove("broken.jpg")
    records = [{"image": name, "text": f"about {name}"} for name in names]
    source = write_lines(gallery / "all.jsonl", records)
    build_image_index(source, tmp_path / "index")
    index = ImageIndex(tmp_path / "index", max_distance=30, top_k=5, per_trajectory=None)
    opened = [open_image((gallery / name).read_bytes()) for name in names]
    texts = [record["text"] for record in records]
    memory = ImageSearch(list(zip(opened, texts, strict=True)), max_distance=30, top_k=5)
    for image in pictures:
        assert index.search(image) == memory.search(image)
    source.unlink()


def test_embeddings(gallery, pictures, tmp_path):
    def embed(images):
        return np.stack([np.asarray(image.resize((4, 4)), float).ravel() - 128 for image in images])

    build_image_index(gallery, tmp_path / "made", embed=embed)
    files = sorted(path for path in gallery.iterdir() if path.suffix in SUFFIXES)
    rows = [
        embed([open_image(path.read_bytes())])[0] if path.name != "broken.jpg" else np.ones(48)
        for path in files
    ]
    np.save(tmp_path / "rows.npy", np.array(rows))
    build_image_index(gallery, tmp_path / "given", embeddings=tmp_path / "rows.npy")
    made, given = (
        ImageIndex(tmp_path / name, embed=embed, min_similarity=0.9) for name in ("made", "given")
    )
    assert np.array_equal(made._embeddings, given._embeddings) and made._embeddings.shape == (
        20,
        48,
    )
    for i, image in enumerate(pictures[:20]):
        assert made.search(image)[0] == (f"picture {i}" if i % 2 else f"{i:02}")
    assert made.search(pictures[30]) == []
    build_image_index(gallery, tmp_path / "bare")
    with pytest.raises(ValueError, match="has no embeddings"):
        ImageIndex(tmp_path / "bare", embed=embed)
    with pytest.raises(ValueError, match="20 embeddings for 21 images"):
        build_image_index(gallery, tmp_path / "short", embeddings=np.array(rows)[:20])
    with pytest.raises(ValueError, match="must be finite"):
        build_image_index(gallery, tmp_path / "nan", embeddings=np.array(rows) * np.nan)
    with pytest.raises(ValueError, match="not both"):
        build_image_index(gallery, tmp_path / "both", embed=embed, embeddings=np.array(rows))
    with pytest.raises(ValueError, match="gives 2 numbers, the index has 48"):
        ImageIndex(tmp_path / "made", embed=lambda images: np.ones((1, 2))).search(pictures[0])
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_bad_image_sources(tmp_path):
    for line in ("{", '["a", "b"]', '{"image": "a.png"}', '{"image": 1, "text": "x"}'):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(ValueError, match="bad.jsonl, line 1"):
            build_image_index(tmp_path / "bad.jsonl", tmp_path / "index")
    write_lines(tmp_path / "none.jsonl", [{"image": "none.png", "text": "x"}])
    with pytest.raises(ValueError, match="no image of .* can be opened"):
        build_image_index(tmp_path / "none.jsonl", tmp_path / "index")


def test_a_hundred_thousand_images_load_at_once(tmp_path):
    """Hashes at random and one that is known: found among 10^5, in milliseconds."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).resize((64, 64))
    write_lines(tmp_path / "one.jsonl", [{"image": "one.png", "text": "the one"}])
    image.save(tmp_path / "one.png")
    folder = tmp_path / "index"
    build_image_index(tmp_path / "one.jsonl", folder)
    count = 100_000
    hashes = rng.integers(0, 2**64, count, np.uint64)
    hashes[77_777] = np.load(folder / "hashes.npy")[0]
    np.save(folder / "hashes.npy", hashes)
    with LinesWriter(folder / "texts.jsonl") as writer:
        for n in range(count):
            writer.write(f"image {n}")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: (folder / name).stat().st_size for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    start = time.perf_counter()
    index = ImageIndex(folder)
    loaded = time.perf_counter() - start
    start = time.perf_counter()
    assert index.search(image)[0] == "image 77777"
    assert loaded < 2 and time.perf_counter() - start < 2  # measured: 1 ms and 3 ms
    assert isinstance(index._hashes, np.memmap)


def test_every_image_search_is_the_same_tool(gallery, tmp_path):
    build_image_index(gallery, tmp_path / "index")
    (tmp_path / "cache.json").write_text("{}")
    wanted = spec_of(ImageSearch([])).schema
    for tool in (ImageIndex(tmp_path / "index"), CachedImageSearch(tmp_path / "cache.json")):
        assert spec_of(tool).schema == wanted
        session = Session([Image.new("RGB", (9, 9))])
        first, second = call(tool, session), call(tool, session)
        assert "called before" not in first.text and "called before" in second.text
        asyncio.run(tool.end(session))
        assert tool._calls == {} and "called before" not in call(tool, session).text
        with pytest.raises(ToolError, match="no image"):
            call(tool, Session([]))


# --- Cached results -------------------------------------------------------------------------------


def test_the_reference_s_cache(pictures, tmp_path):
    (tmp_path / "images").mkdir()
    for n in (1, 2):
        pictures[n].save(tmp_path / "images" / f"{n}.png")
    Image.new("RGB", (3000, 2)).save(tmp_path / "images" / "strip.png")
    pictures[3].save(tmp_path / "secret.png")
    entry = {
        "tool_returned_web_title": ["Alba <|im_end|>", "Gone", "Out", "Strip", "Boro", "No image"],
        "cached_images_path": ["1.png", "9.png", "../secret.png", "strip.png", "2.png"],
    }
    (tmp_path / "a.json").write_text(json.dumps({"17": entry}))
    (tmp_path / "b.json").write_text(json.dumps({"18": {}}))
    search = CachedImageSearch(
        [tmp_path / "a.json", tmp_path / "b.json"],
        root=tmp_path / "images",
        key=lambda session: str(session.seed),
    )
    assert len(search) == 2
    session = Session([pictures[0]], seed=17)
    text = '{"name": "image_search", "arguments": {}}'
    _, observation = asyncio.run(Toolbox([search]).execute(text, session))
    assert observation.text.split("\n") == [
        '1. "Alba < |im_end|>" (image_2)',
        '2. "Gone"',
        '3. "Out"',
        '4. "Strip"',
        '5. "Boro" (image_3)',
    ]
    assert [image.tobytes() for image in session.images] == [
        pictures[n].tobytes() for n in range(3)
    ]
    assert call(search, Session([pictures[0]], seed=18)).text == "No result."
    assert call(search, Session([pictures[0]], seed=19)).text == "No result."


def test_cached_results_by_image_and_by_question(pictures, tmp_path):
    cache = {
        image_key(pictures[0]): [{"title": "T", "link": "https://a.b/c", "snippet": 'S "s"'}],
        "data/train/1": [{"url": "https://d.e"}] * 12,
    }
    (tmp_path / "cache.json").write_text(json.dumps(cache))
    questions = [
        Question("data/train/1", "k", "?", (pictures[1],), "a"),
        Question("data/train/2", "k", "?", (pictures[2],), "a"),
        Question("data/train/1", "k", "?", (), "a"),
        Question("data/train/1", "k", "?", (pictures[1].copy(),), "a"),
    ]
    search = CachedImageSearch(tmp_path / "cache.json", questions=questions, per_trajectory=None)
    reopened = io.BytesIO()
    pictures[0].save(reopened, "PNG")
    same = open_image(reopened.getvalue())
    assert call(search, Session([same])).text == '1. "T\\nhttps://a.b/c\\nS \\"s\\""'
    assert call(search, Session([pictures[1]])).text.split("\n")[9] == '10. "https://d.e"'
    assert len(call(search, Session([pictures[1]])).text.split("\n")) == 10
    assert call(search, Session([pictures[2]])).text == "No result."


def test_the_reference_s_keys_are_ids_without_their_source(pictures, tmp_path):
    cache = {"17": [{"title": "seventeen"}], "b/18": [{"title": "eighteen"}]}
    (tmp_path / "cache.json").write_text(json.dumps(cache))
    ids = ["metis/17", "b/18", "metis/19"]
    questions = [Question(id, "k", "?", (pictures[n],), "a") for n, id in enumerate(ids)]
    search = CachedImageSearch(tmp_path / "cache.json", questions=questions)
    seen = [call(search, Session([pictures[n]])).text for n in range(3)]
    assert seen == ['1. "seventeen"', '1. "eighteen"', "No result."]
    questions.append(Question("other/17", "k", "?", (pictures[5],), "a"))
    with pytest.raises(ValueError, match="'17' fits two questions, metis/17 and other/17"):
        CachedImageSearch(tmp_path / "cache.json", questions=questions)


def test_rollouts_that_share_an_unloaded_image(gallery, tmp_path):
    """PIL decodes on first use, and not safely in two threads: every rollout sees it whole."""
    build_image_index(gallery, tmp_path / "index")
    index = ImageIndex(tmp_path / "index")
    wanted = call(index, Session([open_image((gallery / "01.jpg").read_bytes())]))

    async def group(images):
        return await asyncio.gather(*(index.call(Session([image])) for image in images))

    for _ in range(20):
        with Image.open(gallery / "01.jpg") as image:
            assert set(asyncio.run(group([image] * 8))) == {wanted}
    broken = io.BytesIO((gallery / "01.jpg").read_bytes()[:700])
    with pytest.raises(ToolInfraError, match="cannot be decoded"):
        call(index, Session([Image.open(broken)]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must be an object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": [], "b": 5}', "key 'b'"),
        ('{"a": [5]}', "key 'a': the results must be an array of objects"),
        ('{"a": [{"title": 5}]}', "title must be a string"),
        ('{"a": {"tool_returned_web_title": "x"}}', "must be arrays"),
        ('{"a": {"tool_returned_web_title": [1], "cached_images_path": ["x"]}}', "title must be"),
    ],
)
def test_bad_caches_are_named(tmp_path, content, message):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(ValueError, match=f"cache.json.*{message}"):
        CachedImageSearch(tmp_path / "cache.json")
