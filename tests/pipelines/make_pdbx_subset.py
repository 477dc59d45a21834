"""Cut the categories that this program writes out of the PDBx/mmCIF dictionary.

    python make_pdbx_subset.py mmcif_pdbx.dic > pdbx_subset.dic

The dictionary is that of wwPDB (CC0 1.0, https://mmcif.wwpdb.org), as Debian's libcifpp-data has
it (/usr/share/libcifpp/mmcif_pdbx.dic). Descriptions and examples are left out.
"""

from __future__ import annotations

import sys

from gemmi import cif

CATEGORIES = (
    *("audit", "cell", "diffrn", "diffrn_measurement", "diffrn_radiation", "diffrn_refln"),
    *("diffrn_radiation_wavelength", "entry", "exptl_crystal", "refln", "reflns", "reflns_shell"),
    *("software", "symmetry"),
)
KEPT = (
    *("_dictionary.", "_item_type_list.", "_category.", "_category_key.", "_item.", "_item_type."),
    *("_item_range.", "_item_enumeration.", "_item_linked.", "_pdbx_item_enumeration."),
    *("_pdbx_item_range.", "_pdbx_item_type.", "_item_default."),
)


def subset(source: cif.Block) -> str:
    """Text of what a validator asks for."""
    parts = [f"data_{source.name}", kept(source)]
    for item in source:
        if item.frame is not None:
            name = item.frame.name
            if name.lstrip("_").partition(".")[0] in CATEGORIES:
                parts += [f"save_{name}", kept(item.frame), "save_"]
    return "\n".join(parts) + "\n"


def kept(source: cif.Block) -> str:
    """Items and loops of the kept categories."""
    document = cif.Document()
    block = document.add_new_block("x")
    for item in source:
        tag = item.pair[0] if item.pair else item.loop.tags[0] if item.loop else ""
        if tag.startswith(KEPT):
            block.add_item(item)
    return document.as_string().partition("\n")[2].strip()


if __name__ == "__main__":
    sys.stdout.write(subset(cif.read(sys.argv[1])[0]))
