"""Numbers, text and contact sheet of shards, and the commands that use them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import Lgp
from shard_helpers import LAYOUTS, image, imagefolder, quiet, tar_of

from lgp_dist.data.build.build import BuildOptions, build_shards
from lgp_dist.data.shards.index import index_shards
from lgp_dist.data.shards.manifest import ShardManifest
from lgp_dist.data.shards.show import contact_sheet, summarise
from lgp_dist.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    made = imagefolder(tmp_path / "source")
    build_shards("imagefolder", made.root, tmp_path / "shards", BuildOptions(per_shard=5, workers=1), quiet)
    return tmp_path / "shards"


def test_numbers(shards: Path) -> None:
    found = summarise(ShardManifest.load(shards))
    train = found["train"]
    assert (train["shards"], train["samples"], train["samples_per_shard"]) == (3, 12, [2, 5])
    assert train["bytes"] == sum(path.stat().st_size for path in shards.glob("*-train-*.tar"))
    assert train["histogram"] == {"0 ant": 4, "1 bee b": 4, "2 wespe_ü": 4}
    assert train["width"] == {"min": 20, "median": 20.0, "max": 20}
    assert found["validation"]["histogram"] == {"0 ant": 2, "1 bee b": 2, "2 wespe_ü": 1}


def test_commands(lgp: Lgp, shards: Path, tmp_path: Path) -> None:
    shown = lgp("shards", "show", shards)
    assert shown.status == 0 and "train: 12 samples in 3 shards" in shown.out
    assert "0 ant" in shown.out and shown.out.count("####") >= 6
    sheet = tmp_path / "sheet.png"
    found = lgp("shards", "show", shards, "--json", "--sheet", sheet, "--split", "validation", "--images", 4)
    numbers = json.loads(found.out)
    assert numbers.pop("splits") == summarise(ShardManifest.load(shards))
    assert numbers == {"root": str(shards), "source": "", "licence": "", "classes": 3}
    assert Image.open(sheet).format == "PNG"
    again = tmp_path / "again"
    done = lgp("shards", "reshard", shards, "--out", again, "--shards", 2, "--short-side", 8, "--quality", 70)
    assert done.status == 0 and "train: 12 samples in 2 shards" in done.out and "10 x 8 pixels" in done.out
    assert lgp("shards", "verify", again).out.endswith("every shard and image is whole\n")
    path = next(again.glob("*-train-*.tar"))
    path.write_bytes(path.read_bytes()[:-2000])
    found = lgp("shards", "verify", again, "--out", tmp_path / "bad.json")
    rows = json.loads((tmp_path / "bad.json").read_text())
    assert [line.split("\t") for line in found.out.splitlines()] == [list(row.values()) for row in rows]
    assert {row["shard"] for row in rows} == {path.name} and rows[0]["sentence"].rstrip(".") in found.sentence
    assert f"has {len(rows)} problem(s)" in found.sentence
    assert "--source" in lgp("shards", "build", "kaggle", "--out", tmp_path / "new").sentence
    assert "exists and is not empty" in lgp("shards", "reshard", shards, "--out", again).sentence


@pytest.mark.parametrize("layout", LAYOUTS)
def test_build_from_the_command_line(layout: str, lgp: Lgp, tmp_path: Path) -> None:
    made = LAYOUTS[layout](tmp_path / "source")
    done = lgp("shards", "build", layout, "--source", made.root, "--out", tmp_path / "out", "--per-shard", 6)
    assert done.status == 0, done.err
    assert f"train: {len(made.splits['train'])} samples in {-(-len(made.splits['train']) // 6)} shards" in done.out
    assert lgp("shards", "verify", tmp_path / "out", "--workers", 2).status == 0


def test_contact_sheet_shows_the_images(tmp_path: Path) -> None:
    """One image of each of four classes, in the order of the classes, an undecodable one as a crossed box."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    members = []
    for n in range(16):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 30), colours[n % 4] if n % 4 < 3 else 0).save(buffer, "PNG")
        members += [(f"s{n}.png", buffer.getvalue() if n % 4 < 3 else b"no image"), (f"s{n}.cls", b"%d" % (n % 4))]
    (tmp_path / "x-train-0.tar").write_bytes(tar_of(members))
    manifest = index_shards(tmp_path, quiet)
    contact_sheet(manifest, "", tmp_path / "sheet.png", images=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 112, 2 * 100, 3)
    for place, colour in enumerate(colours):
        assert sheet[place // 2 * 112 + 40, place % 2 * 100 + 40].tolist() == list(colour)
    assert sheet[112 + 2, 100 + 40].tolist() == [255, 0, 0] and sheet[112 + 30, 100 + 80].tolist() == [255, 255, 255]
    before = (tmp_path / "sheet.png").read_bytes()
    contact_sheet(manifest, "train", tmp_path / "again.png", images=4)
    assert (tmp_path / "again.png").read_bytes() == before


def test_many_classes_and_what_cannot_be_shown(lgp: Lgp, tmp_path: Path) -> None:
    members = []
    for n in range(60):
        members += [(f"s{n}.jpg", image(n)), (f"s{n}.cls", b"%d" % (n % 50))]
    (tmp_path / "x-train-0.tar").write_bytes(tar_of(members))
    manifest = index_shards(tmp_path, quiet)
    lines = lgp("shards", "show", tmp_path).out.splitlines()
    assert sum("#" in line for line in lines) == 20 and "  ..." in lines
    for arguments, piece in (
        (("", tmp_path / "s.png", 0), "--images is 0"),
        (("", tmp_path / "s.jpg", 4), "ends in .png"),
        (("nothing", tmp_path / "s.png", 4), "no split 'nothing'"),
    ):
        with pytest.raises(UserError, match=piece):
            contact_sheet(manifest, *arguments)
    contact_sheet(manifest, "train", tmp_path / "s.png", images=1000)
    assert Image.open(tmp_path / "s.png").size == (800, 8 * 112)
