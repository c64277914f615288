"""Names of encoders in other tools, and the encoders of pathflip that they mean."""

from __future__ import annotations

from pathflip.encoders import table_name
from pathflip.encoders.zoo import Card, card

ALIASES = {
    "uni_v1": "uni",
    "uni_v2": "uni2",
    "uni2_h": "uni2",
    "conch_v1": "conch",
    "conch_v15": "conch_v1_5",
    "conch1_5": "conch_v1_5",
    "prov_gigapath": "gigapath",
    "hoptimus0": "h_optimus_0",
    "hoptimus1": "h_optimus_1",
    "h_optimus0": "h_optimus_0",
    "h_optimus1": "h_optimus_1",
    "phikon_v1": "phikon",
    "phikon2": "phikon_v2",
    "phikonv2": "phikon_v2",
    "midnight12k": "midnight",
    "midnight_12k": "midnight",
    "kaiko_midnight": "midnight",
    "h0mini": "h0_mini",
    "virchow_v1": "virchow",
    "virchow_v2": "virchow2",
    "quiltnet_b32": "quiltnet",
}
"""Names of TRIDENT, CLAM, STAMP, AtlasPatch and LazySlide for encoders of the table
(docs/reference/encoders.md), reduced as :func:`pathflip.encoders.table_name` does."""
UNSTATED = "unstated"
"""Revision and licence of features whose files do not say them."""


def encoder_name(name: str) -> str:
    """Return the name in the archive of an encoder that another tool names."""
    reduced = table_name(name)
    return ALIASES.get(reduced, reduced)


def known_card(name: str, *, dim: int) -> Card | None:
    """Return the row of the table of an encoder, unless its features are of another width."""
    found = card(name)
    return found if found is not None and found.dim == dim else None


def foreign_name(name: str) -> str:
    """Return the name by which TRIDENT knows an encoder; its own where TRIDENT has none."""
    back = {
        "uni": "uni_v1",
        "uni2": "uni_v2",
        "conch": "conch_v1",
        "conch_v1_5": "conch_v15",
        "h_optimus_0": "hoptimus0",
        "h_optimus_1": "hoptimus1",
        "h0_mini": "h0-mini",
        "midnight": "midnight12k",
    }
    return back.get(name, name)
