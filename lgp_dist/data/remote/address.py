"""Which data.root is a folder, which a remote address, and which is refused.

A root may come from someone else's configuration, so only the schemes of SCHEMES are opened, each by its own file
system. No root can run a command: `pipe:`, `ssh:` and fsspec's chains (`simplecache::...`) are refused.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lgp_dist.errors import UserError

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "memory": ""}
"""Scheme -> the package that reads it, where one is needed. memory is fsspec's store within this process."""


def local_path(root: str) -> Path | None:
    """The folder that a root names, or None for a remote one; UserError for a scheme that is refused."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", root)
    if not match:
        return Path(root)
    scheme, parts = match[1].lower(), urlsplit(root)
    if scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return Path(unquote(parts.path))
    # Without what may be secret: user name, password, query and fragment.
    shown = re.sub(r"//[^/@]*@", "//...@", re.split(r"[?#]", root)[0])
    if scheme not in SCHEMES or "://" not in root:
        known = ", ".join(f"{name}://" for name in SCHEMES if name != "memory")
        raise UserError(
            f"data.root is {shown}, but '{match[1]}:' is refused, so that no data can run a command: name a folder"
            f" (./{match[1]}:... if it is called so) or one of file://, {known}."
        )
    if "?" in root or "#" in root or "@" in parts.netloc:
        raise UserError(
            f"data.root {shown} holds a password, a query or a fragment, which logs would show: name the folder alone,"
            " and keep credentials in the environment or in ~/.netrc."
        )
    if not parts.netloc:
        raise UserError(f"data.root is {shown}, which names no server or bucket: write {scheme}://NAME/FOLDER.")
    return None
