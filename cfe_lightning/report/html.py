"""The writer of every HTML page: one file that opens without a network, with style, script and pictures inside.

Templates escape whatever comes from files, and a content security policy lets nothing else run or load.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cfe_lightning.files.atomic import atomic_write

#: The style sheet that all pages begin with.
_SHARED_STYLE = "report/report.css"


def write_page(
    path: Path,
    template: str,
    *,
    styles: Sequence[str] = (),
    more_style: str = "",
    script: str | None = None,
    **values: Any,
) -> Path:
    """Writes a page from a template, whole or not at all, and returns its path.

    Args:
        path: The file to write.
        template: Name of the template as room and file, for example ``report/report.html.j2``. It is given ``style``,
            ``script`` and ``policy`` besides ``values``.
        styles: Names of style sheets that follow the shared one, as room and file.
        more_style: CSS rules after all style sheets.
        script: Name of the only script, as room and file; None forbids scripts.
        values: Values of the template's names; iterators are read while the page is written.
    """
    style = "".join(map(_asset, (_SHARED_STYLE, *styles))) + more_style
    code = None if script is None else _asset(script)
    values |= {"style": Markup(style), "script": Markup(code or ""), "policy": content_policy(style, code)}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    with atomic_write(path) as file:
        file.writelines(environment.from_string(_asset(template)).generate(values))
    return path


def content_policy(style: str, script: str | None = None) -> str:
    """Returns a content security policy that allows one style, one script, and pictures of the page's own place."""
    allowed = {"style-src": style} | ({} if script is None else {"script-src": script})
    digests = {kind: hashlib.sha256(text.encode()).digest() for kind, text in sorted(allowed.items())}
    hashes = "; ".join(f"{kind} 'sha256-{base64.b64encode(code).decode()}'" for kind, code in digests.items())
    return f"default-src 'none'; {hashes}; img-src 'self' file: data:; base-uri 'none'; form-action 'none'"


def _asset(name: str) -> str:
    """Reads a file of a room's ``assets`` folder."""
    room, _, file = name.partition("/")
    return (resources.files(f"cfe_lightning.{room}") / "assets" / file).read_text(encoding="utf-8")
