"""What the tests of shards share: small images, tars, and data sets in every layout that a build reads."""

import gzip
import io
import json
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02102040")
WORDS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "English springer")


def quiet(line: str) -> None:
    """No progress."""


def image(number: int, form: str = "JPEG", size: tuple[int, int] = (20, 16)) -> bytes:
    """A different image for each number; size is width and height."""
    generator = np.random.default_rng(number)
    pixels = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    pixels.save(buffer, form, quality=90)
    return buffer.getvalue()


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """A plain tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@dataclass(frozen=True)
class Made:
    """A data set as it was made: the truth for the shards."""

    root: Path
    """For --source."""
    splits: dict[str, dict[str, tuple[int, bytes]]]
    """Split -> key -> label and bytes."""
    classes: tuple[str, ...]
    """Expected in the manifest."""


def train_images() -> list[tuple[int, str, bytes]]:
    """Label, stem and bytes of 17 training images."""
    return [(n % 3, f"{WNIDS[n % 3]}_{n * 7}", image(n)) for n in range(17)]


def validation_images() -> list[tuple[int, str, bytes]]:
    """Label, stem and bytes of 7 validation images."""
    return [(n * 2 % 3, f"ILSVRC2012_val_{n + 1:08d}", image(100 + n)) for n in range(7)]


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def imagefolder(root: Path) -> Made:
    """Class folders with awkward names: dots, spaces, letters beyond ASCII, a folder within a class."""
    splits: dict[str, dict[str, tuple[int, bytes]]] = {"train": {}, "validation": {}}
    for split, folder, count in (("train", "train", 12), ("validation", "val", 5)):
        for n in range(count):
            label = n % 3
            name = ("ant", "bee b", "wespe_ü")[label]
            form, ending = (("JPEG", ".JPEG"), ("PNG", ".png"), ("WEBP", ".webp"))[n // 3 % 3]
            content = image(n + 50 * (split == "train"), form)
            stem, key = (f"a.b.{n}", f"a_b_{n}") if n == 4 else (f"sub/{n}", f"sub/{n}") if n == 5 else (f"{n}", f"{n}")
            _put(root / folder / name / f"{stem}{ending}", content)
            splits[split][f"{name}/{key}"] = (label, content)
    _put(root / "train" / "ant" / "notes.txt", b"no image")
    _put(root / "train" / "ant" / ".hidden.jpg", image(1))
    return Made(root, splits, ("ant", "bee b", "wespe_ü"))


def imagenet(root: Path) -> Made:
    """The official tars, with a devkit whose class numbers differ from the labels."""
    from scipy.io import savemat

    train, validation = train_images(), validation_images()
    inner = []
    for label, wnid in enumerate(WNIDS):
        inner.append((f"{wnid}.tar", tar_of([(f"{stem}.JPEG", c) for la, stem, c in train if la == label])))
    _put(root / "ILSVRC2012_img_train.tar", tar_of(inner[::-1]))
    _put(root / "ILSVRC2012_img_val.tar", tar_of([(f"{stem}.JPEG", c) for _, stem, c in validation[::-1]]))
    number = {0: 3, 1: 1, 2: 2}
    rows = [(number[label], WNIDS[label], WORDS[label], 0) for label in (1, 2, 0)] + [(4, "n00001740", "entity", 3)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    truth = "".join(f"{number[label]}\n" for label, *_ in validation).encode()
    base = "ILSVRC2012_devkit_t12"
    with tarfile.open(root / f"{base}.tar.gz", "w:gz") as tar:
        for name, content in (("meta.mat", buffer.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            info = tarfile.TarInfo(f"{base}/data/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    splits = {
        "train": {f"{WNIDS[label]}/{stem}": (label, c) for label, stem, c in train},
        "validation": {stem: (label, c) for label, stem, c in validation},
    }
    return Made(root, splits, tuple(f"{wnid} {words}" for wnid, words in zip(WNIDS, WORDS, strict=True)))


def kaggle(root: Path) -> Made:
    """As the competition's download unpacks."""
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    made = {"train": {}, "validation": {}}
    for label, stem, content in train_images():
        _put(images / "train" / WNIDS[label] / f"{stem}.JPEG", content)
        made["train"][f"{WNIDS[label]}/{stem}"] = (label, content)
    lines = ["ImageId,PredictionString"]
    for label, stem, content in validation_images():
        _put(images / "val" / f"{stem}.JPEG", content)
        made["validation"][stem] = (label, content)
        lines.append(f"{stem},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 ")
    _put(images / "test" / "ILSVRC2012_test_00000001.JPEG", image(7))
    (root / "LOC_val_solution.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    names = [f"{wnid} {words}" for wnid, words in zip(WNIDS, WORDS, strict=True)]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(names) + "\n")
    return Made(root, made, tuple(names))


def parquet(root: Path) -> Made:
    """As `datasets` writes it on the hub: several files, row groups, class names in the metadata, a test split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": list(WORDS), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
    (root / "data").mkdir(parents=True)

    def write(name: str, rows: list[tuple[int, str, bytes]]) -> None:
        images = [{"bytes": content, "path": f"{stem}.JPEG"} for _, stem, content in rows]
        table = pa.table({"image": pa.array(images, kind), "label": [label for label, *_ in rows]}, schema=schema)
        pq.write_table(table, root / "data" / name, row_group_size=3, compression="snappy")

    train, validation = train_images(), validation_images()
    write("train-00000-of-00002.parquet", train[:9])
    write("train-00001-of-00002.parquet", train[9:])
    write("validation-00000-of-00001.parquet", validation)
    write("test-00000-of-00001.parquet", [(-1, f"ILSVRC2012_test_{n:08d}", image(n)) for n in range(3)])
    splits = {
        split: {stem: (label, c) for label, stem, c in rows}
        for split, rows in (("train", train), ("validation", validation))
    }
    return Made(root, splits, WORDS)


def webdataset(root: Path) -> Made:
    """Shards named as timm's ImageNet shards, with jpg, jpeg, png, webp, cls and json."""
    splits: dict[str, dict[str, tuple[int, bytes]]] = {"train": {}, "validation": {}}
    root.mkdir(parents=True, exist_ok=True)
    forms = (("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
    for split, shards in (("train", ("0000", "0001", "0002")), ("validation", ("00", "01"))):
        for place, number in enumerate(shards):
            members = []
            for n in range(4 + place):
                ending, form = forms[n % 4]
                key, content = f"n{place}_{n}", image(10 * place + n, form)
                splits[split][key] = (n % 3, content)
                members.append((f"{key}.json", json.dumps({"label": n % 3, "filename": key}).encode()))
                members.append((f"{key}.{ending}", content))
                if n % 2:
                    members.append((f"{key}.cls", str(n % 3).encode()))
            (root / f"imagenet1k-{split}-{number}.tar").write_bytes(tar_of(members))
    return Made(root, splits, ())


def idx_files(source: Path, train: int = 200, test: int = 40) -> None:
    """A small Fashion-MNIST: classes equally frequent, random pixels."""
    source.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, head, array in (
            ("images-idx3", struct.pack(">IIII", 0x803, count, 28, 28), images),
            ("labels-idx1", struct.pack(">II", 0x801, count), labels),
        ):
            (source / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))


LAYOUTS = {made.__name__: made for made in (imagefolder, imagenet, kaggle, parquet, webdataset)}
"""Name on the command line -> function that makes a small data set of that layout."""
