"""UniProt accessions in the ids of records, by which tables of annotations and other tools know proteins.

The accession's form is UniProt's (https://www.uniprot.org/help/accession_numbers); the ids around it are those of
UniProt's FASTA files (`sp|P69905|HBA_HUMAN`), of UniRef (`UniRef50_P69905`) and of the AlphaFold database
(`AF-P69905-F1`, also `AFDB:AF-P69905-F1` and `AF-P69905-F1-model_v4`).
"""

from __future__ import annotations

import re

_ACCESSION = r"(?:[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2})"
_IDS = re.compile(
    rf"(?:sp|tr)\|(?P<uniprot>{_ACCESSION})(?:-\d+)?(?:\||$)"
    rf"|UniRef(?:100|90|50)_(?P<uniref>{_ACCESSION})(?:-\d+)?$"
    rf"|(?:AFDB:)?AF-(?P<alphafold>{_ACCESSION})(?:-\d+)?-F\d+(?:-model_v\d+)?$"
    rf"|(?P<bare>{_ACCESSION})(?:-\d+)?$"
)


def accession_of(id: str) -> str | None:
    """The UniProt accession that an id holds, without the number of an isoform; None if it holds none.

    `sp|P69905|HBA_HUMAN`, `UniRef50_P69905`, `AF-P69905-F1` and `P69905-2` give "P69905".
    """
    match = _IDS.match(id)
    return None if match is None or match.lastgroup is None else match[match.lastgroup]
