"""README.md and docs/: their Python runs, their links lead somewhere, their promises are tested."""

import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import REPOSITORY

import simclr
from models import SimCLR
from system.checkpoint import load_encoder
from system.errors import UserError

PATH = "logs/SimCLR/cifar10/resnet18/simclr_resnet18_epoch1000.pt"
README, DIFFERENCES = REPOSITORY / "README.md", REPOSITORY / "docs" / "differences.md"
PAGES = [README, *sorted(REPOSITORY.glob("docs/*.md"))]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def section(page, title):
    """The text below a heading of the second level."""
    return re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", page.read_text(), re.DOTALL)[1]


def blocks(text):
    """The Python blocks of a text, in their order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(block, names=None):
    """Run a block; returns the names that it defines."""
    names = {} if names is None else names
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.fixture
def place(toy, tmp_path, monkeypatch, write_images):
    """A directory with the checkpoint and the images that the README speaks of."""
    run_dir = (tmp_path / PATH).parent
    run_dir.mkdir(parents=True)
    simclr.pretrain(toy("epochs=1"), run_dir)
    shutil.copy(run_dir / "simclr_resnet18_epoch1.pt", tmp_path / PATH)
    write_images(tmp_path / "my", classes=1, images=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_use_the_encoder_runs_and_they_agree(place):
    """Extraction, torchvision's own ResNet and the exported program give the same h."""
    features, resnet, exported = blocks(section(README, "Use the encoder"))
    names = run(features)
    assert names["h"].shape == (5, 512) == (len(names["files"]), names["feature_dim"])
    assert not names["h"].requires_grad and not names["enc"].training
    h, images = names["h"], names["images"]
    run(exported, run(resnet, names))
    torch.testing.assert_close(names["h"], h, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(names["net"](images / 255), h, atol=1e-5, rtol=1e-4)
    program = torch.export.load(place / "encoder.pt2").module()
    for n in (1, 3, 5):  # any batch
        torch.testing.assert_close(program(images[:n] / 255), h[:n], atol=1e-4, rtol=1e-3)


def test_the_published_checkpoints_load_as_the_docs_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = SimCLR().state_dict()
    torch.save(theirs, "theirs.pt")
    [block] = blocks(DIFFERENCES.read_text())
    loaded = run(block)["model"].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in theirs.items())


def test_load_encoder_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint nowhere\.pt"):
        load_encoder("nowhere.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(UserError, match=r"text\.pt is damaged or no checkpoint"):
        load_encoder(tmp_path / "text.pt")


@pytest.mark.parametrize("part", ["When something goes wrong", "Real machines and real pictures"])
def test_every_promise_names_a_test(part):
    """Each pattern for `pytest -k` selects something."""
    table = section(REPOSITORY / "docs" / "reliability.md", part)
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    patterns = re.findall(r"\| `([^|]*)` \|$", "\n".join(rows), re.MULTILINE)
    files = [path for path in (REPOSITORY / "tests").glob("test_*.py")]
    names = [f"{path.name} {name}" for path in files
             for name in re.findall(r"\ndef (test_\w+)", path.read_text())]  # fmt: skip
    assert len(patterns) == len(rows) >= 12
    for part in " or ".join(patterns).split(" or "):
        assert any(part in name for name in names), part


def anchors(page):
    """The anchors that GitHub gives to the headings of a Markdown file."""
    seen = Counter()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link counts as its text
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1


def links(page):
    """The targets of the relative links and pictures of a Markdown file."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    found = re.findall(r"\]\(<?([^)>\s]+)[^)]*\)|^\[[^]]+\]: *(\S+)", text, re.MULTILINE)
    found += re.findall(r"<(?:a|img)[^>]*(?:href|src)=\"([^\"]+)\"()", text)
    targets = [first or second for first, second in found]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def test_anchors_and_links_are_read_as_github_does(tmp_path):
    page = tmp_path / "page.md"
    headings = '# A `b.c` "d" – e\n\n## [F](g.md) h_i\n## Same\n### Same\n'
    code = "```sh\n# no heading\n[no](link)\n```\n`[no](link)` "
    text = "[a](b.md#c) ![d](e.png 'f') [g](https://x.y)\n<img width=9 src=\"h.png\">\n[i]: j.md\n"
    page.write_text(headings + code + text)
    assert list(anchors(page)) == ["a-bc-d--e", "f-h_i", "same", "same-1"]
    assert links(page) == ["g.md", "b.md#c", "e.png", "j.md", "h.png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page):
    found = links(page)
    assert found
    for link in found:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_at_most_200_lines(page):
    assert len(page.read_text().splitlines()) <= 200
