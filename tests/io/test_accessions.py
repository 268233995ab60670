"""The UniProt accession that an id holds, and the column that tables have of it."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

import longlens
from longlens.io.accessions import accession_of


@pytest.mark.parametrize(
    ("id", "accession"),
    [
        ("sp|P69905|HBA_HUMAN", "P69905"),
        ("tr|A0A024RBG1|A0A024RBG1_HUMAN", "A0A024RBG1"),
        ("sp|P04637-9|P53_HUMAN", "P04637"),
        ("sp|Q9Y6K9", "Q9Y6K9"),
        ("UniRef50_P69905", "P69905"),
        ("UniRef90_A0A024RBG1", "A0A024RBG1"),
        ("UniRef100_P04637-9", "P04637"),
        ("AF-P69905-F1", "P69905"),
        ("AF-Q8WZ42-F167-model_v4", "Q8WZ42"),
        ("AFDB:AF-P69905-F1", "P69905"),
        ("P69905", "P69905"),
        ("P04637-2", "P04637"),
        # a sequence of UniParc has no accession in UniProt
        ("UniRef100_UPI0000000001", None),
        ("1abc_A", None),
        ("P6990", None),
        ("P69905_HUMAN", None),
        ("gi|P69905|x", None),
        ("sp|HBA_HUMAN|P69905", None),
        ("p69905", None),
        ("", None),
    ],
)
def test_accession_of_an_id(id, accession):
    assert accession_of(id) == accession


def test_tables_have_a_column_of_accessions_and_the_ids_as_they_were(tmp_path):
    fasta, ids = tmp_path / "p.fasta", ["sp|P69905|HBA_HUMAN", "mine", "AF-P68871-F1"]
    fasta.write_text("".join(f">{id} text\nMKTAYIAK\n" for id in ids[:2]) + f">{ids[2]}\nM2\n")
    longlens.embed(fasta, output=tmp_path / "out", on_error="skip", progress=lambda _: None)
    table = pq.read_table(tmp_path / "out" / "index.parquet")
    assert table["id"].to_pylist() == ids
    # the last record is skipped
    assert table["accession"].to_pylist() == ["P69905", None, "P68871"]
    assert table.schema.field("accession").type == "string"
