"""Models of transformers: run them on longlens' attention, and observe what they attend to.

    with longlens.hf.attach(model, method="exact"):
        model(**inputs)

transformers is imported when `attach` is called, and only then (extra `hf`). With this module imported, its models also
take `attn_implementation="longlens"`: exact attention in linear memory.
"""

from __future__ import annotations

from longlens.hf.attach import Attachment as Attachment
from longlens.hf.attach import attach as attach
from longlens.hf.contacts import predict_contacts as predict_contacts
from longlens.hf.registered import register as _register

__all__ = ["Attachment", "attach", "predict_contacts"]

_register()
