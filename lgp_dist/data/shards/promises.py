"""What manifest.json, _info.json and the names of files say there should be, compared with what there is."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lgp_dist.data.shards.account import Account, first
from lgp_dist.data.shards.manifest import INFO_NAME, MANIFEST_NAME, ShardManifest, read_info
from lgp_dist.data.shards.splits import gaps, tar_name
from lgp_dist.errors import UserError


class Promise(NamedTuple):
    """A shard that a file names."""

    path: Path
    samples: int | None
    said_by: Path


def promised(folders: Iterable[Path], account: Account) -> list[Promise]:
    """The shards that manifest.json and _info.json in these folders name; a note where one cannot be read."""
    found = []
    lost = "what it says of shards and classes is neither compared nor kept"
    for folder in folders:
        if (path := folder / MANIFEST_NAME).is_file():
            try:
                manifest = ShardManifest.load(folder)
                entries = [entry for split in manifest.splits.values() for entry in split]
                found += [Promise(manifest.path(entry), entry.samples, path) for entry in entries]
            except UserError as error:
                account.notes.append(f"{lost}: {error}")
        info, path = read_info(folder), folder / INFO_NAME
        if path.exists() and not info:
            account.notes.append(f"{lost}: {path} is no object of JSON")
        splits = info.get("splits")
        for split in splits.values() if isinstance(splits, dict) else ():
            named, lengths = (_list(split, key) for key in ("filenames", "shard_lengths"))
            for name, count in zip_longest(named, lengths[: len(named)]):
                if isinstance(name, str):
                    found.append(Promise(folder / name, count if isinstance(count, int) else None, path))
    return found


def _list(split: Any, key: str) -> list[Any]:
    """A list in a split of _info.json, or an empty list."""
    value = split.get(key) if isinstance(split, dict) else None
    return value if isinstance(value, list) else []


def check_promises(
    folders: Iterable[Path], tars: Mapping[Path, int] | Mapping[Path, None], accept: bool, account: Account
) -> None:
    """UserError where a tar is missing, or has fewer samples, than a file in these folders or the tars' names promise.

    tars: path -> number of samples, None where it is not known yet. accept: leave it to the account.
    """
    there = {tar.absolute(): count for tar, count in tars.items()}
    said: dict[Path, list[Promise]] = {}
    for promise in promised(folders, account):
        said.setdefault(promise.said_by, []).append(promise)
    for path, named in said.items():
        lacking = []
        for one in named:
            found = there.get(one.path.absolute(), 0)
            if one.path.absolute() not in there or (found is not None and one.samples and found < one.samples):
                lacking.append(f"{one.path.name} ({(one.samples or 0) - (found or 0)} samples)")
        missing(f"of the {len(named)} shards that {path} names, or some of their samples,", lacking, accept, account)
    numbers: dict[tuple[str, str, int | None], list[int]] = {}
    for tar in tars:
        if (parts := tar_name(tar.name)) and parts.number is not None:
            numbers.setdefault((parts.prefix, parts.split, parts.total), []).append(parts.number)
    for (_, split, total), known in numbers.items():
        what = f"of the numbers of shards of split {split}"
        missing(what, [str(number) for number in gaps(known, total)], accept or total is None, account)


def missing(what: str, names: Sequence[str], accept: bool, account: Account) -> None:
    """UserError for files that are missing, or a note if that is accepted; nothing without names."""
    if not names:
        return
    said = f"{len(names)} {what} are missing: {first(names)}"
    if not accept:
        raise UserError(f"{account.root}: {said}; copy them, or accept what is there with --accept-missing.")
    account.notes.append(said)
