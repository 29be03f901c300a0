"""The licence of a model, as its card says it.

The card is the README.md of a model in the hub's layout; its front matter names a licence by the hub's own
identifiers, which are mostly those of SPDX in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

UNKNOWN_LICENSE = "unknown"
"""What a stream says whose teacher says nothing."""

_SPDX = (
    *("Apache-2.0", "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear", "ISC", "Zlib"),
    *("CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-ND-4.0"),
    *("CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-3.0"),
    *("CC-BY-NC-SA-4.0", "GPL-2.0", "GPL-3.0", "LGPL-2.1", "LGPL-3.0", "AGPL-3.0", "MPL-2.0", "EPL-2.0"),
    *("EUPL-1.2", "AFL-3.0", "Artistic-2.0", "BSL-1.0", "ECL-2.0", "MS-PL", "NCSA", "OFL-1.1", "OSL-3.0"),
    *("PostgreSQL", "Unlicense", "ODC-By-1.0", "ODbL-1.0"),
)
_SPDX_BY_HUB = {name.lower(): name for name in _SPDX} | {"odc-by": "ODC-By-1.0", "odbl": "ODbL-1.0"}
"""Other identifiers of the hub name terms that SPDX does not list, such as "llama3.2" or "gemma"."""

_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def license_of_card(text: str) -> str:
    """The licence that a model card names.

    Args:
        text: A README.md, or its beginning.

    Returns:
        An SPDX expression or a URL; empty where the card names none, or has no front matter that can be read.
    """
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        return ""
    try:
        fields: object = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return ""
    return license_of_fields(cast("Mapping[str, object]", fields)) if isinstance(fields, dict) else ""


def license_of_fields(fields: Mapping[str, object]) -> str:
    """The licence that a card's `license`, `license_name` and `license_link` name; empty where none does."""
    found = fields.get("license")
    named = cast("list[object]", found) if isinstance(found, list) else [found]
    # Of several, a card does not say whether one may choose.
    each = [_expression(str(one).strip(), fields) for one in named if one]
    return " AND ".join(each) if all(each) else ""


def _expression(hub_id: str, fields: Mapping[str, object]) -> str:
    if hub_id.lower() in ("", UNKNOWN_LICENSE):
        return ""
    if hub_id.lower() != "other":
        return _SPDX_BY_HUB.get(hub_id.lower()) or _reference(hub_id)
    link, name = (str(fields.get(key) or "").strip() for key in ("license_link", "license_name"))
    if link.startswith(("https://", "http://")):
        return link
    return _reference(name) if name else ""


def _reference(name: str) -> str:
    """SPDX's form of a licence that it does not list."""
    return f"LicenseRef-{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-')}"
