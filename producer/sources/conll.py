"""Reads CoNLL files; a document is a sentence or, with ``--unit document``, a document of the file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from nermill.producer.sources.files import SourceFile
from nermill.producer.sources.options import ReadOptions
from nermill.worker.contracts.conll import LAYOUT_LINES, find_layout, join_documents, read_sentences
from nermill.worker.contracts.document import Document


def read_conll(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The sentences or documents of a CoNLL file.

    The id is that of the comments ``# sent_id`` and ``# newdoc id``, else ``path:line`` of the first word.

    Raises:
        UsageError: no column holds tags, or a column in the options does not exist.
    """
    head = [(raw or b"").decode(errors="replace") for _, raw in islice(file.lines(), LAYOUT_LINES)]
    layout = find_layout(head, file.uri, options.word_column, options.tag_column)
    blocks = read_sentences(file.lines(), layout, file.uri)
    if options.unit == "document":
        blocks = join_documents(blocks, file.uri)
    for block in blocks:
        identity = block.id or f"{file.uri}:{block.line}"
        if block.fault is not None:
            yield Document(identity, fault=block.fault)
        else:
            yield Document(identity, words=tuple(block.words), gold_tags=tuple(block.tags) or None)
