"""README.md and docs/: their Python runs, their links lead somewhere, a new key is as they say."""

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import PRODUCT, REPOSITORY

from models import SimCLR

README, DOCS = REPOSITORY / "README.md", REPOSITORY / "docs"
PAGES = [README, REPOSITORY / "weights" / "README.md", *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def section(page: Path, title: str) -> str:
    """The text below a heading of the second level."""
    return re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", page.read_text(), re.DOTALL)[1]


def blocks(text: str) -> list[str]:
    """The Python blocks of a text, in their order."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(block: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a block; returns the names that it defines, and those that it was given."""
    names = {} if names is None else names
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.fixture
def place(tmp_path, monkeypatch, write_images) -> Path:
    """A directory with the weights and the images that the README speaks of."""
    shutil.copytree(REPOSITORY / "weights", tmp_path / "weights")
    write_images(tmp_path / "my", classes=1, images=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_that_use_the_encoder_run_and_agree(place):
    """Extraction, torchvision's own ResNet and the exported program give the same h."""
    features, resnet = blocks(section(README, "Use the encoder"))
    [export] = blocks(section(DOCS / "evaluation.md", "Export"))
    names = run(features)
    assert names["h"].shape == (5, 512) == (len(names["images"]), names["feature_dim"])
    assert not names["h"].requires_grad and not names["enc"].training
    h, images = names["h"], names["images"]
    run(export, run(resnet, names))
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
    [block] = blocks((DOCS / "differences.md").read_text())
    loaded = run(block)["model"].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in theirs.items())


def test_a_key_is_added_as_the_page_says(tmp_path, write_images, call, monkeypatch):
    """docs/development.md: its group, its value, a reader; --help, checkpoint, resume know it."""
    copy = tmp_path / "copy"
    for path in (*PRODUCT, REPOSITORY / "simclr_config.yml"):
        (copy / path.relative_to(REPOSITORY)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.relative_to(REPOSITORY))
    edits = {  # file: where, what to put before it
        "config.py": ("    temperature: float", "    gain: float = between(0)\n"),
        "simclr_config.yml": ("temperature: 0.5", "gain: 1.0  # of the loss\n"),
        "simclr.py": ("    learner.optimizer.zero_grad()", "    loss = cfg.gain * loss\n"),
    }
    for name, (where, line) in edits.items():
        before, after = (copy / name).read_text().split(f"\n{where}")
        (copy / name).write_text(f"{before}\n{line}{where}{after}")
    for name, module in [*sys.modules.items()]:  # the copy's are imported instead
        if Path(getattr(module, "__file__", None) or "") in PRODUCT:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(copy)
    monkeypatch.setattr(conftest, "REPOSITORY", copy)

    call("simclr.py", "--help")
    assert "gain: 1.0" in call.stdout
    data = write_images(tmp_path / "images", classes=1, train=8)
    toy = ["dataset=folder", f"data_dir={data}", "image_size=8", "batch_size=8", "epochs=1"]
    toy += ["device=cpu", "compile=false", "hydra.run.dir=run"]
    assert call("simclr.py", *toy, "gain=2")[0] == 0
    saved = torch.load(tmp_path / "run" / "simclr_resnet18_epoch1.pt", weights_only=True)
    assert saved["config"]["gain"] == 2
    code, error = call("simclr.py", *toy, "gain=3")
    assert code == 2 and "gain=3.0 (was 2.0)" in error


def anchors(page: Path) -> Iterator[str]:
    """The anchors that GitHub gives to the headings of a Markdown file."""
    seen = Counter()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link counts as its text
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1


def links(page: Path) -> list[str]:
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
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_no_longer_than_one_reads(page):
    assert len(page.read_text().splitlines()) <= (180 if page == README else 200)
